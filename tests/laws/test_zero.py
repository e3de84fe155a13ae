"""A schedule of zeros hands on the graph as it was, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils._pytree import tree_leaves

import tldr_compile
from tests.laws.support import captured, compiled, every_case, every_family, graphs_for_inductor, merge, program
from tests.zoo import Case, case
from tldr_compile.backend import tldr

ZEROS = [(), (0,), (0.0, 0), 0.0]


def assert_identical(actual: Any, expected: Any) -> None:
    for one, two in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert torch.equal(one, two) if isinstance(two, torch.Tensor) else one == two


@pytest.mark.parametrize("zeros", ZEROS, ids=str)
@every_case
def test_the_captured_graph_itself_is_handed_on(case: Case, zeros: Any) -> None:
    merged = merge(case, schedule=zeros)
    assert merged.graph is captured(case, 2).graph
    assert not merged.plan.merges
    assert len(merged.plan.sites) >= 3


@every_case
def test_the_captured_graph_is_not_touched_by_merging(case: Case) -> None:
    before = captured(case, 2).graph.print_readable(print_output=False)
    assert merge(case).graph is not captured(case, 2).graph
    assert captured(case, 2).graph.print_readable(print_output=False) == before


@every_case
def test_apply_computes_what_the_model_computes(case: Case) -> None:
    model, inputs = case.build(), case.inputs()
    with torch.no_grad():
        assert_identical(tldr_compile.apply(program(case, 2), schedule=0.0)(*inputs), model(*inputs))


@pytest.mark.parametrize("zeros", ZEROS, ids=str)
def test_inductor_gets_the_graph_of_dynamo(zeros: Any) -> None:
    assert_handed_on(case("umt"), zeros)


@every_family
def test_inductor_gets_the_graph_of_dynamo_for_every_model(case: Case) -> None:
    assert_handed_on(case, (0, 0))


def assert_handed_on(case: Case, zeros: Any) -> None:
    model, inputs = case.build(), case.inputs()
    given: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        given.append(graph)
        return tldr(graph, example_inputs, options={"schedule": zeros})

    with graphs_for_inductor() as reached, torch.no_grad():
        outputs = torch.compile(model, backend=backend)(*inputs)
    assert len(given) >= 1
    assert [id(graph) for graph in reached] == [id(graph) for graph in given]
    with torch.no_grad():
        assert_identical(outputs, model(*inputs))


def test_compiled_is_what_inductor_alone_compiles() -> None:
    model, inputs = case("umt").build(), case("umt").inputs()
    with torch.no_grad():
        merged = compiled(model, schedule=[0])(*inputs)
        torch.compiler.reset()
        plain = torch.compile(model, backend="inductor")(*inputs)
    assert_identical(merged, plain)
