"""Walk a graph with the rule table: a type for every value, without touching the graph.

video [2, 3, 16, 224, 224]            b x 3 x t x H x W
  conv3d  [2, 768, 8, 14, 14]         b x 768 x t x h x w
  view    [2, 768, 1568]       ->     b x 768 x t·h·w
  ...                                 ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from passes.axes import BORN, CONSTANT, UNIT, Atom, Axes, Conflict, Substitution, axis
from passes.canonicalize import Captured
from passes.errors import OptionError
from passes.nodes import named, operands, operator_name, size, tensors
from passes.rules import TABLE, Call, Operand, Typed, unknown


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: its axes; whether it varies with the inputs; whether it descends from the clip."""

    axes: Axes
    varies: bool
    clip: bool
    floating: bool


@dataclass(frozen=True)
class TypedGraph:
    """Types of all values of a graph and of all calls in it, by node."""

    captured: Captured
    values: Mapping[fx.Node, tuple[Value, ...]]
    calls: Mapping[fx.Node, Typed]
    conflicts: Mapping[fx.Node, str]

    def value(self, node: fx.Node) -> Value:
        return self.values[node][0]

    def operands(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The tensor operands of a call, as its rule numbers them."""
        return tuple(operands(node))


def clip_inputs(captured: Captured, clip: str | Sequence[str] = "auto") -> frozenset[str]:
    """Names of the placeholders that carry the video: the floating-point inputs of the highest rank, 3 or more.

    Raises:
        OptionError: a name in `clip` is no input of the graph.
    """
    inputs = {
        node.name: captured.names.get(node.name, node.name)
        for node in captured.graph.graph.find_nodes(op="placeholder")
        if node.name not in captured.constants and isinstance(node.meta.get("val"), torch.Tensor)
    }
    if clip != "auto":
        wanted = (clip,) if isinstance(clip, str) else clip
        if unfound := [name for name in wanted if name not in inputs.values() and name not in inputs]:
            raise OptionError(
                f"clip={unfound[0]!r} is no tensor input of the model; they are {sorted(inputs.values())}"
            )
        return frozenset(node for node, name in inputs.items() if name in wanted or node in wanted)
    ranks = {
        node.name: node.meta["val"].ndim
        for node in captured.graph.graph.find_nodes(op="placeholder")
        if node.name in inputs and node.meta["val"].is_floating_point()
    }
    highest = max(ranks.values(), default=0)
    return frozenset(name for name, rank in ranks.items() if rank == highest and rank >= 3)


def infer(captured: Captured, clip: str | Sequence[str] = "auto") -> TypedGraph:
    """Type every value of a graph. Operators without a rule, or whose equations conflict, bear new dimensions."""
    clips = clip_inputs(captured, clip)
    values: dict[fx.Node, tuple[Value, ...]] = {}
    calls: dict[fx.Node, Typed] = {}
    conflicts: dict[fx.Node, str] = {}
    solved = Substitution()
    for node in captured.graph.graph.nodes:
        produced = tensors(node)
        if node.op == "placeholder" or node.op == "get_attr":
            constant = node.op == "get_attr" or node.name in captured.constants
            values[node] = tuple(_born(each, constant, node.name in clips) for each in produced)
        elif node.op == "call_function" and node.target.__name__ == "getitem" and node.args[0] in values:
            values[node] = (values[node.args[0]][node.args[1]],)
        elif node.op == "call_function" and (produced or tuple(operands(node))):
            call = _call(node, values, solved)
            try:
                typed = TABLE.get(call.name, unknown)(call)
                solved = call.solved
            except Conflict as conflict:
                conflicts[node] = str(conflict)
                typed = unknown(replace(call, solved=solved, uses=[]))
            calls[node] = typed
            varies, descends = any(o.varies for o in call.operands), call.clip
            values[node] = tuple(
                Value(axes, varies, descends, each.is_floating_point())
                for axes, each in zip(typed.outputs, produced, strict=True)
            )
    return TypedGraph(
        captured,
        {node: tuple(replace(v, axes=_resolved(solved, v.axes)) for v in each) for node, each in values.items()},
        {node: _resolve_call(solved, typed) for node, typed in calls.items()},
        conflicts,
    )


def _born(tensor: torch.Tensor, constant: bool, clip: bool) -> Value:
    rank = tensor.ndim
    labels = ["b", *"t" * (rank - 3), "H", "W"] if rank > 3 else ["b", "n", "c"][:rank]
    strength = CONSTANT if constant else BORN
    axes = tuple(
        UNIT if size(s) == 1 else axis(Atom(size(s), label if clip else "", clip, strength))
        for s, label in zip(tensor.shape, labels, strict=True)
    )
    return Value(axes, not constant, clip, tensor.is_floating_point())


def _call(node: fx.Node, values: Mapping[fx.Node, tuple[Value, ...]], solved: Substitution) -> Call:
    typed: list[Operand] = []

    def convert(argument: Any) -> Any:
        if isinstance(argument, (tuple, list)):
            return [convert(each) for each in argument]
        if not isinstance(argument, fx.Node):
            return argument
        if not isinstance(argument.meta.get("val"), torch.Tensor):
            value = argument.meta.get("val")
            return size(value) if isinstance(value, (int, torch.SymInt)) else argument
        value = values[argument][0]
        operand = Operand(len(typed), _resolved(solved, value.axes), value.varies, value.clip)
        typed.append(operand)
        return operand

    given = {name: convert(argument) for name, argument in named(node).items()}
    sizes = tuple(tuple(size(s) for s in each.shape) for each in tensors(node))
    return Call(operator_name(node), given, tuple(typed), sizes, solved)


def _resolved(solved: Substitution, axes: Axes) -> Axes:
    return tuple(solved.resolve(each) for each in axes)


def _resolve_call(solved: Substitution, typed: Typed) -> Typed:
    return replace(
        typed,
        outputs=tuple(_resolved(solved, each) for each in typed.outputs),
        reads=tuple(_resolved(solved, each) for each in typed.reads),
    )
