"""A merge: read the site, tell saliency and what is compared, group the tokens, and merge the stream.

stream, evidence  --readings-->  metric, saliency  --group-->  Grouped  --down-->  the merged stream
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import getitem

import torch
from torch import fx

from tldr_compile.passes.axes import Axis, find, product, subaxis
from tldr_compile.passes.emit.attention import Evidence, heads_apart
from tldr_compile.passes.emit.resample import Converter, Grouped, holding
from tldr_compile.passes.emit.views import Laid, Layout, segment_of
from tldr_compile.passes.errors import OptionError
from tldr_compile.passes.options import Measure, Policy
from tldr_compile.passes.plan import How, Merge, Resolution, of_run, tokens_at
from tldr_compile.passes.sites import maximal_runs

aten = torch.ops.aten


@dataclass(frozen=True)
class Reader:
    """What a merge can ask of its site, by name: each an answer laid along the tokens of the stream, `[B, N, ...]`.

    `stream` is what is merged, `before` what the attention was added to, both where the merge starts; `before` is
    emitted when it is asked for. `evidence` is there if the attention was asked for any.
    """

    converter: Converter
    policy: Policy
    merge: Merge
    stream: Laid
    before: Callable[[], Laid]
    evidence: Evidence | None

    @property
    def _layout(self) -> Layout:
        return self.converter.layout

    @property
    def batch_and_tokens(self) -> tuple[Axis, Axis]:
        return self.merge.target.batch, tokens_at(self.merge.target.run, self.merge.source)

    def told(self, measure: Measure) -> fx.Node | None:
        """What a measure says; None if it reads nothing."""
        answers = [self.read(name) for name in measure.reads]
        if measure.function is not None:
            return self._layout.call(measure.function, *answers)
        return answers[0] if answers else None

    def read(self, name: str) -> fx.Node:
        answers: Mapping[str, Callable[[], fx.Node]] = {
            "tokens": lambda: self._over_tokens(self.stream),
            "before": lambda: self._over_tokens(self.before()),
            "shift": self._shift,
            "sharpness": self._sharpness,
            "keys": self._keys,
        }
        return self._layout.once(("reading", self.merge.target, name), answers[name])

    def _shift(self) -> fx.Node:
        """How far the attention moved every token; the difference is taken before it is laid along the tokens."""
        moved = self._layout.call(self.converter.operators.shift, self.stream.node, self.before().node)
        rows = self._over_tokens(Laid(moved, self.stream.axes))
        return self._layout.call(aten.linalg_vector_norm.default, rows, 2, [-1])

    def _sharpness(self) -> fx.Node:
        assert self.evidence is not None
        assert self.evidence.sharpness is not None
        return self._along_stream(self.evidence.sharpness, self.evidence.held)

    def _keys(self) -> fx.Node:
        """The mean over the heads."""
        assert self.evidence is not None
        site = self.merge.site
        if self.evidence.keys is None:
            compares = "keys" in self.policy.comparison.reads
            option, name = ("metric", self.policy.metric) if compares else ("saliency", self.policy.saliency)
            other = "metric='tokens'" if compares else "saliency='attention'"
            raise OptionError(
                f"{option}={name!r} needs the keys of site {site.index} ({site.attention.node.name}), and something "
                f"that is no scale and no mask is between their product and the softmax; use {other}"
            )
        keys = heads_apart(self._layout, site, self.evidence.keys)
        mean = self._layout.call(aten.mean.dim, keys.node, [1])
        return self._along_stream(Laid(mean, (keys.axes[0], *keys.axes[2:])), self.evidence.held)

    def _over_tokens(self, laid: Laid) -> fx.Node:
        """A value along the residual stream as rows of its clip tokens, `[B, N, C]`."""
        batch, tokens = self.batch_and_tokens
        laid = self.converter.apart(self.converter.together(laid, tokens), tokens)
        (dim,) = holding(laid.axes, tokens)
        place = segment_of(laid.axes[dim], tokens)
        part = self._layout.segments(laid.node, laid.axes, dim, place)
        axes = (*laid.axes[:dim], subaxis(laid.axes[dim].segments[slice(*place)]), *laid.axes[dim + 1 :])
        rest = product(f for axis in axes for f in axis.factors if f not in (*batch.factors, *tokens.factors))
        return self._layout.arrange(part, axes, (batch, tokens, rest))

    def _along_stream(self, laid: Laid, held: tuple[Resolution, ...]) -> fx.Node:
        """What a site says of its clip tokens, `[batch, tokens, ...]`, by atom along the stream `[B, N, ...]`."""
        run, batch, rows = self.merge.target.run, self.merge.target.batch, self.merge.rows
        laid = self.converter.converted(laid, (each for each in rows if each.run != run))
        along = piece = tokens_at(run, of_run(held, run))
        if piece == run:
            (piece,) = maximal_runs(self.merge.site.tokens)  # the same tokens, in the site's own order
        place = find(laid.axes[1], piece)
        assert place is not None
        node = self._layout.segments(laid.node, laid.axes, 1, place)
        source, target = (laid.axes[0], piece, *laid.axes[2:]), (batch, along, *laid.axes[2:])
        laid = Laid(self._layout.arrange(node, source, target), target)
        return self.converter.converted(laid, (each for each in rows if each.run == run)).node


def merged(reader: Reader) -> tuple[Converter, Laid]:
    """The stream after a merge, and a converter that knows its resolution."""
    merge, converter = reader.merge, reader.converter
    call, policy = converter.layout.call, reader.policy
    metric = reader.told(policy.comparison)
    assert metric is not None
    saliency = reader.told(policy.signal)
    mass, size = counts(converter, merge.source, metric, reader.batch_and_tokens)
    grouping = call(
        converter.operators.group, metric, saliency, mass, size, converter.layout.length(merge.count),
        reduction=policy.reduction, seed=merge.target.index,
    )  # fmt: skip
    grouped = Grouped(grouping, *(call(getitem, grouping, k) for k in range(8)))
    converter = converter.knowing(merge.target, grouped)
    return converter, converter.down(reader.stream, merge.target, How.MERGE)


def counts(
    converter: Converter, source: Resolution | None, like: fx.Node, axes: tuple[Axis, Axis]
) -> tuple[fx.Node, fx.Node]:
    """Mass and size of every token where a merge starts, `[B, N]` float32."""
    if source is not None:
        return converter.grouped[source].mass, converter.grouped[source].size
    lengths = converter.layout.lengths(axes)
    ones = converter.layout.call(aten.new_ones.default, like, lengths, dtype=torch.float32)
    return ones, ones
