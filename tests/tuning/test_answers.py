"""How far one answer is from another."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from tldr_compile.errors import OptionError
from tldr_compile.tuning.answers import OBJECTIVES, answer, check_answer, objective_of


def test_logits() -> None:
    dense, merged = torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[math.log(3), 0.0], [2.0, 0.0]])
    far = OBJECTIVES["logits"](dense, merged)
    # Classes 1/2, 1/2 against 3/4, 1/4.
    assert far.distance.tolist() == pytest.approx([0.5 * math.log(2 / 3) + 0.5 * math.log(2), 0], abs=1e-6)
    assert far.same.tolist() == [1, 1]
    assert OBJECTIVES["logits"](dense, -merged).same.tolist() == [0, 0]


def test_cosines() -> None:
    dense, merged = torch.tensor([[[1.0, 0], [0, 1]]]), torch.tensor([[[2.0, 0], [3, 0]]])
    assert OBJECTIVES["tokens"](dense, merged).same.tolist() == [0.5]
    assert OBJECTIVES["embedding"](dense[:, 0], merged[:, 0]).distance.tolist() == [0]


def test_what_an_output_is_taken_for() -> None:
    logits, features = torch.zeros(2, 3), torch.zeros(2, 5, 3)
    assert objective_of(SimpleNamespace(logits=logits)) == objective_of(logits) == "logits"
    assert objective_of((features, logits)) == "tokens"
    assert objective_of({"pooled": logits}) == "embedding"
    assert answer({"ids": torch.zeros(2, 3, dtype=torch.int64), "x": features}) is features
    with pytest.raises(OptionError, match="without a tensor of floats"):
        answer({"ids": torch.zeros(2, 3, dtype=torch.int64)})


@pytest.mark.parametrize(
    ("objective", "told", "message"),
    [
        ("accuracy", torch.zeros(2, 3), "objective is 'auto', 'logits', 'embedding', 'tokens'"),
        ("logits", torch.zeros(2, 1), "needs an answer"),
        ("tokens", torch.zeros(2, 3), "needs an answer"),
        ("logits", torch.full((2, 3), torch.nan), "no number"),
    ],
)
def test_objectives_of_no_use(objective: str, told: torch.Tensor, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        check_answer(objective, told)
