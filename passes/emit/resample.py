"""Bring a value from one resolution to another, in the new graph.

[.., N, ..] -- down: merged or picked --> [.., N - r, ..] -- up: each token gets its group's value --> [.., N, ..]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from tldr_compile.passes.axes import UNIT, Atom, Axes, Axis, gathered, product
from tldr_compile.passes.axes import axis as atom_axis
from tldr_compile.passes.axes import replace as replaced
from tldr_compile.passes.emit.views import Laid, Layout
from tldr_compile.passes.operators import Operators
from tldr_compile.passes.plan import Conversion, How, Resolution, at, tokens_at

aten = torch.ops.aten


@dataclass(frozen=True)
class Grouped:
    """A resolution in the new graph: the call of `group` that finds it, and what it found, `[B, N]` or shorter."""

    node: fx.Node
    kept: fx.Node
    source: fx.Node
    target: fx.Node
    kept_weight: fx.Node
    source_weight: fx.Node
    mass: fx.Node
    size: fx.Node
    assign: fx.Node


@dataclass(frozen=True)
class Converter:
    """Emits conversions between the resolutions that are found so far, in the order they were."""

    layout: Layout
    operators: Operators
    grouped: Mapping[Resolution, Grouped] = field(default_factory=dict)

    def knowing(self, resolution: Resolution, grouped: Grouped) -> Converter:
        """One that knows a resolution more."""
        return replace(self, grouped={**self.grouped, resolution: grouped})

    def convert(
        self, laid: Laid, conversion: Conversion, *, reads: Axes | None = None, full: Axes | None = None
    ) -> Laid:
        """A value at the resolution that a conversion says.

        What is merged is repeated first where `reads`, the axes that it is read along, are longer. What is restored is
        laid as `full`, its axes in the original graph.
        """
        if conversion.how is How.RESTORE:
            assert conversion.source is not None
            laid = self.up(laid, conversion.source)
            return laid if full is None else self.layout.rearrange(laid, at(full, self._held(laid.axes)))
        assert conversion.target is not None
        if conversion.source is None:
            laid = self._with_batch(laid, reads, conversion.target)
        below = conversion.source.chain if conversion.source else ()
        for resolution in reversed([r for r in conversion.target.chain if r not in below]):
            laid = self.down(laid, resolution, conversion.how)
        return laid

    def converted(self, laid: Laid, conversions: Iterable[Conversion], full: Axes | None = None) -> Laid:
        for each in conversions:
            laid = self.convert(laid, each, full=full)
        return laid

    def _held(self, axes: Axes) -> list[Resolution]:
        atoms = {atom for axis in axes for atom in axis.atoms}
        return [each for each in self.grouped if each.groups in atoms]

    def _with_batch(self, laid: Laid, reads: Axes | None, target: Resolution) -> Laid:
        """A table that is the same for every sample, repeated for those over which the grouping differs."""
        if reads is None:
            return laid
        axes = (UNIT,) * (len(reads) - len(laid.axes)) + laid.axes
        wide = tuple(
            read if axis == UNIT and read.atoms & (target.batch.atoms | target.run.atoms) else axis
            for axis, read in zip(axes, reads, strict=True)
        )
        laid = self.layout.view(laid, axes)
        return laid if wide == axes else self._expanded(laid, wide)

    def broadcast(self, laid: Laid, reads: Axes) -> Laid:
        """An operand with its dimensions of length 1 as long as the operator reads them."""
        if len(laid.axes) != len(reads) or all(axis != UNIT for axis in laid.axes):
            return laid
        return self._expanded(laid, reads)

    def _expanded(self, laid: Laid, axes: Axes) -> Laid:
        return Laid(self.layout.call(aten.expand.default, laid.node, self.layout.lengths(axes)), axes)

    def up(self, laid: Laid, source: Resolution) -> Laid:
        """From a resolution to full length: every token gets its group's value."""

        def apply(part: fx.Node, axes: Axes, dim: int) -> fx.Node:
            index = self._laid(self.assign(source), source.batch, source.run, axes, dim)
            return self.layout.call(self.operators.up, part, index, dim=dim)

        def restored() -> Laid:
            node, axes = laid.node, laid.axes
            while dims := holding(axes, source.axis):
                node, axes = self.layout.along(node, axes, dims[-1], source.axis, source.run, apply)
            return Laid(node, axes)

        return self.layout.once(("up", laid, source), restored)

    def down(self, laid: Laid, target: Resolution, how: How) -> Laid:
        """One step from a resolution's parent to it."""
        tokens, grouping = tokens_at(target.run, target.parent), self.grouped[target]

        def apply(part: fx.Node, axes: Axes, dim: int) -> fx.Node:
            def along(field: fx.Node, tokens: Axis) -> fx.Node:
                return self._laid(field, target.batch, tokens, axes, dim)

            kept, gone = target.axis, atom_axis(target.gone)
            if how is How.PICK:
                return self.layout.call(self.operators.pick, part, along(grouping.kept, kept), dim=dim)
            fields = (
                along(grouping.kept, kept),
                along(grouping.source, gone),
                along(grouping.target, gone),
                along(grouping.kept_weight, kept),
                along(grouping.source_weight, gone),
            )
            return self.layout.call(self.operators.down, part, *fields, dim=dim)

        laid = self.together(laid, tokens)
        node, axes = laid.node, laid.axes
        while dims := holding(axes, tokens):
            node, axes = self.layout.along(node, axes, dims[-1], tokens, target.axis, apply)
        return Laid(node, axes)

    def together(self, laid: Laid, tokens: Axis) -> Laid:
        """Tokens that lie apart in a product, or over several dimensions, where the first of them lies."""
        return self.layout.rearrange(laid, gathered(laid.axes, tokens))

    def apart(self, laid: Laid, tokens: Axis) -> Laid:
        """Tokens within a sum that is a factor, `b·(1 + n)`: the sum on a dimension of its own."""
        for dim in holding(laid.axes, tokens):
            factors = laid.axes[dim].factors
            if len(factors) > 1 and any(isinstance(f, Axis) and tokens.atoms <= f.atoms for f in factors):
                axes = (*laid.axes[:dim], *(product([f]) for f in factors), *laid.axes[dim + 1 :])
                return self.layout.view(laid, axes)
        return laid

    def assign(self, resolution: Resolution) -> fx.Node:
        """The group of every token of the run at full length, `[B, N]`."""
        assign, parent = self.grouped[resolution].assign, resolution.parent
        if parent is None:
            return assign
        return self.layout.once(
            ("assign", resolution),
            lambda: self.layout.call(aten.gather.default, assign, 1, self.assign(parent)),
        )

    def places(self, resolution: Resolution) -> fx.Node:
        """Where along the run every group's representative stands, `[B, N]`."""
        kept, parent = self.grouped[resolution].kept, resolution.parent
        return kept if parent is None else self.layout.call(aten.gather.default, self.places(parent), 1, kept)

    def _laid(self, node: fx.Node, batch: Axis, tokens: Axis, axes: Axes, dim: int) -> fx.Node:
        """A tensor `[batch, tokens]` laid along axes whose dimension `dim` stands for the tokens.

        A dimension of the batch that lies on several axes, as in a matrix of pairs, is the one nearest to the tokens.
        """
        nearest = {
            min((d for d, axis in enumerate(axes) if d != dim and f in axis.factors), key=lambda d: abs(d - dim))
            for f in batch.factors
        }
        target = tuple(tokens if d == dim else axis if d in nearest else UNIT for d, axis in enumerate(axes))
        return self.layout.arrange(node, (batch, tokens), target)


def holding(axes: Axes, tokens: Axis) -> list[int]:
    """The dimensions that hold the tokens whole."""
    probe = Atom(tokens.size)
    return [dim for dim in range(len(axes)) if probe in replaced(axes[dim], tokens, probe).atoms]
