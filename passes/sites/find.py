"""Attention plus types -> sites: where tokens can be merged, in which layout, and why not elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TypeAlias

import networkx as nx
import torch
from torch import fx

from tldr_compile.passes.axes import (
    CONSTANT,
    PICTURE,
    Atom,
    Axes,
    Axis,
    Factor,
    Role,
    Segment,
    TypedGraph,
    find,
    product,
    products,
    segment_size,
    subaxis,
)
from tldr_compile.passes.capture import Attention
from tldr_compile.passes.refusal import Refusal
from tldr_compile.passes.sites import mask_analysis
from tldr_compile.passes.sites.groupings import TIME, Grouping, has_place
from tldr_compile.passes.sizes import Size, simplify

aten = torch.ops.aten

_ADDITIONS = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.addcmul.default, aten.lerp.Tensor, aten.lerp.Scalar})
_NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default})
_THROUGH = frozenset({aten.clone.default, aten._to_copy.default})
_SCALINGS = frozenset({aten.mul.Tensor, aten.div.Tensor})


@dataclass(frozen=True)
class Stream:
    """Where the merge of a site stands: after `node`; `before` is what the attention is added to, as it
    read that, without a scale.

    The finest grouping has all that the attention attends along as its run, and all else of the stream apart.
    `stretch` is the last of the stream above where more is added than attention, which in most models is the MLP of the
    layer before: from behind one attention to the next, which reads it. None: there is none, as above the first
    attention, or where attention and MLP read the same.
    """

    node: fx.Node
    before: fx.Node
    finest: Grouping
    stretch: tuple[fx.Node, fx.Node] | None = None


@dataclass(frozen=True)
class SelfAttention:
    """A self-attention over clip tokens: a `Site`, or a `RefusedSite`. They are numbered together."""

    index: int
    attention: Attention
    tokens: Axis
    batch: Axis
    heads: Axis
    layout: str

    @property
    def clip_batch(self) -> Axis:
        """The clip's part of the batch; what is left of it are heads."""
        return product(factor for factor in self.batch.factors if factor not in self.heads.factors)

    @property
    def name(self) -> str:
        """What a message calls it."""
        return f"site {self.index} ({self.attention.node.name}, tokens {self.tokens!r})"


@dataclass(frozen=True)
class Site(SelfAttention):
    """One behind which tokens can merge, in the stream."""

    stream: Stream


@dataclass(frozen=True)
class RefusedSite(SelfAttention):
    """One at which they cannot."""

    reason: str

    @property
    def refusal(self) -> Refusal:
        return Refusal(self.attention.node, self.reason)


AnySite: TypeAlias = Site | RefusedSite


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


def protected(axis: Axis) -> Size:
    """How many of the tokens along an axis are none of the clip's: 3 of `t·(1 + h·w)`, for 3 frames."""
    counts: list[Size] = []
    for segment in axis.segments:
        sums = [f for f in segment if isinstance(f, Axis)]
        others = segment_size(tuple(f for f in segment if isinstance(f, Atom)))
        if sums:
            counts.append(others * prod(each.size for each in sums[1:]) * protected(sums[0]))
        elif not segment or not all(f.clip for f in segment if isinstance(f, Atom)):
            counts.append(others)
    return simplify(sum(counts))


@dataclass(frozen=True)
class Flow:
    """Reachability and post-dominance in a typed graph."""

    typed: TypedGraph

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

    def adds(self, start: fx.Node, end: fx.Node, reader: fx.Node) -> bool:
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

    def residual(self, attention: Attention) -> tuple[fx.Node, fx.Node] | None:
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
        if attention.keys is not None and _attends_to_itself(self.typed, attention):
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


