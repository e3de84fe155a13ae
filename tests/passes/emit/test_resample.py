"""Bringing values from one resolution to another, run: merged, picked, restored."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tests.passes.grouped import RUN, B, C, H, T, emitted, grouping, resolution
from tldr_compile.passes.axes import UNIT, Axes, axis, product
from tldr_compile.passes.axes.algebra import concat
from tldr_compile.passes.emit.resample import Converter, Laid, holding
from tldr_compile.passes.plan import Conversion, How

FIRST = resolution(0)
SECOND = resolution(1, 2, parent=FIRST)
ONE = grouping()
TWO = grouping(8, 2, ONE)
STREAM = (axis(B), RUN, axis(C))


def converted(x: Tensor, axes: Axes, *conversions: Conversion) -> Tensor:
    def emit(converter: Converter, node: fx.Node) -> fx.Node:
        return converter.converted(Laid(node, axes), conversions).node

    return emitted(emit, x, {FIRST: ONE, SECOND: TWO})


def along(index: Tensor) -> Tensor:
    return index[:, :, None].expand(-1, -1, 5)


DOWN, UP = Conversion(0, RUN, None, SECOND, How.PICK), Conversion(0, RUN, SECOND, None, How.RESTORE)


def test_two_merges_are_two_steps_and_one_way_back() -> None:
    x = torch.randn(2, 12, 5)
    picked = x.gather(1, along(ONE.kept)).gather(1, along(TWO.kept))
    assert torch.equal(converted(x, STREAM, DOWN), picked)
    assign = TWO.assign.gather(1, ONE.assign)
    assert torch.equal(converted(x, STREAM, DOWN, UP), picked.gather(1, along(assign)))


def test_merging_is_the_weighted_mean_of_each_group() -> None:
    x = torch.randn(2, 12, 5)
    weights = torch.zeros(2, 8, 12)
    weights.scatter_(2, ONE.kept[:, :, None], ONE.kept_weight[:, :, None])
    for b in range(2):
        weights[b, ONE.target[b], ONE.source[b]] = ONE.source_weight[b]
    merged = converted(x, STREAM, Conversion(0, RUN, None, FIRST, How.MERGE))
    torch.testing.assert_close(merged, weights @ x)


def test_a_run_over_two_dimensions_and_beside_others_is_the_same_run() -> None:
    x = torch.randn(2, 12, 5)
    down = Conversion(0, RUN, None, FIRST, How.MERGE)
    plain = converted(x, STREAM, down)
    grid = converted(x.unflatten(1, (3, 4)), (axis(B), axis(T), axis(H), axis(C)), down)
    assert torch.equal(grid, plain[:, :, None])
    token = torch.randn(2, 1, 5)
    beside = converted(torch.cat([token, x], 1), (axis(B), concat([UNIT, RUN]), axis(C)), down)
    assert torch.equal(beside, torch.cat([token, plain], 1))


def test_a_matrix_of_pairs_is_converted_along_both() -> None:
    x = torch.randn(2, 12, 12)
    pairs = converted(x, (axis(B), RUN, RUN), Conversion(0, RUN, None, FIRST, How.PICK))
    assert torch.equal(pairs, torch.stack([x[b][ONE.kept[b]][:, ONE.kept[b]] for b in range(2)]))


def test_dimensions_that_hold_the_tokens_whole() -> None:
    assert holding((axis(B), RUN, product([RUN, C]), axis(T)), RUN) == [1, 2]
