"""What a plan costs, against what is counted by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tests.passes.grouped import resolution
from tests.tracing import canonical, named, number
from tldr_compile.passes.axes import TypedGraph, infer
from tldr_compile.passes.capture.clip import clip_inputs
from tldr_compile.passes.plan import Conversion, How, Plan, Step, cost

X = number(2, 6, 8)  # b, n, c

PRODUCTS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "linear": (lambda x: F.linear(x, number(5, 8)), 2 * 6 * 5 * 8),
    "scores": (lambda x: x @ x.mT, 2 * 6 * 6 * 8),
    "two products": (lambda x: F.scaled_dot_product_attention(x, x, x), 2 * 6 * 6 * (8 + 8)),
    "convolution": (lambda x: F.conv1d(x.mT, number(5, 8, 3)), 2 * 4 * 5 * 8 * 3),
    "transposed": (lambda x: F.conv_transpose1d(x.mT, number(8, 5, 3), stride=2), 2 * 6 * 8 * 5 * 3),
    "einsum": (lambda x: torch.einsum("bnc,dc->bnd", x, number(5, 8)), 2 * 6 * 5 * 8),
}
"""Each with how many pairs of numbers it multiplies."""


def typed(model: Callable[[Tensor], Tensor]) -> TypedGraph:
    captured = canonical(model, X)
    return infer(captured, clip_inputs(captured))


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_multiplication_and_an_addition_for_each_pair(name: str) -> None:
    model, pairs = PRODUCTS[name]
    assert cost.operations(Plan(typed(model), (), (), (), (), {})) == 2 * pairs



def test_restoring_reads_the_groups_and_writes_the_tokens() -> None:
    graph = typed(lambda x: x.exp().sin())
    (call,) = named(graph.captured.graph.graph, "sin")
    (output,) = graph.captured.graph.graph.find_nodes(op="output")
    _, tokens, _ = graph.own(call)[0]
    held = resolution(0, 2, run=tokens, batch=graph.own(call)[0][0])
    restore = Step(conversions=(Conversion(0, tokens, held, None, How.RESTORE),))

    def plan(where: dict[fx.Node, Step]) -> Plan:
        return Plan(graph, (), (), (), (), where)

    assert cost.bytes_moved(plan({call: restore})) == 4 * (2 * 4 * 8 + 2 * 6 * 8)
    assert cost.bytes_moved(plan({output: restore})) == 0  # what the user gets is no choice
    assert cost.of(plan({call: restore})) == cost.BYTE * 4 * (2 * 4 * 8 + 2 * 6 * 8)
