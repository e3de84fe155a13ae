"""What moves in a merged graph that stays in the dense one is found, and named."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tracing import captured
from tldr_compile.passes.check.independence import Run, raised

X = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(3))


def found(dense: Callable[[Tensor], Tensor], merged: Callable[[Tensor], Tensor], bound: float = 0.0) -> set[Any]:
    def run(function: Callable[[Tensor], Tensor]) -> Run:
        return lambda inputs: [function(*inputs)]

    typed: Any = SimpleNamespace(captured=captured(dense, X))
    return {(each.dim, each.at) for each in raised(typed, run(dense), run(merged), [X], bound)}


def own(x: Tensor) -> Tensor:
    return x.exp()


def test_a_graph_raises_nothing_over_itself() -> None:
    assert found(own, own) == set()


def test_samples_that_meet_are_found_at_every_index_that_is_reached() -> None:
    samples = found(own, lambda x: x.exp() + x.mean(0))
    assert {at for dim, at in samples if dim == 0} == {(0, 0), (0, 1)}
    assert all(dim == 0 for dim, _ in samples)


def test_what_the_dense_model_mixes_too_is_no_finding() -> None:
    assert found(lambda x: x.exp() + x.mean(0), lambda x: x.exp() + x.sum(0)) == set()


def test_a_bound_is_a_part_of_the_largest_magnitude() -> None:
    def slightly(x: Tensor) -> Tensor:
        return x.exp() + 1e-6 * x.mean(0)

    assert found(own, slightly)
    assert found(own, slightly, bound=1e-3) == set()


@pytest.mark.parametrize("part", ["input 'x'", "dimension 0 of output 0", "move by"])
def test_the_text_names_the_input_and_the_place(part: str) -> None:
    typed: Any = SimpleNamespace(captured=SimpleNamespace(**{**vars(captured(own, X)), "names": {}}))
    (name,) = (node.name for node in typed.captured.graph.graph.find_nodes(op="placeholder"))
    typed.captured.names[name] = "x"
    first = next(raised(typed, lambda inputs: [own(*inputs)], lambda inputs: [inputs[0] - inputs[0].mean(0)], [X]))
    assert part in str(first)
