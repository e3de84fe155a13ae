from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from tldr_compile import TokenMerging
from tldr_compile.quality.accuracy import Said, alone, paired, rows, said, verdict
from tldr_compile.quality.budget import Cell
from tldr_compile.quality.data import Batch
from tldr_compile.quality.folders import DataError
from tldr_compile.quality.methods import OURS, RANDOM

CPU = torch.device("cpu")
ONE, TWO, THREE = (TokenMerging(schedule=(part,)) for part in (0.1, 0.2, 0.3))


class Constant(nn.Module):
    """Says the class that the first pixel numbers, plus `off`."""

    def __init__(self, off: int = 0) -> None:
        super().__init__()
        self.off = off

    def forward(self, pixels: Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=torch.eye(5)[pixels.flatten(1)[:, 0].long() + self.off])


def clips(first: list[int]) -> Tensor:
    return torch.tensor(first).float().reshape(-1, 1, 1, 1, 1).expand(-1, 2, 3, 4, 4)


def heard(**right: list[int]) -> Said:
    keys = {"dense": "dense", "one": ONE, "two": TWO, "three": THREE}
    classes = {keys[name]: torch.tensor(values) for name, values in right.items()}
    return Said(classes, torch.zeros_like(next(iter(classes.values()))))


def test_every_model_hears_every_clip_and_filling_does_not_count() -> None:
    batches = [Batch(clips([0, 1]), torch.tensor([0, 1])), Batch(clips([2, 2]), torch.tensor([2]))]
    ticks: list[None] = []
    told = said({"right": Constant(), "wrong": Constant(1)}, batches, CPU, lambda: ticks.append(None))
    assert told.labels.tolist() == told.classes["right"].tolist() == [0, 1, 2]
    assert told.classes["wrong"].tolist() == [1, 2, 3]
    assert len(ticks) == 4


def test_no_clip_at_all_is_an_error() -> None:
    with pytest.raises(DataError, match="no clip could be read"):
        said({"right": Constant()}, [], CPU, lambda: None)


def test_rows_hold_accuracy_agreement_and_what_random_dropping_has() -> None:
    told = heard(dense=[0, 0, 0, 1], one=[0, 0, 1, 1], two=[0, 1, 1, 1], three=[0, 0, 0, 0])
    cells = [Cell(OURS, 0.5, (ONE,), 0.4), Cell(RANDOM, 0.5, (TWO, THREE), 0.4), Cell("late", 0.5, (ONE,), 0.6, "far")]
    ours, random, late = rows(cells, told, "dense")
    assert ours.accuracy.middle == 0.5
    assert ours.accuracy.low < 0.5 < ours.accuracy.high
    assert ours.agreement == 0.75
    assert ours.over_random is not None
    assert ours.over_random.middle == pytest.approx(0.5 - 0.625)
    assert (random.accuracy.middle, random.variants, random.over_random) == (0.625, [0.25, 1.0], None)
    assert random.agreement == pytest.approx((0.5 + 0.75) / 2)
    assert (late.missed, late.over_random) == ("far", None)
    dense = alone("dense", 0.8, told, "dense")
    assert (dense.budget, dense.agreement, dense.accuracy.middle) == (None, 1.0, 0.75)


def test_paired_intervals_are_narrower_where_clips_agree() -> None:
    ours, theirs = torch.tensor([1.0, 1, 0, 0, 1, 0] * 50), torch.tensor([1.0, 1, 0, 0, 0, 0] * 50)
    off = paired(ours, theirs)
    assert off.middle == pytest.approx(1 / 6)
    assert 0 < off.low < off.middle < off.high
    assert off.high - off.low < 0.1


def test_a_paired_interval_is_that_of_bonett_and_price() -> None:
    # 30 clips that only ours tells right, 10 that only theirs does, 60 on which they agree.
    ours, theirs = torch.tensor([1.0] * 30 + [0.0] * 70), torch.tensor([0.0] * 30 + [1.0] * 10 + [0.0] * 60)
    p12, p21 = 31 / 102, 11 / 102
    half = 1.959964 * ((p12 + p21 - (p12 - p21) ** 2) / 102) ** 0.5
    assert paired(ours, theirs) == pytest.approx((0.2, p12 - p21 - half, p12 - p21 + half))


def test_a_few_clips_are_no_proof() -> None:
    assert paired(torch.ones(2), torch.zeros(2)).low < 0 < paired(torch.ones(40), torch.zeros(40)).low


def test_the_verdict_says_where_random_dropping_is_not_beaten() -> None:
    wins = heard(dense=[0] * 40, one=[0] * 40, two=[1] * 40)
    cells = [Cell(OURS, 0.5, (ONE,), 0.4), Cell(RANDOM, 0.5, (TWO,), 0.4)]
    assert "is better at 0.5 (+100.0, +86.0 to +100.0) of the dense GFLOPs" in verdict(rows(cells, wins, "dense"))
    cells = [Cell(OURS, 0.5, (TWO,), 0.4), Cell(RANDOM, 0.5, (ONE,), 0.4)]
    assert "is worse at 0.5 (-100.0, -100.0 to -86.0)" in verdict(rows(cells, wins, "dense"))
    cells = [Cell(OURS, 0.5, (ONE,), 0.4), Cell(RANDOM, 0.5, (ONE,), 0.4)]
    assert "is not shown to be either at 0.5 (+0.0" in verdict(rows(cells, wins, "dense"))
    assert verdict(rows(cells[:1], wins, "dense")) == ""