def sites(typed: TypedGraph, attentions: Sequence[Attention], protect: int = 0) -> tuple[AnySite, ...]:
    """All self-attentions over clip tokens, numbered in execution order whether or not they can be merged."""
    flow = Flow(typed)
    selves = [each for each in attentions if _attends_to_itself(typed, each)]
    found = [_site(flow, index, each, protect) for index, each in enumerate(selves)]
    steps = [(each.node, *step) for each in attentions if (step := flow.residual(each)) is not None]
    return tuple(_after_stretch(flow, each, steps) if isinstance(each, Site) else each for each in found)


Steps: TypeAlias = Sequence[tuple[fx.Node, fx.Node, fx.Node]]
"""Of every attention in execution order: its node, that of the stream behind it, and what it is added to."""


def _after_stretch(flow: Flow, site: Site, steps: Steps) -> Site:
    return replace(site, stream=replace(site.stream, stretch=_stretch(flow, site, steps)))


def _stretch(flow: Flow, site: Site, steps: Steps) -> tuple[fx.Node, fx.Node] | None:
    """What `Stream` says of it: attentions between which nothing is added follow each other, in space and in time."""
    tokens = _along(flow.typed, site.stream.before)
    attention, end = site.attention.node, site.stream.before
    for above, start, before in reversed(steps):
        if flow.descends(end, start) and _along(flow.typed, start) == tokens:
            if flow.adds(start, end, attention):
                return (start, end) if _along(flow.typed, end) == tokens else None
            attention, end = above, before
    return None


def _along(typed: TypedGraph, stream: fx.Node) -> set[Atom]:
    """The atoms of a stream, without those of what stands beside the clip, such as class tokens."""
    return {atom for axis in typed.value(stream).axes for atom in _of_the_clip(axis)}


def _of_the_clip(axis: Axis) -> Iterator[Atom]:
    for segment in axis.segments:
        if len(axis.segments) == 1 or Axis((segment,)).clip:
            for factor in segment:
                yield from [factor] if isinstance(factor, Atom) else _of_the_clip(factor)


def _attends_to_itself(typed: TypedGraph, attention: Attention) -> bool:
    """Whether the keys are the queries' tokens of the clip and no others of it, for each value of the same batch.

    They may be one for each block of them.
    """
    value, (*batch, keys) = typed.value(attention.queries), _key_axes(typed, attention)
    tokens = value.axes[-2]
    if not value.clip or _clip_atoms(batch) != _clip_atoms(value.axes[:-2]) or not maximal_runs(tokens):
        return False
    pooled = len(maximal_runs(keys)) == len(maximal_runs(tokens)) == 1 and _clip_atoms([keys]) < _clip_atoms([tokens])
    return maximal_runs(keys) == maximal_runs(tokens) or pooled


def _key_axes(typed: TypedGraph, attention: Attention) -> Axes:
    """The batch of the keys, and along which they lie."""
    if attention.probabilities is None and attention.keys is not None:
        return typed.value(attention.keys).axes[:-1]
    axes = typed.value(attention.queries).axes
    return (*axes[:-2], axes[-1])


def _clip_atoms(axes: Sequence[Axis]) -> set[Atom]:
    return {atom for axis in axes for atom in axis.atoms if atom.clip}


def no_sites(typed: TypedGraph, attentions: Sequence[Attention]) -> Iterator[Refusal]:
    """The attentions that are no self-attention over clip tokens, and why."""
    for each in attentions:
        if not _attends_to_itself(typed, each):
            value = typed.value(each.queries)
            tokens = maximal_runs(value.axes[-2]) if value.clip else []
            other = f"its keys are not its queries' tokens {value.axes[-2]!r}"
            yield Refusal(each.node, other if tokens else "it has no tokens of the clip")


