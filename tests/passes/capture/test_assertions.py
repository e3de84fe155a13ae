"""What a graph asserts of its inputs is asked once, before it runs, and by nobody else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import tldr_compile
from tldr_compile import ShapeError
from tldr_compile.passes.capture import from_export

WIDTH, FRAMES, TOKENS = 8, 2, 12


class Asking(nn.Module):
    """Every layer asks whether all segments are of one length."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(6, WIDTH)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True) for _ in range(3))

    def forward(self, rows: Tensor, bounds: Tensor) -> Tensor:
        x = self.embed(rows).reshape(FRAMES, -1, WIDTH)
        for layer in self.layers:
            lengths = bounds.diff()
            torch._check((lengths == lengths[0]).all().item())
            x = layer(x)
        return x


ROWS, BOUNDS = torch.randn(FRAMES * TOKENS, 6), torch.arange(FRAMES + 1) * TOKENS


def asserting(graph: Any) -> list[str]:
    return [node.name for node in graph.graph.nodes if "assert" in str(node.target)]


def merged() -> tldr_compile.MergedModule:
    return tldr_compile.apply(Asking().train(), (ROWS, BOUNDS), schedule=0.2)


def test_equal_assertions_are_asked_once() -> None:
    program = torch.export.export(Asking().train(), (ROWS, BOUNDS))
    captured = from_export(program)
    assert captured.assertions is not None
    assert len(asserting(program)) == 3 * len(asserting(captured.assertions.graph)) > 0
    for graph in (captured.graph, merged().graph_module):
        assert asserting(graph) == []
        assert not any("item" in str(node.target).split(".") for node in graph.graph.nodes)


def test_a_graph_may_assert_nothing() -> None:
    assert from_export(torch.export.export(nn.Linear(3, 3), (torch.randn(2, 3),))).assertions is None


def test_what_does_not_hold_is_told_before_anything_runs() -> None:
    found = merged()
    found(ROWS, BOUNDS)
    with pytest.raises(ShapeError, match=r"does not hold for these: .*test_assertions.py"):
        found(ROWS, torch.tensor([0, 5, 24]))


def test_what_follows_from_floats_stays_where_it_is() -> None:
    """A merge may move it: it is asked of the values that there are."""

    class Finite(Asking):
        def forward(self, rows: Tensor, bounds: Tensor) -> Tensor:
            x = super().forward(rows, bounds)
            torch._assert_async(x.isfinite().all(), "finite")
            return x

    found = tldr_compile.apply(Finite().train(), (ROWS, BOUNDS), schedule=0.2)
    assert len(asserting(found.graph_module)) > 0


def test_a_compiled_module_is_one_graph() -> None:
    torch._dynamo.reset()
    found, counter = merged(), CompileCounter()
    compiled = torch.compile(found, backend=counter)
    assert torch.allclose(compiled(ROWS, BOUNDS), found(ROWS, BOUNDS), atol=1e-6)
    assert counter.frame_count == 1


def test_what_is_asked_of_a_table_that_is_filled_in_place_stays_where_it_is() -> None:
    """Its numbers are not what it was made of."""

    class Filled(Asking):
        def forward(self, rows: Tensor, bounds: Tensor) -> Tensor:
            sizes = torch.zeros(2, dtype=torch.int64)
            sizes[0], sizes[1] = FRAMES, TOKENS
            torch._check((sizes.prod() == rows.shape[0]).item())
            return super().forward(rows, bounds)

    found = tldr_compile.apply(Filled().train(), (ROWS, BOUNDS), schedule=0.2)
    assert torch.allclose(found(ROWS, BOUNDS), merged()(ROWS, BOUNDS), atol=1e-6)
