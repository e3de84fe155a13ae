"""The residual stream behind an attention: where its step ends, what it began with, and what was added since the last.

    x ---------------------> add -> norm -> ...     `residual`: past the norm, past parallel branches; with it `x`
     \\-> norm -> attention --^
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import torch
from torch import fx

from tldr_compile.passes.axes import Atom, Axes, Axis, Segment, TypedGraph, subaxis
from tldr_compile.passes.capture import Attention

aten = torch.ops.aten

_ADDITIONS = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.addcmul.default, aten.lerp.Tensor, aten.lerp.Scalar})
_NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default})
_THROUGH = frozenset({aten.clone.default, aten._to_copy.default})
_SCALINGS = frozenset({aten.mul.Tensor, aten.div.Tensor})


def maximal_runs(axis: Axis) -> list[Axis]:
    """The maximal runs of segments that were born from the clip: `h·w` of `1 + h·w`, and of `t·(1 + h·w)`."""
    runs: list[list[Segment]] = [[]]
    for segment in axis.segments:
        if segment and all(isinstance(f, Atom) and f.clip for f in segment):
            runs[-1].append(segment)
            continue
        inner = [run for f in segment if isinstance(f, Axis) for run in maximal_runs(f)]
        runs += [*([*run.segments] for run in inner), []]
    return [subaxis(run) for run in runs if run]


@dataclass(frozen=True)
class Flow:
    """Reachability and post-dominance in a typed graph, and what they say of the steps of its residual streams."""

    typed: TypedGraph
    attentions: Sequence[Attention]

    @cached_property
    def graph(self) -> nx.DiGraph:
        edges = nx.DiGraph()
        for node in self.typed.captured.graph.graph.nodes:
            edges.add_node(node)
            edges.add_edges_from((source, node) for source in node.all_input_nodes)
        return edges

    @cached_property
    def post_dominator(self) -> Mapping[fx.Node, fx.Node]:
        (output,) = self.typed.captured.graph.graph.find_nodes(op="output")
        immediate = nx.immediate_dominators(self.graph.reverse(copy=False), output)
        return {node: above for node, above in immediate.items() if node is not output and above is not None}

    def descends(self, node: fx.Node, ancestor: fx.Node) -> bool:
        return node is ancestor or node in self.descendants(ancestor)

    def descendants(self, node: fx.Node) -> set[fx.Node]:
        if node not in self._descendants:
            self._descendants[node] = nx.descendants(self.graph, node)
        return self._descendants[node]

    @cached_property
    def _descendants(self) -> dict[fx.Node, set[fx.Node]]:
        return {}

    def _adds(self, start: fx.Node, end: fx.Node, reader: fx.Node) -> bool:
        """Whether on the way of a stream something of its own is added to it, of which a node below knows."""
        inside, front, seen = self.descendants(start), [end], set[fx.Node]()
        while front:
            node = front.pop()
            if node in inside and node not in seen:
                sides = [side for side in self.typed.operands(node) if self.descends(side, start)]
                if node.target in _ADDITIONS and len(sides) > 1 and self.descends(reader, node):
                    return True
                seen.add(node)
                front += node.all_input_nodes
        return False

    @cached_property
    def steps(self) -> dict[fx.Node, tuple[fx.Node, fx.Node]]:
        """The residual step of every attention that has one, by its node, in execution order."""
        found = ((each.node, self._residual(each)) for each in self.attentions)
        return {node: step for node, step in found if step is not None}

    def stretch(self, attention: fx.Node, before: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The last of the stream above a residual step where more is added than attention, from one step to the next.

        Attentions between which nothing is added follow each other, as in space and in time.
        """
        tokens = _along(self.typed, before)
        end = before
        for above, (start, added_to) in reversed(self.steps.items()):
            if self.descends(end, start) and _along(self.typed, start) == tokens:
                if self._adds(start, end, attention):
                    return (start, end) if _along(self.typed, end) == tokens else None
                attention, end = above, added_to
        return None

    def _residual(self, attention: Attention) -> tuple[fx.Node, fx.Node] | None:
        """The residual addition that post-dominates an attention; past its norm, past parallel branches.

        With it the stream that comes to the addition from elsewhere than the attention: that which queries and keys are
        made of. Where there is none, as where the stream is pooled on its way, it is the first that is added to.
        """
        found: tuple[fx.Node, fx.Node] | None = None
        node = self.post_dominator.get(attention.node)
        while node is not None and not (found and self._adds_to_itself(node, attention.node)):
            beside = self._stream_beside(node, attention.node)
            if beside is not None and (stream := self._read(beside, attention)) is not None:
                found = node, stream
                break
            if found is None and beside is not None and not self.descends(attention.queries, beside):
                found = node, beside
            node = self.post_dominator.get(node)
        if found is None:
            return None
        node, before = found
        while (following := self._continues(node)) is not None:
            node = following
        return node, before

    def _read(self, side: fx.Node, attention: Attention) -> fx.Node | None:
        """What an attention reads of what it is added to, without its scale; None if not all of it is made of that.

        What is added to the queries of a self-attention alone, or made of its values, is a part of it.
        """
        ends = [attention.queries]
        if attention.keys is not None and attends_to_itself(self.typed, attention):
            ends.append(attention.keys)
        while not all(self.descends(end, side) for end in ends):
            scaled = [each for each in self.typed.operands(side) if self.typed.value(each).clip]
            if side.target not in _SCALINGS or len(scaled) != 1:
                return None
            (side,) = scaled
        return side

    def _adds_to_itself(self, node: fx.Node, branch: fx.Node) -> bool:
        """Whether an addition is one of a later residual step."""
        return node.target in _ADDITIONS and all(self.descends(each, branch) for each in self.typed.operands(node))

    def _stream_beside(self, node: fx.Node, branch: fx.Node) -> fx.Node | None:
        """What an addition adds a branch to, if it is one of the two and the other is one stream of the clip."""
        if node.target not in _ADDITIONS:
            return None
        inside: list[fx.Node] = []
        outside: list[fx.Node] = []
        for side in self.typed.operands(node):
            (inside if self.descends(side, branch) else outside).append(side)
        streams = [side for side in outside if self.typed.value(side).clip]
        return streams[0] if inside and len(streams) == 1 else None

    def _continues(self, node: fx.Node) -> fx.Node | None:
        """The only reader, where it still belongs to the same residual step."""
        if len(node.users) != 1:
            return None
        (user,) = node.users
        if user.target in _NORMS or user.target in _THROUGH or self._stream_beside(user, node) is not None:
            return user
        return None