def _site(flow: Flow, index: int, attention: Attention, protect: int) -> AnySite:
    axes = flow.typed.value(attention.queries).axes
    tokens, batch = axes[-2], product(axes[:-2])
    stream = _stream(flow, attention, tokens)
    if isinstance(stream, str):
        heads = product(f for f in batch.factors if not product([f]).clip)
        return RefusedSite(index, attention, tokens, batch, heads, _layout(tokens), stream)
    finest = stream.finest
    beside = _beside(flow.typed, stream.node, finest.run)
    heads = product(f for f in batch.factors if f not in beside)
    layout = _layout(tokens, flow.typed.value(stream.node).axes, finest)
    reason = _reason(flow.typed, attention, tokens, batch, heads, stream, protect)
    if reason is not None:
        return RefusedSite(index, attention, tokens, batch, heads, layout, reason)
    return Site(index, attention, tokens, batch, heads, layout, stream)


def _stream(flow: Flow, attention: Attention, tokens: Axis) -> Stream | str:
    runs = maximal_runs(tokens)
    if len(runs) > 1:
        return f"its tokens {tokens!r} hold the clip in {len(runs)} places, and a merge shortens one"
    residual = flow.residual(attention)
    if residual is None:
        return "no residual addition follows it on every path, so there is no stream to merge"
    node, before = residual
    axes = flow.typed.value(node).axes
    atoms = [atom for axis in axes for segment in axis.segments for atom in product([Axis((segment,))]).atoms]
    if not runs[0].atoms & set(atoms):
        return (
            f"its tokens {tokens!r} are not those of the residual stream {_text(axes)}: it attends within another "
            "grid, as of padded or shifted windows, or of a pooled map"
        )
    run = _laid_along(axes, runs[0])
    held = [f for axis in axes for each in products(axis) for f in each if f in runs[0].atoms]
    if len(held) > len(set(held)):
        return f"the residual stream {_text(axes)} holds its tokens {tokens!r} more than once"
    if run is None:
        return f"its tokens {tokens!r} are not held whole by the residual stream {_text(axes)}"
    apart = product(f for f in _beside(flow.typed, node, run) if f not in run.atoms)
    finest = _finest(run, apart, tokens, product(flow.typed.value(attention.queries).axes[:-2]))
    pooled = run.atoms - _key_axes(flow.typed, attention)[-1].atoms
    joined = finest.joining(pooled, tokens.atoms) if pooled else finest
    if joined is None:
        return f"its keys are pooled over all of {', '.join(sorted(map(repr, pooled)))}"
    return Stream(node, before, joined)


def _finest(run: Axis, apart: Axis, tokens: Axis, batch: Axis) -> Grouping:
    """All that a site attends along as the run, and the rest apart; places that it has pooled are shared."""
    seen = {*batch.factors, *tokens.atoms}
    pooled = [f for f in apart.factors if f not in seen and isinstance(f, Atom) and f.role in PICTURE]
    return Grouping(run, product(f for f in apart.factors if f not in pooled), product(pooled))


def _laid_along(axes: Axes, run: Axis) -> Axis | None:
    """The run as the stream holds it: whole segments, or factors of one product in the order that the stream has."""
    if len(run.segments) > 1:
        return run if sum(find(axis, run) is not None for axis in axes) == 1 else None
    inside = [segment for axis in axes for segment in products(axis)]
    for factors in (tuple(factor for axis in axes for factor in axis.factors), *inside):
        own = [factor for factor in factors if factor in run.atoms]
        if len(own) == len(run.factors) == len(set(own)):
            return product(own)
    return None


def _beside(typed: TypedGraph, stream: fx.Node, run: Axis) -> tuple[Factor, ...]:
    """The factors of a residual stream that are no channels: tokens, and what they are grouped for each value of.

    What is not known to be a channel is kept apart, whether or not it can be named: samples that were stacked, frames
    that were picked. A head is what the stream does not hold.
    """
    found: list[Factor] = []
    for axis in typed.value(stream).axes:
        if not axis.atoms & run.atoms:
            found += axis.factors
        for segment in products(axis) if axis.atoms & run.atoms else ():
            if any(f in run.atoms or (isinstance(f, Axis) and f.atoms & run.atoms) for f in segment):
                found += [f for f in segment if isinstance(f, Atom) or not f.atoms & run.atoms]
    return tuple(f for f in dict.fromkeys(found) if not _is_channel(typed, f))


