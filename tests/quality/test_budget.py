from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import VideoMAEForVideoClassification

from tests.quality.support import config
from tldr_compile import NothingToMerge, TokenMerging, ops
from tldr_compile.ops.reductions import Tokens
from tldr_compile.quality import methods
from tldr_compile.quality.budget import BudgetError, Curve, Merger
from tldr_compile.quality.methods import METHODS, OURS, RANDOM, SEEDS, schedule


@pytest.fixture
def registered() -> Iterator[None]:
    before = dict(ops.REDUCTIONS)
    methods.register()
    yield
    ops.REDUCTIONS.clear()
    ops.REDUCTIONS.update(before)


@pytest.fixture(scope="module")
def merger() -> Merger:
    torch.manual_seed(0)
    model = VideoMAEForVideoClassification(config(layers=4)).eval()
    return Merger(model, torch.zeros(2, 8, 3, 64, 64))


def test_a_curve_is_searched_in_few_steps() -> None:
    curve = Curve(lambda fraction: 10 * (1 - fraction) ** 2, dense=10)
    for budget in (0.9, 0.6, 0.3):
        assert 10 * (1 - curve.fraction(budget)) ** 2 == pytest.approx(10 * budget, rel=0.005)
    assert len(curve.known) <= 11


def test_a_budget_out_of_reach_names_the_closest() -> None:
    curve = Curve(lambda fraction: 10 - 8 * fraction, dense=10)
    with pytest.raises(BudgetError, match=r"cannot meet 0\.3 of the dense GFLOPs, 0\.600 is the closest") as caught:
        curve.fraction(0.3)
    assert caught.value.fraction == 0.5


def test_a_budget_close_to_all_is_not_met_by_doing_nothing() -> None:
    curve = Curve(lambda fraction: 10.0 if fraction < 0.01 else 10 - 8 * fraction, dense=10)
    assert 10 - 8 * curve.fraction(0.999) < 10
    with pytest.raises(BudgetError, match=r"cannot meet 0\.999 .* 0\.900 is the closest"):
        Curve(lambda fraction: 10.0 if fraction < 0.01 else 9.0, dense=10).fraction(0.999)


def test_merging_that_saves_nothing_meets_no_budget() -> None:
    with pytest.raises(BudgetError, match=r"cannot meet 0\.8 .* 1\.100 is the closest"):
        Curve(lambda fraction: 10 + 2 * fraction, dense=10).fraction(0.8)


def test_a_schedule_that_rounds_to_nothing_costs_all(merger: Merger) -> None:
    assert merger.gflops(TokenMerging(schedule=(1e-4,) * 4)) == merger.dense


def test_steps_too_coarse_for_a_budget_are_told() -> None:
    curve = Curve(lambda fraction: 10.0 if fraction < 0.25 else 5.0, dense=10)
    with pytest.raises(BudgetError, match=r"0\.7 of the dense GFLOPs, 0\.500 is the closest"):
        curve.fraction(0.7)


def test_budgets_are_met_by_what_is_merged(merger: Merger) -> None:
    for cell in merger.cells(OURS, METHODS[OURS], "every site", (0.8, 0.5)):
        assert not cell.missed
        assert cell.gflops == pytest.approx(cell.budget * merger.dense, rel=0.02)
        told = merger.merged(cell.configs[0]).report.to_dict()
        assert told["gflops_after"] / 2 == pytest.approx(cell.gflops)
        assert told["gflops_before"] / 2 == pytest.approx(merger.dense)


def test_a_late_schedule_is_marked_where_it_cannot_follow(merger: Merger) -> None:
    near, far = merger.cells("late", METHODS["vid-TLDR, late"], "every site", (0.9, 0.2))
    assert not near.missed
    assert "cannot meet 0.2 of the dense GFLOPs" in far.missed
    assert far.configs[0].entries == (0.0, 0.0, 0.5, 0.5)
    assert f"{far.gflops / merger.dense:.3f} is the closest" in far.missed


def test_a_model_with_nothing_to_merge_is_refused() -> None:
    with pytest.raises(NothingToMerge, match="no attention of Identity"):
        Merger(torch.nn.Identity(), torch.zeros(2, 8, 3, 64, 64))


def test_schedules_pass_over_sites_that_cannot_merge() -> None:
    able = (True, False, True, True)
    assert schedule("first two sites", able, 0.2) == (0.2, 0.0, 0.2, 0.0)
    assert schedule("every site", able, 0.2) == (0.2, 0.0, 0.2, 0.2)
    assert schedule("first half", able, 0.2) == (0.2, 0.0, 0.2, 0.0)
    assert schedule("second half", able, 0.2) == (0.0, 0.0, 0.0, 0.2)


@pytest.mark.usefixtures("registered")
def test_random_seeds_differ_and_are_reproducible() -> None:
    def lost(name: str, merge: int = 0) -> torch.Tensor:
        return ops.REDUCTIONS[name].choose(Tokens(clips, None, 20, merge)).source

    clips = torch.randn(3, 64, 8)

    found = [lost(name) for name in SEEDS]
    again = [lost(name) for name in SEEDS]
    assert all(torch.equal(first, second) for first, second in zip(found, again, strict=True))
    assert len({tuple(source.flatten().tolist()) for source in found}) == len(SEEDS)
    assert not torch.equal(found[0][0], found[0][1])
    assert not torch.equal(found[0], lost(SEEDS[0], merge=1))
    clips = clips.flip(0)
    assert torch.equal(lost(SEEDS[0]).flip(0), found[0]), "what a clip loses does not depend on its place in the batch"


@pytest.mark.usefixtures("registered")
def test_random_rows_are_not_equal(merger: Merger) -> None:
    (cell,) = merger.cells(RANDOM, METHODS[RANDOM], "every site", (0.6,))
    clips = torch.randn(2, 8, 3, 64, 64)
    with torch.inference_mode():
        logits = [merger.merged(each)(clips).logits for each in cell.configs]
        again = merger.merged(cell.configs[0])(clips).logits
    assert len(logits) == len(SEEDS)
    assert torch.equal(logits[0], again)
    assert len({tuple(each.flatten().tolist()) for each in logits}) == len(SEEDS)
