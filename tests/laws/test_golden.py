"""The authors' numbers, block by block, to 1e-5 of the largest magnitude."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

import tldr_compile
from benchmarks.golden import ENCODERS, GoldenEncoder, assert_golden, at_full_length, golden_encoder
from tests.laws.support import compiled, graphs_for_inductor
from tests.zoo import Attn
from tldr_compile import ops
from tldr_compile.inspection import inspect

Road: TypeAlias = Callable[..., tuple[Tensor, ...]]

EVERY_ENCODER = [(name, attn) for name in ENCODERS for attn in ("sdpa", "eager")]


def applied(golden: GoldenEncoder, **options: Any) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = tldr_compile.apply(golden.model, (golden.video,), **options)(golden.video)
    return outputs


def through_inductor(golden: GoldenEncoder, **options: Any) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = compiled(golden.model, **options)(golden.video)
    return outputs


def interpreted(golden: GoldenEncoder, **options: Any) -> tuple[Tensor, ...]:
    """The graph that the backend hands to Inductor, as it is."""
    with graphs_for_inductor() as graphs:
        outputs = through_inductor(golden, **options)
    assert len(graphs) == 1
    return outputs


ROADS = [(name, attn, applied) for name, attn in EVERY_ENCODER] + [(name, "sdpa", interpreted) for name in ENCODERS]
every_road = pytest.mark.parametrize(("name", "attn", "road"), ROADS)


@torch.no_grad()
def assert_merged(golden: GoldenEncoder, road: Road) -> None:
    """Every token has its group's value, after every block; and one of each group leaves."""
    assert_blocks(golden, road)
    short, *_ = road(golden, schedule=golden.schedule, outputs="merged")
    assert_golden(short, in_order_of(golden.merged[0], short))


def assert_blocks(golden: GoldenEncoder, road: Road, bound: float = 1e-5, **options: Any) -> None:
    decisions = inspect(tldr_compile.apply(golden.model, (golden.video,), schedule=golden.schedule), golden.video)
    outputs = road(golden, schedule=golden.schedule, **options)
    for actual, expected in zip(outputs, at_full_length(golden, decisions), strict=True):
        assert_golden(actual, expected, bound)


def in_order_of(rows: Tensor, like: Tensor) -> Tensor:
    """The rows of every sample, each where `like` has the one nearest to it; no row twice."""
    nearest = torch.cdist(like, rows).argmin(-1)
    assert all(each.unique().numel() == rows.shape[1] for each in nearest)
    return rows.gather(1, nearest.unsqueeze(-1).expand_as(rows))


@torch.no_grad()
def assert_dense(golden: GoldenEncoder, road: Road) -> None:
    for actual, expected in zip(road(golden, schedule=0.0), golden.base, strict=True):
        assert_golden(actual, expected)


@every_road
def test_merged_encoders_are_golden(name: str, attn: Attn, road: Road) -> None:
    assert_merged(golden_encoder(name, attn), road)


@pytest.mark.parametrize("name", ENCODERS)
def test_merged_encoders_are_golden_without_a_compiler_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the provider in plain PyTorch, and fused attention for what comes after a merge."""
    for each in ops.PROVIDERS.values():
        monkeypatch.setattr(each, "order", [one for one in each.order if one.name != "native"])
    assert_merged(golden_encoder(name, "sdpa"), applied)


@every_road
def test_dense_encoders_are_golden(name: str, attn: Attn, road: Road) -> None:
    assert_dense(golden_encoder(name, attn), road)


def test_a_compiled_encoder_is_golden() -> None:
    """One, whose attention is spelled out: compiling takes a minute."""
    with torch.no_grad():
        assert_blocks(golden_encoder("encoder0", "eager"), through_inductor)


@pytest.mark.parametrize(("name", "attn"), EVERY_ENCODER)
def test_masses_are_golden(name: str, attn: Attn) -> None:
    golden = golden_encoder(name, attn)
    merged = tldr_compile.apply(golden.model, (golden.video,), schedule=golden.schedule)
    last = inspect(merged, golden.video)[-1]
    held = torch.zeros_like(golden.mass[..., 0]).scatter(1, last.assign, last.mass)
    assert_golden(held.unsqueeze(-1), golden.mass)


@pytest.mark.parametrize(("name", "attn"), EVERY_ENCODER)
def test_restored_tokens_are_those_of_their_group(name: str, attn: Attn) -> None:
    golden = golden_encoder(name, attn)
    merged = tldr_compile.apply(golden.model, (golden.video,), schedule=golden.schedule)
    with torch.no_grad():
        restored, *_ = merged(golden.video)
    assign = inspect(merged, golden.video)[-1].assign
    for actual, groups, expected in zip(restored, assign, golden.merged[0], strict=True):
        assert_golden(actual, expected[groups])


def test_the_numbers_are_those_of_saliency_and_mass() -> None:
    """Each ingredient left out shows, far beyond the bound."""
    golden = golden_encoder("encoder0")
    with torch.no_grad():
        for left_out in ({"saliency": "uniform"}, {"proportional": False}, {"metric": "keys"}):
            with pytest.raises(AssertionError, match="of the largest magnitude"):
                assert_blocks(golden, applied, bound=1e-2, **left_out)