def _is_channel(typed: TypedGraph, factor: Factor) -> bool:
    if isinstance(factor, Axis):
        return bool(factor.atoms) and all(_is_channel(typed, atom) for atom in factor.atoms)
    told = factor.strength == CONSTANT or factor in typed.mixed
    return factor.role is Role.CHANNEL or (not factor.clip and told)


def _reason(
    typed: TypedGraph, attention: Attention, tokens: Axis, batch: Axis, heads: Axis, stream: Stream, protect: int
) -> str | None:
    run = maximal_runs(tokens)[0]
    clip_batch = [f for f in batch.factors if f not in heads.factors]
    if len(run.atoms) < sum(len(segment) for segment in run.segments):
        return f"its tokens {tokens!r} hold the same dimension of the clip twice"
    if attention.causal:
        return "it is causal: the order of its tokens carries meaning"
    if (alone := _without_space(run)) is not None:
        return alone
    if set(clip_batch) != set(stream.finest.apart.factors) - tokens.atoms:
        along = _text(typed.value(stream.node).axes)
        return f"its tokens {tokens!r} over {batch!r} cannot be laid along the residual stream {along}"
    if (hidden := mask_analysis.refusal(typed, attention, run)) is not None:
        return hidden
    lead = Axis(tokens.segments[: (find(tokens, run) or (0, 0))[0]]).size
    if isinstance(lead, int) and lead < protect:
        return f"protect={protect} would take apart {run!r}, which is one block of tokens"
    return None


def _without_space(run: Axis) -> str | None:
    """Why a run that is no place in a picture is not merged: it is time alone, or the samples themselves."""
    if {atom.role for atom in run.atoms} == {Role.SAMPLE}:
        return f"it attends along the samples of the batch, {run!r}"
    if not has_place(run):
        return f"it is temporal: it attends along {run!r} only, at one place of the picture"
    return None


def _layout(tokens: Axis, stream: Axes = (), finest: Grouping | None = None) -> str:
    roles = {atom.role for atom in tokens.atoms if atom.clip}
    if finest is not None and has_place(finest.run) and any(atom.role in PICTURE for atom in finest.apart.atoms):
        return "windows"
    if roles & TIME:
        return "joint space-time" if roles - TIME else "temporal"
    if finest and any(finest.run.atoms < set(segment) for axis in stream for segment in axis.segments):
        return "packed" if {atom.role for atom in finest.run.atoms} == {Role.TOKEN} else "divided, spatial"
    return "spatial"


def _text(axes: Axes) -> str:
    return " x ".join(map(repr, axes))


def why_nothing(sites: Sequence[AnySite], misses: Sequence[Refusal], others: Sequence[Attention]) -> str:
    """Why there is nothing to merge: what was searched for, and what came nearest."""
    searched = "searched for scaled_dot_product_attention and for product - softmax - product over the tokens of a clip"
    if sites:
        refused = [site for site in sites if isinstance(site, RefusedSite)]
        near = "; ".join(f"{site.name}: {site.refusal.reason_at}" for site in refused[:3])
        return f"no attention site of this graph can merge tokens ({searched}). Nearest: {near}."
    if misses:
        return f"this graph has no attention site ({searched}). Nearest miss: {misses[0]}."
    if others:
        names = ", ".join(each.node.name for each in others[:3])
        return (
            f"this graph has no attention site ({searched}). Its attentions ({names}) have keys other than their "
            "queries or no tokens of the clip; clip= names the inputs that carry the video, if that was not told right."
        )
    return (
        f"this graph has no attention site ({searched}; it has no softmax over tokens either). "
        "Is this the part of the model that holds the transformer? on_nothing='warn' compiles it as it is."
    )
