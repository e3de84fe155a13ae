"""Walk a graph with the rule table: a type for every value, without touching the graph.

video [2, 3, 16, 224, 224]            b x 3 x t x H x W
  conv3d  [2, 768, 8, 14, 14]         b x 768 x t x h x w
  view    [2, 768, 1568]       ->     b x 768 x t·h·w
  ...                                 ...
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import torch
from torch import fx

from tldr_compile.passes.axes.algebra import (
    BORN,
    CONSTANT,
    PICTURE,
    PIXEL,
    Atom,
    Axes,
    Axis,
    Conflict,
    Role,
    Substitution,
    axis,
    born,
    concat,
    subaxis,
)
from tldr_compile.passes.axes.rules import TABLE, Call, Operand, Typed, unknown
from tldr_compile.passes.capture import Captured
from tldr_compile.passes.errors import OptionError
from tldr_compile.passes.fx_utils import named, operands, operator_name, tensors
from tldr_compile.passes.sizes import Size, simplify, size

PLACES = PICTURE | {Role.TIME}


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: its axes; whether it varies with the inputs; whether it descends from the clip."""

    axes: Axes
    varies: bool
    clip: bool
    floating: bool


@dataclass(frozen=True)
class TypedGraph:
    """Types of all values of a graph and of all calls in it, by node; `mixed` are atoms along which parameters mix.

    A constant's own dimensions are anonymous; what they stand for in a call is told by the call (`own`).
    """

    captured: Captured
    values: Mapping[fx.Node, tuple[Value, ...]]
    calls: Mapping[fx.Node, Typed]
    conflicts: Mapping[fx.Node, str]
    mixed: frozenset[Atom] = frozenset()

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
                own=tuple(_resolved(solved, each) for each in call.own),
            )
            for node, call in self.calls.items()
        }
        mixed = frozenset(atom for each in self.mixed for atom in solved.resolve(axis(each)).atoms)
        return replace(self, values=values, calls=calls, mixed=mixed)

    def own(self, node: fx.Node) -> tuple[Axes, ...]:
        """The axes of a call's tensor operands, as they enter it; of an output's, the values' own."""
        call = self.calls.get(node)
        return call.own if call else tuple(self.value(each).axes for each in operands(node))

    def typed_again(self, node: fx.Node, own: Sequence[Axes]) -> tuple[tuple[Axes, ...], Substitution]:
        """A call's outputs if its operands had other axes, and what its equations then say."""
        feed = iter(
            Operand(k, axes, self.value(each).varies, self.value(each).clip)
            for k, (axes, each) in enumerate(zip(own, self.operands(node), strict=True))
        )
        call = _asked(node, lambda _: next(feed), Substitution(), [], [])
        typed = TABLE.get(call.name, unknown)(call)
        return tuple(_resolved(call.solved, each) for each in typed.outputs), call.solved

    def operands(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The tensor operands of a call, as its rule numbers them."""
        return tuple(operands(node))


def infer(captured: Captured, clips: frozenset[str], queries: Sequence[fx.Node] = (), protect: int = 0) -> TypedGraph:
    """Type every value of a graph. Operators without a rule, or whose equations conflict, bear new dimensions.

    The equations are posed in a first walk; in a second one every rule sees them solved. `clips` names the placeholders
    that carry the video; `queries [..., N, d]` are those of attentions, whose tokens are no channels. `protect` takes
    so many leading tokens of them out of the clip, wherever that splits no product of atoms.
    """
    walk = _Walk(captured, clips)
    first = walk.run(Substitution())
    attended = [_resolved(walk.solved, first.value(each).axes[:-1]) for each in queries]
    solved = walk.solved if walk.pictured(attended) else _patches(walk.solved, attended)
    solved = _carrying(_sequence_first(solved, walk.rows, attended), walk.channels, attended)
    tokens = [axes[-1] for axes in attended if protect and not _over_time(walk.solved.resolve(axes[-1]))]
    try:
        return walk.run(_protecting(solved, tokens, protect)).resolved(walk.solved)
    except Conflict as reason:
        raise OptionError(
            f"protect={protect} takes tokens apart that belong together at another attention: {reason}"
        ) from reason


class _Walk:
    """Applies the rule table to a graph from front to back; typed again, every dimension is born the same."""

    def __init__(self, captured: Captured, clips: frozenset[str]) -> None:
        self.captured, self.clips = captured, clips
        self.births: dict[fx.Node, list[Atom]] = {}
        self.born: dict[tuple[fx.Node, int], Axes] = {}
        self.channels: list[Atom] = []
        self.solved = Substitution()

    @property
    def rows(self) -> frozenset[Axis]:
        """The first dimensions of inputs of rank 3."""
        return frozenset(axes[0] for axes in self.born.values() if len(axes) == 3)

    def pictured(self, attended: Iterable[Axes]) -> bool:
        """Whether there are places of a picture anywhere, or no pixels to have them."""
        pixels = any(len(axes) > 3 and node.name in self.clips for (node, _), axes in self.born.items())
        places = any(atom.role in PICTURE and atom.size != 1 for births in self.births.values() for atom in births)
        seen = (atom for axes in attended for each in axes for atom in self.solved.resolve(each).atoms)
        return not pixels or places or any(atom.clip and atom.role in PICTURE for atom in seen)

    def run(self, solved: Substitution) -> TypedGraph:
        """The graph with its axes as they were when each call was typed; `self.solved` says what they became."""
        self.solved = solved
        values: dict[fx.Node, tuple[Value, ...]] = {}
        calls: dict[fx.Node, Typed] = {}
        conflicts: dict[fx.Node, str] = {}
        for node in self.captured.graph.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                values[node] = tuple(self._input(node, each) for each in tensors(node))
            elif node.op == "call_function" and node.target is getitem and node.args[0] in values:
                values[node] = (values[node.args[0]][node.args[1]],)
            elif node.op == "call_function" and (tensors(node) or tuple(operands(node))):
                if any(values[each][0].varies for each in operands(node)):
                    call = self._call(node, values)
                    calls[node] = self._typed(node, call, conflicts)
                    values[node] = _results(node, call, calls[node])
                else:
                    values[node] = tuple(self._constant(node, k, each) for k, each in enumerate(tensors(node)))
        mixed = frozenset(each for each in self.channels if not each.clip)
        return TypedGraph(self.captured, values, calls, conflicts, mixed)

    def _input(self, node: fx.Node, tensor: torch.Tensor) -> Value:
        if node.op == "get_attr" or node.name in self.captured.constants:
            return self._constant(node, 0, tensor)
        clip = node.name in self.clips
        if (node, 0) not in self.born:
            self.born[node, 0] = _input_axes(tensor, clip)
        return Value(self.born[node, 0], True, clip, tensor.is_floating_point())

    def _constant(self, node: fx.Node, number: int, tensor: torch.Tensor) -> Value:
        return Value(self._anonymous(node, number, tensor), False, False, tensor.is_floating_point())

    def _anonymous(self, node: fx.Node, number: int, tensor: torch.Tensor) -> Axes:
        """Dimensions of which nothing is known but the size; the same ones in both walks."""
        if (node, number) not in self.born:
            self.born[node, number] = tuple(born(Atom(size(each), strength=CONSTANT)) for each in tensor.shape)
        return self.born[node, number]

    def _call(self, node: fx.Node, values: Mapping[fx.Node, tuple[Value, ...]]) -> Call:
        numbers = itertools.count()

        def operand(argument: fx.Node) -> Operand:
            value, number = values[argument][0], next(numbers)
            axes = value.axes if value.varies else self._anonymous(node, -1 - number, argument.meta["val"])
            return Operand(number, _resolved(self.solved, axes), value.varies, value.clip)

        return _asked(node, operand, self.solved, self.births.setdefault(node, []), self.channels)

    def _typed(self, node: fx.Node, call: Call, conflicts: dict[fx.Node, str]) -> Typed:
        try:
            typed = TABLE.get(call.name, unknown)(call)
        except Conflict as conflict:
            conflicts[node] = str(conflict)
            return unknown(replace(call, solved=self.solved, uses=[], births=self.births.setdefault(node, [])))
        self.solved = call.solved
        return typed


def _asked(
    node: fx.Node,
    operand: Callable[[fx.Node], Operand],
    solved: Substitution,
    births: list[Atom],
    channels: list[Atom],
) -> Call:
    """A call as its rule sees it; `operand` types its tensor operands, in order."""
    typed: list[Operand] = []

    def convert(argument: Any) -> Any:
        if isinstance(argument, (tuple, list)):
            return [convert(each) for each in argument]
        if not isinstance(argument, fx.Node):
            return argument
        traced = argument.meta.get("val")
        if not isinstance(traced, torch.Tensor):
            return size(traced) if isinstance(traced, (int, torch.SymInt)) else argument
        typed.append(operand(argument))
        return typed[-1]

    given = {name: convert(argument) for name, argument in named(node).items()}
    sizes = tuple(tuple(size(s) for s in each.shape) for each in tensors(node))
    return Call(operator_name(node), given, tuple(typed), sizes, solved, births, channels=channels)


def _results(node: fx.Node, call: Call, typed: Typed) -> tuple[Value, ...]:
    varies = any(operand.varies for operand in call.operands)
    pairs = zip(typed.outputs, tensors(node), strict=True)
    return tuple(Value(axes, varies, call.clip, each.is_floating_point()) for axes, each in pairs)


def _patches(solved: Substitution, attended: Iterable[Axes]) -> Substitution:
    """Pictures that are each embedded whole are patches, in one row: what is attended along are tokens, no samples.

    All of a dimension of time are frames; of patches in its place a part attends, those of one picture.
    """
    for *batch, tokens in attended:
        parts = {atom for each in batch for atom in solved.resolve(each).atoms if atom.role is Role.TIME}
        for atom in solved.resolve(tokens).atoms:
            row = atom.role in (Role.SAMPLE, Role.FOLDED) or (atom.role is Role.TIME and parts)
            if atom.clip and row:
                solved = solved.assign(atom, axis(replace(atom, role=Role.TOKEN)))
    return solved


def _sequence_first(solved: Substitution, rows: Collection[Axis], attended: Iterable[Axes]) -> Substitution:
    """An input of rank 3 may be `[n, b, c]`: then what came first is attended along, alone in its segment."""
    for *_, tokens in attended:
        for segment in solved.resolve(tokens).segments:
            lone = Axis((segment,)).lone
            if lone and lone.role is Role.SAMPLE and Axis((segment,)) in rows:
                solved = solved.bind(lone, axis(replace(lone, role=Role.TOKEN)))
    return solved


def _carrying(solved: Substitution, mixed: Iterable[Atom], attended: Sequence[Axes]) -> Substitution:
    """What parameters mix along, and no attention attends along, is what tokens carry: it is no dimension of the clip.

    Samples are never mixed by a parameter; so they stay, wherever they lie. Heads are parts of what is mixed.
    """
    tokens = {atom for axes in attended for atom in solved.resolve(axes[-1]).atoms if atom.clip}
    batch = {atom for axes in attended for each in axes[:-1] for atom in solved.resolve(each).atoms if atom.clip}
    for each in mixed if tokens else ():
        carried = solved.resolve(axis(each))
        for atom in carried.atoms - tokens - (batch if carried.lone else set()):
            if atom.clip:
                solved = solved.assign(atom, born(Atom(atom.size, strength=BORN, role=Role.CHANNEL)))
    return solved


def _protecting(solved: Substitution, tokens: Iterable[Axis], count: int) -> Substitution:
    for each in tokens:
        lead: Size = 0
        for segment in solved.resolve(each).segments:
            part = subaxis([segment])
            if part.clip and part.lone and isinstance(lead, int) and lead < count:
                solved = solved.assign(part.lone, _split(part.lone, _at_most(count - lead, part.size)))
            if part.clip:
                break
            lead = simplify(lead + part.size)
    return solved


def _over_time(tokens: Axis) -> bool:
    """Whether an attention runs over frames at one place, where no token leads."""
    roles = {atom.role for atom in tokens.atoms if atom.clip}
    return bool(roles) and roles <= {Role.TIME, Role.FOLDED}


def _split(atom: Atom, count: int) -> Axis:
    """A protected part of `count` and the rest of the atom."""
    left = simplify(atom.size - count)
    first = born(Atom(count, strength=BORN))
    return concat([first, axis(replace(atom, size=left))]) if left != 0 else first


def _at_most(count: int, size: Size) -> int:
    return min(count, size) if isinstance(size, int) else count


def _input_axes(tensor: torch.Tensor, clip: bool) -> Axes:
    """The dimensions of an input by the custom of its rank: video, tokens of samples, or one row of tokens."""
    rank = tensor.ndim
    places = [("b", Role.SAMPLE), *[("t", Role.TIME)] * (rank - 3), ("H", Role.HEIGHT), ("W", Role.WIDTH)]
    tokens = [("b", Role.SAMPLE), ("p" if rank == 2 else "n", Role.TOKEN), ("c", Role.CHANNEL)]
    told = places if rank > 3 else tokens[-rank:] if rank in (2, 3) else tokens[:rank]
    return tuple(
        born(Atom(size(s), label if clip else "", clip, PIXEL if role in PLACES else BORN, role))
        for s, (label, role) in zip(tensor.shape, told, strict=True)
    )


def _resolved(solved: Substitution, axes: Axes) -> Axes:
    return tuple(solved.resolve(each) for each in axes)
