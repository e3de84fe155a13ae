"""The backend and `apply` on a module, its export and its other traces give the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

import tldr_compile
from tests.laws.support import assert_same, compiled, every_case, every_family, graphs_for_inductor, program, tensors
from tests.zoo import CASES, Attn, Case, case


@cache
def merged(case: Case) -> Any:
    """The outputs of `apply` on the export."""
    return tldr_compile.apply(program(case, 2), schedule=case.schedule)(*case.inputs())


@every_case
@torch.no_grad()
def test_the_backend_is_a_twin(case: Case) -> None:
    with graphs_for_inductor() as graphs:
        assert_same(compiled(case.build(), schedule=case.schedule)(*case.inputs()), merged(case))
    assert len(graphs) == 1


@every_family
@torch.no_grad()
def test_the_module_is_a_twin_of_its_export(case: Case) -> None:
    model, inputs = case.build(), case.inputs()
    assert_same(tldr_compile.apply(model, inputs, schedule=case.schedule)(*inputs), merged(case))


@every_case
@torch.no_grad()
def test_the_graph_of_make_fx_is_a_twin(case: Case) -> None:
    assert_traced_is_a_twin(case, pre_dispatch=True)


@pytest.mark.parametrize("case", [case for case in CASES if case.attn == "sdpa"], ids=str)
@torch.no_grad()
def test_the_graph_below_the_dispatcher_is_a_twin(case: Case) -> None:
    """Of kernels: what `make_fx` traces where it is not told otherwise."""
    assert_traced_is_a_twin(case, pre_dispatch=False)


def assert_traced_is_a_twin(case: Case, pre_dispatch: bool) -> None:
    model, inputs = case.build(), case.inputs()
    graph = make_fx(lambda *args: tensors(model(*args)), pre_dispatch=pre_dispatch)(*inputs)
    assert isinstance(graph, fx.GraphModule)
    outputs = tldr_compile.apply(graph, inputs, schedule=case.schedule)(*inputs)
    assert_same(tensors(outputs), tensors(merged(case)))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@torch.no_grad()
def test_the_symbolic_trace_is_a_twin(attn: Attn) -> None:
    """Of the zoo only the UMT encoder can be traced so: the others branch on shapes or unpack their inputs."""
    umt = case("umt", attn)
    graph = fx.symbolic_trace(umt.build())
    assert_same(tldr_compile.apply(graph, umt.inputs(), schedule=umt.schedule)(*umt.inputs()), merged(umt))


@pytest.mark.parametrize("case", [case(name) for name in ("vivit", "clip", "umt")], ids=str)
@torch.no_grad()
def test_the_graph_of_dynamo_is_a_twin(case: Case) -> None:
    """Its parameters are inputs like any other: the clip has to be named, and any of them may hide frames.

    Of three families, the one of pictures among them; that the backend is a twin says the same of every model.
    """
    (video,) = case.inputs()
    taken: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        taken.append((graph, inputs))
        return graph.forward

    torch.compile(case.build(), backend=backend)(video)
    ((graph, inputs),) = taken
    names = [node.name for node in graph.graph.find_nodes(op="placeholder")]
    (clip,) = (name for name, value in zip(names, inputs, strict=True) if value is video)
    finest: dict[str, Any] = {"schedule": case.schedule, "grouping": "each"}
    outputs = tldr_compile.apply(graph, tuple(inputs), clip=clip, **finest)(*inputs)
    assert_same(tensors(outputs), tensors(tldr_compile.apply(case.build(), (video,), **finest)(video)))
