"""Spellings of one thing that are equal in eager are equal when merged: law 9.

It holds where `pooling` and `proportional` agree: all sums over tokens weigh by mass, or none does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram, export

import tldr_compile
from tests.laws.spellings import ATTENTIONS, FAMILIES, MEANS, TOKENS, WIDTH, Encoder, everything, masks, video
from tests.laws.support import distance
from tldr_compile import ops

BOUND = 1e-5
SCHEDULE = [5, 3]
AGREEING: tuple[dict[str, Any], ...] = (
    {"pooling": "mass", "proportional": True},
    {"pooling": "plain", "proportional": False},
)
RANKING = [name for name, signal in ops.SIGNALS.items() if signal.reads]
CHOICES = [
    {**agreeing, "saliency": saliency, "reduction": reduction}
    for number, agreeing in enumerate(AGREEING)
    for reduction, signals in {
        "merge": [*ops.SIGNALS],
        "drop": RANKING[number::2],  # what is dropped weighs nothing: half of them with each
        "random": ["attention"],
        "slice": ["attention"],
    }.items()
    for saliency in signals
]
FEW = [CHOICES[0], CHOICES[-1]]
"""For a model without class tokens."""

every_choice = pytest.mark.parametrize(
    ("leading", "number"),
    [*((1, number) for number in range(len(CHOICES))), *((0, CHOICES.index(each)) for each in FEW)],
    ids=lambda each: str(each),
)


@cache
def program(finish: Callable[[Any, Tensor], Any], leading: int = 0, attention: str = "fused") -> ExportedProgram:
    torch.manual_seed(0)
    return export(Encoder(finish, leading, ATTENTIONS[attention]).eval(), (video(), *masks(leading)))


@torch.no_grad()
def answers(finish: Callable[[Any, Tensor], Any], leading: int = 0, attention: str = "fused", **options: Any) -> Any:
    merged = tldr_compile.apply(program(finish, leading, attention), **{"schedule": SCHEDULE, **options})
    return merged(video(), *masks(leading))


@torch.no_grad()
def dense(finish: Callable[[Any, Tensor], Any], leading: int = 0) -> Any:
    return program(finish, leading).module()(video(), *masks(leading))


def unequal(families: dict[str, dict[str, Tensor]]) -> list[str]:
    """The spellings that are not what the first one of their family is."""
    return [
        f"{family}: {name} is off by {apart:.1e}"
        for family, spellings in families.items()
        for name, value in spellings.items()
        if (apart := distance(value, next(iter(spellings.values())))) > BOUND
    ]


@cache
def told(leading: int, number: int) -> Any:
    """Everything, merged with one of the choices."""
    return answers(everything, leading, **CHOICES[number])


@pytest.mark.parametrize("leading", [0, 1])
def test_the_dense_model_has_them_equal(leading: int) -> None:
    assert unequal(dense(everything, leading)["families"]) == []


@every_choice
def test_spellings_of_pooling_agree(leading: int, number: int) -> None:
    assert unequal(told(leading, number)["families"]) == []


ALONE = {
    "means": ["sum / N", "mask, a bool input", "full @ h", "adaptive_avg_pool1d"],
    "learned pooling": ["exponentials"],
    "logarithms": ["written out"],
    "variances": ["of the squares"],
    "norms": ["einsum"],
}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in ALONE for name in ALONE[family]])
def test_a_spelling_alone_is_what_it_is_among_others(family: str, name: str) -> None:
    """In a graph of its own, so that no other spelling can help it."""
    alone = answers(FAMILIES[family][name], **CHOICES[0])
    assert distance(alone, told(0, 0)["families"][family][name]) <= BOUND


def tokens_and_mean(s: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    return h, h.mean(1)


@pytest.mark.parametrize(
    "options",
    [
        *({**AGREEING[0], **more} for more in ({}, {"reduction": "drop"}, {"saliency": "uniform"}, {"metric": "keys"})),
        AGREEING[1],
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_spellings_of_attention_agree(options: dict[str, Any]) -> None:
    found = {name: answers(tokens_and_mean, 1, name, **options) for name in ATTENTIONS}
    for number, what in enumerate(("tokens", "mean")):
        assert unequal({what: {name: each[number] for name, each in found.items()}}) == []


# --- what a sum over tokens must be ---


@every_choice
def test_ones_add_up_to_the_number_of_tokens(leading: int, number: int) -> None:
    sums, count = told(leading, number)["sums"], TOKENS + leading
    assert distance(sums["ones"], torch.full((2, WIDTH), float(count))) <= BOUND
    assert distance(sums["sum"], count * sums["mean"]) <= BOUND


@every_choice
def test_integers_count_what_leaves_the_model(leading: int, number: int) -> None:
    found, count = told(leading, number), TOKENS + leading
    positive, counts = found["tokens"] > 0, found["counts"]
    assert torch.equal(counts["sum"], positive.sum(1))
    assert torch.equal(counts["count_nonzero"], positive.sum(1))
    assert torch.equal(counts["iterated"], positive.sum((1, 2)))
    assert distance(counts["float"], count * counts["share"]) <= BOUND
    assert distance(counts["share of counts"], counts["share"]) <= BOUND


@every_choice
def test_rows_of_maps_add_up_to_one(leading: int, number: int) -> None:
    found = told(leading, number)["maps"]
    assert {name: rows.shape[-1] for name, rows in found.items()} == dict.fromkeys(found, TOKENS + leading)
    for rows in found.values():
        assert distance(rows.sum(-1), torch.ones(rows.shape[:-1])) <= BOUND
    assert distance(found["written out"], found["softmax"]) <= BOUND


# --- the law can fail ---


@pytest.mark.parametrize(
    "options", [{"pooling": "plain", "proportional": True}, {"pooling": "mass", "proportional": False}], ids=str
)
def test_where_the_options_disagree_spellings_do(options: dict[str, Any]) -> None:
    """Fused pooling is attention; exponentials over their sum are sums."""
    assert any("learned pooling" in text for text in unequal(answers(everything, **options)["families"]))


def other(s: Any, h: Tensor) -> dict[str, dict[str, Tensor]]:
    return {"means": {**{name: pool(s, h) for name, pool in MEANS.items()}, "other": h[:, 1:].mean(1)}}


def test_means_of_other_things_are_told_apart() -> None:
    assert [text.split(" is off")[0] for text in unequal(dense(other))] == ["means: other"]
