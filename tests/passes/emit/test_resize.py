"""Sizes and offsets in arguments, once what they speak of is shorter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.passes.grouped import RUN, B, C, H, T, resolution
from tldr_compile.passes.axes import UNIT, Axes, axis
from tldr_compile.passes.axes.algebra import concat
from tldr_compile.passes.emit.resize import RESIZE, Held

aten = torch.ops.aten
N = resolution(0).axis  # 8 groups of 12 tokens
WHOLE, NOW = (axis(B), concat([UNIT, RUN, UNIT])), (axis(B), concat([UNIT, N, UNIT]))


def held(name: str, *outputs: Axes, span: tuple[int, int] | None = None, **given: Any) -> Any:
    typed = SimpleNamespace(cut=1, reads=(WHOLE,), spans=(span,))
    target = getattr(aten, name).default if name != "slice" else aten.slice.Tensor
    return RESIZE[f"aten::{name}"](Held(target, {"self": "x", **given}, typed, NOW, outputs, int))  # type: ignore[arg-type]


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 1), (13, 9), (14, 10)])
def test_offsets_move_with_the_end_of_the_run(before: int, after: int) -> None:
    typed = SimpleNamespace(cut=1, reads=(WHOLE,))
    assert Held(None, {}, typed, NOW, (), int).offset(before) == after  # type: ignore[arg-type]


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 1), (8, 4), (9, 5)])
def test_segments_that_have_become_one_count_as_one(before: int, after: int) -> None:
    """Pictures of two sizes, `t + h`, merged as one run."""
    run = concat([axis(T), axis(H)])
    whole, now = concat([UNIT, run, UNIT]), concat([UNIT, resolution(0, run=run).axis, UNIT])
    typed = SimpleNamespace(cut=0, reads=((whole,),))
    assert Held(None, {}, typed, (now,), (), int).offset(before) == after  # type: ignore[arg-type]


def test_a_slice_cuts_at_the_same_segments() -> None:
    assert held("slice", span=(1, 13)) == (aten.slice.Tensor, ("x", 1, 1, 9))
    assert held("slice", span=(13, 14)) == (aten.slice.Tensor, ("x", 1, 9, 10))


def test_a_view_has_the_lengths_that_its_result_has_now() -> None:
    assert held("view", (axis(B), N, axis(C)), size=[2, 12, 5]) == (aten.reshape.default, ("x", [2, 8, 5]))


def test_pieces_are_as_long_as_the_results_are_now() -> None:
    results = ((axis(B), concat([UNIT, N])), (axis(B), UNIT))
    assert held("split_with_sizes", *results) == (aten.split_with_sizes.default, ("x", [9, 1], 1))


def test_what_is_made_keeps_its_value_and_options() -> None:
    made = held("new_full", (axis(B), N), size=[2, 12], fill_value=7, dtype=torch.int64)
    assert made == (aten.new_full.default, ("x", [2, 8], 7), {"dtype": torch.int64})