def _along(typed: TypedGraph, stream: fx.Node) -> set[Atom]:
    """The atoms of a stream, without those of what stands beside the clip, such as class tokens."""
    return {atom for axis in typed.value(stream).axes for atom in _of_the_clip(axis)}


def _of_the_clip(axis: Axis) -> Iterator[Atom]:
    for segment in axis.segments:
        if len(axis.segments) == 1 or Axis((segment,)).clip:
            for factor in segment:
                yield from [factor] if isinstance(factor, Atom) else _of_the_clip(factor)


def attends_to_itself(typed: TypedGraph, attention: Attention) -> bool:
    """Whether the keys are the queries' tokens of the clip and no others of it, for each value of the same batch.

    They may be one for each block of them.
    """
    value, (*batch, keys) = typed.value(attention.queries), key_axes(typed, attention)
    tokens = value.axes[-2]
    if not value.clip or _clip_atoms(batch) != _clip_atoms(value.axes[:-2]) or not maximal_runs(tokens):
        return False
    pooled = len(maximal_runs(keys)) == len(maximal_runs(tokens)) == 1 and _clip_atoms([keys]) < _clip_atoms([tokens])
    return maximal_runs(keys) == maximal_runs(tokens) or pooled


def key_axes(typed: TypedGraph, attention: Attention) -> Axes:
    """The batch of the keys, and along which they lie."""
    if attention.probabilities is None and attention.keys is not None:
        return typed.value(attention.keys).axes[:-1]
    axes = typed.value(attention.queries).axes
    return (*axes[:-2], axes[-1])


def _clip_atoms(axes: Sequence[Axis]) -> set[Atom]:
    return {atom for axis in axes for atom in axis.atoms if atom.clip}
