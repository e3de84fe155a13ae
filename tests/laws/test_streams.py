"""Models of several streams: where all tokens of each group are equal, merging changes nothing. Law 10.

The inputs repeat one patch along every row, so each source has an equal among the destinations, and half of the tokens
of a site can go. Only the dense model says what is right.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram, export

import tldr_compile
from tests.laws import streams as zoo
from tests.laws.streams import Streams, rows, text
from tests.laws.support import assert_same, distance, everywhere, tensors
from tldr_compile.errors import NothingToMerge

LAW: dict[str, Any] = {"saliency": "uniform", "proportional": True, "pooling": "mass"}

MODELS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    **{
        f"two scales by convolution: {how}": (partial(zoo.by_convolution, how=how), (rows(),))
        for how in ("mean", "added")
    },
    **{
        f"two scales by reshape: {how}": (partial(zoo.by_reshape, how=how), (rows(),))
        for how in ("mean", "tokens", "softmax")
    },
    "two scales of two pictures": (partial(zoo.of_two_pictures, how="mean"), (rows(), rows(seed=2))),
    "two views": (zoo.two_views, (rows(), rows(seed=2))),
    "two views compared": (zoo.compared_views, (rows(), rows(seed=2))),
    "two views of unlike sizes": (zoo.two_views, (rows(), rows(6, seed=2))),
    "two views crossed": (zoo.crossed_views, (rows(), rows(6, seed=2))),
    "text and clip, one residual": (zoo.one_stream, (rows(), text())),
    "two branches": (zoo.two_branches, (rows(),)),
    "branches that meet": (zoo.branches_that_meet, (rows(),)),
    "attention beside an MLP": (zoo.beside_an_mlp, (rows(),)),
}

every_model = pytest.mark.parametrize("name", MODELS)


@cache
def program(name: str) -> ExportedProgram:
    torch.manual_seed(0)
    run, inputs = MODELS[name]
    return export(Streams(run).eval(), inputs)


@torch.no_grad()
def dense(name: str, inputs: tuple[Tensor, ...] | None = None) -> Any:
    return program(name).module()(*(MODELS[name][1] if inputs is None else inputs))


def merge(name: str, **options: Any) -> tldr_compile.MergedModule:
    clip = {"clip": "inputs_0"} if name.startswith("text") else {}
    schedule = options.pop("schedule", 0.5)
    if isinstance(schedule, float):
        schedule = everywhere(schedule, program(name), **clip)
    return tldr_compile.apply(program(name), schedule=schedule, **{**clip, **options})


@torch.no_grad()
def answers(name: str, schedule: Any = 0.5, **options: Any) -> Any:
    """Merged, at one site or more."""
    merged = merge(name, schedule=schedule, **{**LAW, **options})
    assert any(site["status"] == "merged" for site in merged.report.sites)
    return merged(*MODELS[name][1])


@cache
def plain(name: str) -> tldr_compile.MergedModule:
    """With the options that nobody gave."""
    return merge(name, schedule=0.3)


def off_by(merged: Any, expected: Any) -> float:
    return max(distance(one, two) for one, two in zip(tensors(merged), tensors(expected), strict=True))


@every_model
def test_merging_equal_tokens_changes_nothing(name: str) -> None:
    assert_same(answers(name), dense(name))


@pytest.mark.parametrize("schedule", [[0.5], [0, 0.5]], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        *("two scales by reshape: softmax", "two scales of two pictures", "two views compared"),
        "branches that meet",
    ],
)
def test_nor_does_merging_one_of_the_streams(name: str, schedule: list[float]) -> None:
    assert_same(answers(name, schedule), dense(name))


@every_model
def test_no_stream_is_refused_because_of_another(name: str) -> None:
    report = plain(name).report
    assert "refused" not in {site["status"] for site in report.sites}, str(report)


def test_text_with_a_residual_stream_of_its_own_is_refused_in_words() -> None:
    model = Streams(zoo.two_streams).eval()
    with pytest.raises(NothingToMerge, match="no residual addition follows it on every path"):
        tldr_compile.apply(model, (rows(), text()), schedule=[0.5], clip="inputs_0")


@every_model
def test_shapes_are_restored_whatever_the_tokens(name: str) -> None:
    """On pictures without equal tokens: the numbers change, their shapes do not."""
    inputs = MODELS[name][1]
    noise = tuple(zoo.drawn(*each.shape, seed=7 + number) for number, each in enumerate(inputs))
    with torch.no_grad():
        merged, expected = plain(name)(*noise), dense(name, noise)
    assert [each.shape for each in tensors(merged)] == [each.shape for each in tensors(expected)]
    assert all(each.isfinite().all() for each in tensors(merged))
    assert off_by(merged, expected) > 1e-4


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("two scales")])
def test_the_definition_says_the_same(name: str) -> None:
    plain(name).verify(MODELS[name][1])


# --- the law can fail ---


@pytest.mark.parametrize("name", ["two views crossed", "text and clip, one residual", "two branches"])
def test_attention_without_mass_shows(name: str) -> None:
    assert off_by(answers(name, [0.4, 0.2], proportional=False), dense(name)) > 1e-3


@pytest.mark.parametrize("name", ["two scales by convolution: mean", "two views", "attention beside an MLP"])
def test_a_mean_without_mass_shows(name: str) -> None:
    assert off_by(answers(name, [0.4, 0.2], pooling="plain"), dense(name)) > 1e-3
