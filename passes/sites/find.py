"""Attention plus types -> sites: where tokens can be merged, in which layout, and why not elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

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
    TypedGraph,
    find,
    product,
    products,
    segment_size,
)
from tldr_compile.passes.capture import Attention
from tldr_compile.passes.refusal import Refusal
from tldr_compile.passes.sites import mask_analysis
from tldr_compile.passes.sites.flow import Flow, attends_to_itself, key_axes, maximal_runs
from tldr_compile.passes.sites.groupings import TIME, Grouping, has_place
from tldr_compile.passes.sizes import Size, simplify

aten = torch.ops.aten


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


def sites(typed: TypedGraph, attentions: Sequence[Attention], protect: int = 0) -> tuple[AnySite, ...]:
    """All self-attentions over clip tokens, numbered in execution order whether or not they can be merged."""
    flow = Flow(typed, attentions)
    selves = [each for each in attentions if attends_to_itself(typed, each)]
    return tuple(_site(flow, index, each, protect) for index, each in enumerate(selves))


def no_sites(typed: TypedGraph, attentions: Sequence[Attention]) -> Iterator[Refusal]:
    """The attentions that are no self-attention over clip tokens, and why."""
    for each in attentions:
        if not attends_to_itself(typed, each):
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
    residual = flow.steps.get(attention.node)
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
    pooled = run.atoms - key_axes(flow.typed, attention)[-1].atoms
    joined = finest.joining(pooled, tokens.atoms) if pooled else finest
    if joined is None:
        return f"its keys are pooled over all of {', '.join(sorted(map(repr, pooled)))}"
    return Stream(node, before, joined, flow.stretch(attention.node, before))


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
