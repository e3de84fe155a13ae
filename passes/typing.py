"""Walk a graph with the rule table: a type for every value, without touching the graph.

video [2, 3, 16, 224, 224]            b x 3 x t x H x W
  conv3d  [2, 768, 8, 14, 14]         b x 768 x t x h x w
  view    [2, 768, 1568]       ->     b x 768 x t·h·w
  ...                                 ...
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import torch
from torch import fx

from passes.attention import Attention
from passes.axes import (
    BORN,
    CONSTANT,
    Atom,
    Axes,
    Axis,
    Conflict,
    Size,
    Substitution,
    axis,
    born,
    concat,
    simplify,
    subaxis,
)
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

    def resolved(self, solved: Substitution) -> TypedGraph:
        """The same graph with all its axes resolved."""
        values = {
            node: tuple(replace(value, axes=_resolved(solved, value.axes)) for value in each)
            for node, each in self.values.items()
        }
        calls = {
            node: replace(
                call,
                outputs=tuple(_resolved(solved, each) for each in call.outputs),
                reads=tuple(_resolved(solved, each) for each in call.reads),
            )
            for node, call in self.calls.items()
        }
        return replace(self, values=values, calls=calls)

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
    placeholders = [node for node in captured.graph.graph.find_nodes(op="placeholder") if node.name in inputs]
    ranks = {node.name: node.meta["val"].ndim for node in placeholders if node.meta["val"].is_floating_point()}
    if not any(rank >= 3 for rank in ranks.values()):  # pixels as they come from a decoder
        ranks = {node.name: node.meta["val"].ndim for node in placeholders if node.meta["val"].ndim >= 4}
    highest = max(ranks.values(), default=0)
    return frozenset(name for name, rank in ranks.items() if rank == highest and rank >= 3)


def infer(
    captured: Captured,
    clip: str | Sequence[str] = "auto",
    attentions: Sequence[Attention] = (),
    protect: int = 0,
) -> TypedGraph:
    """Type every value of a graph. Operators without a rule, or whose equations conflict, bear new dimensions.

    The equations are posed in a first walk; in a second one every rule sees them solved. `protect` takes so many
    leading tokens of the attentions out of the clip, wherever that splits no product of atoms.
    """
    walk = _Walk(captured, clip_inputs(captured, clip))
    first = walk.run(Substitution())
    attended = [first.value(each.queries).axes[:-1] for each in attentions]
    solved = _carrying(walk.solved, walk.inputs.values(), attended)
    tokens = [axes[-1] for axes in attended] if protect else []
    try:
        return walk.run(_protecting(solved, tokens, protect))
    except Conflict as reason:
        raise OptionError(
            f"protect={protect} takes tokens apart that belong together at another attention: {reason}"
        ) from reason


class _Walk:
    """Applies the rule table to a graph from front to back; typed again, every dimension is born the same."""

    def __init__(self, captured: Captured, clips: frozenset[str]) -> None:
        self.captured, self.clips = captured, clips
        self.births: dict[fx.Node, list[Atom]] = {}
        self.inputs: dict[fx.Node, tuple[Value, ...]] = {}
        self.solved = Substitution()

    def run(self, solved: Substitution) -> TypedGraph:
        self.solved = solved
        values: dict[fx.Node, tuple[Value, ...]] = {}
        calls: dict[fx.Node, Typed] = {}
        conflicts: dict[fx.Node, str] = {}
        for node in self.captured.graph.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                values[node] = self._input(node)
            elif node.op == "call_function" and node.target is getitem and node.args[0] in values:
                values[node] = (values[node.args[0]][node.args[1]],)
            elif node.op == "call_function" and (tensors(node) or tuple(operands(node))):
                call = _call(node, values, self.solved, self.births.setdefault(node, []))
                calls[node] = self._typed(node, call, conflicts)
                values[node] = _results(node, call, calls[node])
        return TypedGraph(self.captured, values, calls, conflicts).resolved(self.solved)

    def _input(self, node: fx.Node) -> tuple[Value, ...]:
        if node not in self.inputs:
            constant = node.op == "get_attr" or node.name in self.captured.constants
            self.inputs[node] = tuple(_born(each, constant, node.name in self.clips) for each in tensors(node))
        return self.inputs[node]

    def _typed(self, node: fx.Node, call: Call, conflicts: dict[fx.Node, str]) -> Typed:
        try:
            typed = TABLE.get(call.name, unknown)(call)
        except Conflict as conflict:
            conflicts[node] = str(conflict)
            return unknown(replace(call, solved=self.solved, uses=[], births=self.births.setdefault(node, [])))
        self.solved = call.solved
        return typed


def _results(node: fx.Node, call: Call, typed: Typed) -> tuple[Value, ...]:
    varies = any(operand.varies for operand in call.operands)
    pairs = zip(typed.outputs, tensors(node), strict=True)
    return tuple(Value(axes, varies, call.clip, each.is_floating_point()) for axes, each in pairs)


def _carrying(solved: Substitution, inputs: Iterable[tuple[Value, ...]], attended: Iterable[Axes]) -> Substitution:
    """Of an input such as `[b, n, c]`, samples apart, what no attention attends along is what tokens carry."""
    tokens = {atom for axes in attended for axis in axes for atom in solved.resolve(axis).atoms if atom.clip}
    for (value,) in (each for each in inputs if len(each) == 1 and len(each[0].axes) >= 3):
        for each in value.axes[1:] if value.clip and tokens else ():
            for atom in solved.resolve(each).atoms - tokens:
                solved = solved.bind(atom, born(Atom(atom.size, strength=BORN)))
    return solved


def _protecting(solved: Substitution, tokens: Iterable[Axis], count: int) -> Substitution:
    for each in tokens:
        lead: Size = 0
        for segment in solved.resolve(each).segments:
            part = subaxis([segment])
            if part.clip and part.lone and isinstance(lead, int) and lead < count:
                solved = solved.bind(part.lone, _split(part.lone, _at_most(count - lead, part.size)))
            if part.clip:
                break
            lead = simplify(lead + part.size)
    return solved


def _split(atom: Atom, count: int) -> Axis:
    """A protected part of `count` and the rest of the atom."""
    left = simplify(atom.size - count)
    first = born(Atom(count, strength=BORN))
    return concat([first, axis(Atom(left, atom.label, atom.clip, atom.strength))]) if left != 0 else first


def _at_most(count: int, size: Size) -> int:
    return min(count, size) if isinstance(size, int) else count


def _born(tensor: torch.Tensor, constant: bool, clip: bool) -> Value:
    rank = tensor.ndim
    labels = ["b", *"t" * (rank - 3), "H", "W"] if rank > 3 else ["b", "n", "c"][:rank]
    strength = CONSTANT if constant else BORN
    axes = tuple(
        born(Atom(size(s), label if clip else "", clip, strength))
        for s, label in zip(tensor.shape, labels, strict=True)
    )
    return Value(axes, not constant, clip, tensor.is_floating_point())


def _call(node: fx.Node, values: Mapping[fx.Node, tuple[Value, ...]], solved: Substitution, births: list[Atom]) -> Call:
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
    return Call(operator_name(node), given, tuple(typed), sizes, solved, births)


def _resolved(solved: Substitution, axes: Axes) -> Axes:
    return tuple(solved.resolve(each) for each in axes)
