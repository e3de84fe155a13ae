"""A merge: read the site, tell saliency and what is compared, group the tokens, and merge the stream.

stream, evidence  --readings-->  metric, saliency  --group-->  Grouped  --down-->  the merged stream
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem

import torch
from torch import fx

from tldr_compile.passes.axes import UNIT, Atom, Axes, Axis, product, subaxis
from tldr_compile.passes.emit.attention import Evidence, heads_apart
from tldr_compile.passes.emit.resample import Converter, Grouped, holding
from tldr_compile.passes.emit.views import Laid, Layout, segment_of
from tldr_compile.passes.errors import OptionError
from tldr_compile.passes.options import Measure, Policy
from tldr_compile.passes.plan import How, Merge, Resolution, of_run, tokens_at
from tldr_compile.passes.sites import TIME
from tldr_compile.passes.sizes import Size, simplify

aten = torch.ops.aten


@dataclass(frozen=True)
class Reader:
    """What a merge can ask of its site, by name: each an answer laid along the tokens of the stream.

    Where several tokens are grouped as one (a block, or the same place of all frames), `[B, N, J, ...]` has one answer
    for each. `stream` is what is merged, `before` what the attention was added to, `stretch` both ends of what lies
    between the attention before and the next, if anything does: all where the merge starts, the last two emitted when
    they are asked for. `evidence` is there if the attention was asked for any.
    """

    converter: Converter
    policy: Policy
    merge: Merge
    stream: Laid
    before: Callable[[], Laid]
    stretch: Callable[[], Sequence[Laid]]
    evidence: Evidence | None
    depth: float
    """The part of all sites that lie before this one."""

    @property
    def _layout(self) -> Layout:
        return self.converter.layout

    @property
    def batch_and_tokens(self) -> tuple[Axis, Axis]:
        return self.merge.target.batch, tokens_at(self.merge.target.run, self.merge.source)

    @property
    def _places(self) -> Axes:
        """Batch and tokens, and what is joined in each."""
        joined = self.merge.grouping.joined
        return (*self.batch_and_tokens, *([joined] if joined != UNIT else []))

    def saliency(self) -> fx.Node | None:
        """What the signal says of every group of joined tokens: of their mean number, of all of their rows."""
        answers = []
        for laid in map(self.read, self.policy.signal.reads):
            node = laid.node
            if self._joins and len(laid.axes) == len(self._places):
                node = self._layout.call(aten.mean.dim, node, [2])
            elif self._joins:
                node = self._layout.reshape(node, laid.axes, (*laid.axes[:2], product(laid.axes[2:])))
            answers.append(node)
        return self._said(self.policy.signal, answers)

    def metric(self) -> fx.Node:
        """What is compared: of joined tokens, one behind the other, so that the cosine is the mean of theirs."""
        measure, (batch, tokens) = self.policy.comparison, self.batch_and_tokens
        readings = [self.read(name) for name in measure.reads]
        if not self._joins:
            return self._said(measure, [each.node for each in readings])  # type: ignore[return-value]
        joined = self.merge.grouping.joined
        rows = (product((batch, joined)), tokens)
        answers = [self._layout.arrange(each.node, each.axes, (*rows, *each.axes[3:])) for each in readings]
        said = self._layout.call(self.converter.operators.unit, self._said(measure, answers))
        lengths = self._layout.lengths
        apart = self._layout.call(aten.reshape.default, said, [*lengths((batch, joined, tokens)), -1])
        beside = self._layout.call(aten.permute.default, apart, [0, 2, 1, 3])
        return self._layout.call(aten.reshape.default, beside, [*lengths((batch, tokens)), -1])

    @property
    def _joins(self) -> bool:
        return self.merge.grouping.joined != UNIT

    def _said(self, measure: Measure, answers: Sequence[fx.Node]) -> fx.Node | None:
        """What a measure says; None if it reads nothing."""
        if measure.function is not None:
            return self._layout.call(measure.function, *answers)
        return answers[0] if answers else None

    def read(self, name: str) -> Laid:
        answers: Mapping[str, Callable[[], Laid]] = {
            "tokens": lambda: self._over_tokens(self.stream),
            "before": lambda: self._over_tokens(self.before()),
            "shift": self._shift,
            "mlp shift": self._mlp_shift,
            "previous": self._previous,
            "sharpness": self._sharpness,
            "received": self._received,
            "keys": self._keys,
        }
        return self._layout.once(("reading", self.merge.target, name), answers[name])

    def _shift(self) -> Laid:
        """How far the attention moved every token; the difference is taken before it is laid along the tokens."""
        moved = self._layout.call(self.converter.operators.shift, self.stream.node, self.before().node)
        rows = self._over_tokens(Laid(moved, self.stream.axes))
        return Laid(self._layout.call(aten.linalg_vector_norm.default, rows.node, 2, [-1]), rows.axes[:-1])

    def _mlp_shift(self) -> Laid:
        """How far the stream moved every token between two attentions; 0 where nothing lies between any above."""
        ends = [self._over_tokens(each) for each in self.stretch()]
        if not ends:
            dtype = torch.promote_types(self.merge.node.meta["val"].dtype, torch.float32)
            lengths = self._layout.lengths(self._places)
            return Laid(self._layout.call(aten.new_zeros.default, self.stream.node, lengths, dtype=dtype), self._places)
        start, end = ends
        moved = self._layout.call(self.converter.operators.shift, end.node, start.node)
        return Laid(self._layout.call(aten.linalg_vector_norm.default, moved, 2, [-1]), end.axes[:-1])

    def _previous(self) -> Laid:
        """The stream at the same place of the frame before, or what holds that place by now; zeros in the first."""
        call, source, rows = self._layout.call, self.merge.source, self.read("tokens")
        frames, between = self._frames()
        place = places(self.converter, source, rows.node, self.batch_and_tokens)
        held = call(aten.clamp_min.default, call(aten.sub.Tensor, place, self._layout.length(between)), 0)
        if source is not None:
            held = call(aten.gather.default, self.converter.assign(source), 1, held)
        in_run = call(aten.remainder.Scalar, place, self._layout.length(simplify(frames * between)))
        is_first = call(aten.lt.Scalar, in_run, self._layout.length(between))
        held, is_first = (self._layout.arrange(each, rows.axes[:2], rows.axes) for each in (held, is_first))
        index = call(aten.expand.default, held, self._layout.lengths(rows.axes))
        before = call(aten.gather.default, rows.node, 1, index)
        return Laid(call(aten.masked_fill.Scalar, before, is_first, 0), rows.axes)

    def _frames(self) -> tuple[Size, Size]:
        """How many frames the run has, and how many of its tokens lie between a place and the same in the next."""
        factors = self.merge.target.run.factors
        times = [k for k, each in enumerate(factors) if isinstance(each, Atom) and each.role in TIME]
        if not times or times[-1] - times[0] >= len(times):
            (option, other), site = self._option_that_reads("previous"), self.merge.site
            raise OptionError(
                f"{option} needs the frame before, and the tokens that site {site.index} ({site.attention.node.name}) "
                f"groups, {self.merge.target.run!r}, are not those of several frames, one behind the other; use {other}"
            )
        return product(factors[times[0] : times[-1] + 1]).size, product(factors[times[-1] + 1 :]).size

    def _option_that_reads(self, reading: str) -> tuple[str, str]:
        """The option, as it was given, and what serves in its place."""
        if reading in self.policy.comparison.reads:
            return f"metric={self.policy.metric!r}", "metric='tokens'"
        return f"saliency={self.policy.saliency!r}", "saliency='attention'"

    def _sharpness(self) -> Laid:
        assert self.evidence is not None
        assert self.evidence.sharpness is not None
        return self._along_stream(self.evidence.sharpness, self.evidence.held, channels=False)

    def _received(self) -> Laid:
        assert self.evidence is not None
        assert self.evidence.received is not None
        return self._along_stream(self.evidence.received, self.evidence.held, channels=False)

    def _keys(self) -> Laid:
        """The mean over the heads."""
        assert self.evidence is not None
        site = self.merge.site
        if self.evidence.keys is None:
            option, other = self._option_that_reads("keys")
            raise OptionError(
                f"{option} needs the keys of site {site.index} ({site.attention.node.name}), and something "
                f"that is no scale and no mask is between their product and the softmax; use {other}"
            )
        keys = heads_apart(self._layout, site, self.evidence.held, self.evidence.keys)
        mean = self._layout.call(aten.mean.dim, keys.node, [1])
        return self._along_stream(Laid(mean, (keys.axes[0], *keys.axes[2:])), self.evidence.held, channels=True)

    def _over_tokens(self, laid: Laid) -> Laid:
        """A value along the residual stream as rows of its clip tokens, `[B, N, C]`."""
        return self._by_token(laid, self.batch_and_tokens[1], channels=True)

    def _along_stream(self, laid: Laid, held: tuple[Resolution, ...], *, channels: bool) -> Laid:
        """What a site says of its clip tokens, `[batch, tokens, ...]`, by atom along the stream `[B, N, ...]`."""
        run, rows = self.merge.target.run, self.merge.rows
        laid = self.converter.converted(laid, (each for each in rows if each.run != run))
        laid = self._by_token(laid, tokens_at(run, of_run(held, run)), channels=channels)
        return self.converter.converted(laid, (each for each in rows if each.run == run))

    def _by_token(self, laid: Laid, tokens: Axis, *, channels: bool) -> Laid:
        """The tokens out of a value: `[batch, tokens]`, what is joined in each of them, and channels if it has any."""
        laid = self.converter.apart(self.converter.together(laid, tokens), tokens)
        (dim,) = holding(laid.axes, tokens)
        place = segment_of(laid.axes[dim], tokens)
        part = self._layout.segments(laid.node, laid.axes, dim, place)
        axes = (*laid.axes[:dim], subaxis(laid.axes[dim].segments[slice(*place)]), *laid.axes[dim + 1 :])
        batch, _, *joined = self._places
        told = {factor for each in (batch, tokens, *joined) for factor in each.factors}
        rest = [product(f for axis in axes for f in axis.factors if f not in told)] if channels else []
        target = (batch, tokens, *joined, *rest)
        node = self._layout.arrange(part, axes, target)
        if not all(any(each.atoms & axis.atoms for axis in axes) for each in joined):  # keys, one for each block
            node = self._layout.call(aten.expand.default, node, self._layout.lengths(target))
        return Laid(node, target)


def merged(reader: Reader) -> tuple[Converter, Laid]:
    """The stream after a merge, and a converter that knows its resolution."""
    merge, converter = reader.merge, reader.converter
    call, policy = converter.layout.call, reader.policy
    metric, saliency = reader.metric(), reader.saliency()
    mass, size = counts(converter, merge.source, metric, reader.batch_and_tokens)
    grouping = call(
        converter.operators.group, metric, saliency, mass, size, converter.layout.length(merge.count),
        reduction=policy.reduction, seed=merge.target.index, depth=reader.depth, margin=policy.margin,
        place=places(converter, merge.source, mass, reader.batch_and_tokens) if merge.ordered else None,
    )  # fmt: skip
    grouped = Grouped(grouping, *(call(getitem, grouping, k) for k in range(8)))
    converter = converter.knowing(merge.target, grouped)
    return converter, converter.down(reader.stream, merge.target, How.MERGE)


def places(
    converter: Converter, source: Resolution | None, like: fx.Node, axes: tuple[Axis, Axis]
) -> fx.Node:
    """Where along the run every token stands where a merge starts, `[B, N]`."""
    return converter.layout.numbers(like, axes) if source is None else converter.places(source)


def counts(
    converter: Converter, source: Resolution | None, like: fx.Node, axes: tuple[Axis, Axis]
) -> tuple[fx.Node, fx.Node]:
    """Mass and size of every token where a merge starts, `[B, N]` float32."""
    if source is not None:
        return converter.grouped[source].mass, converter.grouped[source].size
    lengths = converter.layout.lengths(axes)
    ones = converter.layout.call(aten.new_ones.default, like, lengths, dtype=torch.float32)
    return ones, ones
