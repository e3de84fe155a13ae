"""What a graph asserts of the data of its inputs, taken out of it and put into a graph of its own.

An assertion reads a number out of a tensor, where a compiler breaks a graph; layers repeat theirs. Taken out, each is
asked once, before anything else runs.

bounds -- diff, all, item -- assert          bounds -- diff, all, item -- assert     (once)
x -- layer 1 -- layer 2          ->
bounds -- diff, all, item -- assert          x -- layer 1 -- layer 2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tldr_compile.passes.errors import ShapeError
from tldr_compile.passes.fx_utils import above, call_key, lazy_module
from tldr_compile.passes.sources import where

aten = torch.ops.aten

_ASSERTIONS = frozenset({aten._assert_scalar.default, aten._assert_async.msg, aten._assert_async.default})


@dataclass(frozen=True)
class Assertions:
    """What a graph asserts of its inputs, as a graph of the same inputs without outputs."""

    graph: fx.GraphModule

    @torch.compiler.disable
    def __call__(self, inputs: Sequence[Any]) -> None:
        """Raise `ShapeError` for the first that does not hold, with the line of the model; where it was captured."""
        placeholders = self.graph.graph.find_nodes(op="placeholder")
        _Asking(self.graph).run(*(_as_captured(*pair) for pair in zip(placeholders, inputs, strict=True)))


def _as_captured(placeholder: fx.Node, value: Any) -> Any:
    """An input that is read, on its device: what the graph makes by itself lies there."""
    moves = placeholder.users and isinstance(value, torch.Tensor)
    return value.to(placeholder.meta["val"].device) if moves else value


class _Asking(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except RuntimeError as reason:
            if n.target not in _ASSERTIONS:
                raise
            first, *_ = str(reason).splitlines()
            raise ShapeError(
                f"what the model asserts of its inputs does not hold for these: {where(n)}: {first}"
            ) from reason


def without_assertions(gm: fx.GraphModule) -> tuple[fx.GraphModule, Assertions | None]:
    """A graph without what it asserts of its inputs that are no floats, and that.

    The second is None where there is nothing to assert: then the first is `gm` itself.
    """
    written = _written(gm.graph)
    asked = [n for n in gm.graph.nodes if n.target in _ASSERTIONS and _of_numbers(n) and not above(n) & written]
    if not asked:
        return gm, None
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, copied)
    graph.output(result)
    for node in asked:
        graph.erase_node(copied[node])
    graph.eliminate_dead_code()
    rest = fx.GraphModule(gm, graph)
    rest.meta.update(gm.meta)
    return rest, Assertions(lazy_module(gm, _once(gm.graph, asked)))


def _written(graph: fx.Graph) -> set[fx.Node]:
    """What is written to in place, and what that is a view of: its numbers are told by more than what it is made of."""
    schemas = ((node, getattr(node.target, "_schema", None)) for node in graph.nodes)
    writes = [node for node, schema in schemas if schema is not None and schema.is_mutable and node.all_input_nodes]
    return {each for node in writes for each in above(node.all_input_nodes[0])}


def _of_numbers(node: fx.Node) -> bool:
    """Whether a node follows from inputs that are no floats alone, which no merge moves."""
    return all(_is_number(each) for each in above(node) - {node})


def _is_number(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not (isinstance(value, torch.Tensor) and value.is_floating_point())


def _once(old: fx.Graph, asked: list[fx.Node]) -> fx.Graph:
    """The assertions and what they ask of; equal calls are one."""
    needed = set(asked).union(*map(above, asked))
    graph, copied, found = fx.Graph(), dict[fx.Node, fx.Node](), dict[Any, fx.Node]()
    for node in old.nodes:
        if node.op == "placeholder":
            copied[node] = graph.node_copy(node)
        elif node in needed:
            asks = (node.args[:1], {}) if node.target in _ASSERTIONS else (node.args, node.kwargs)  # the rest is text
            key = (node.target, call_key(asks, copied.__getitem__))
            if node.op == "get_attr" or key not in found:
                found[key] = graph.node_copy(node, copied.__getitem__)
            copied[node] = found[key]
    graph.output(())
    return graph
