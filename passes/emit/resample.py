"""Bring a value from one resolution to another, in the new graph.

[.., N, ..] -- down: merged or picked --> [.., N - r, ..] -- up: each token gets its group's value --> [.., N, ..]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

from tldr_compile.passes.axes import UNIT, Atom, Axes, Axis, product, replace, spread
from tldr_compile.passes.axes import axis as atom_axis
from tldr_compile.passes.emit.views import Layout
from tldr_compile.passes.operators import Operators
from tldr_compile.passes.plan import Conversion, How, Resolution, at, tokens_at

aten = torch.ops.aten

FIELDS = ("kept", "source", "target", "kept_weight", "source_weight", "mass", "size", "assign")
"""Of a grouping, in order."""


@dataclass(frozen=True)
class Laid:
    """A node of the new graph and the axes it is held along."""

    node: fx.Node
    axes: Axes


@dataclass
class Converter:
    """Emits conversions; `groupings` holds, by the number of a resolution, the nodes of its grouping's fields."""

    layout: Layout
    operators: Operators
    groupings: dict[int, dict[str, fx.Node]] = field(default_factory=dict)
    _assigned: dict[Resolution, fx.Node] = field(default_factory=dict)
    _restored: dict[tuple[fx.Node, Resolution], Laid] = field(default_factory=dict)

    def convert(self, laid: Laid, conversion: Conversion, reads: Axes | None = None) -> Laid:
        if conversion.how is How.RESTORE:
            assert conversion.source is not None
            return self.up(laid, conversion.source)
        assert conversion.target is not None
        if conversion.source is None:
            laid = self._with_batch(laid, reads, conversion.target)
        below = conversion.source.chain if conversion.source else ()
        for resolution in reversed([r for r in conversion.target.chain if r not in below]):
            laid = self.down(laid, resolution, conversion.how)
        return laid

    def converted(self, laid: Laid, conversions: Iterable[Conversion]) -> Laid:
        for each in conversions:
            laid = self.convert(laid, each)
        return laid

    def _with_batch(self, laid: Laid, reads: Axes | None, target: Resolution) -> Laid:
        """A table that is the same for every sample, repeated for those over which the grouping differs."""
        if reads is None:
            return laid
        axes = (UNIT,) * (len(reads) - len(laid.axes)) + laid.axes
        wide = tuple(
            read if axis == UNIT and read.atoms & (target.batch.atoms | target.run.atoms) else axis
            for axis, read in zip(axes, reads, strict=True)
        )
        if wide == axes:
            return Laid(self.layout.reshape(laid.node, laid.axes, axes), axes)
        node = self.layout.reshape(laid.node, laid.axes, axes)
        return Laid(self.layout.call(aten.expand.default, node, self.layout.lengths(wide)), wide)

    def broadcast(self, laid: Laid, reads: Axes) -> Laid:
        """An operand with its dimensions of length 1 as long as the operator reads them."""
        if len(laid.axes) != len(reads) or all(axis != UNIT for axis in laid.axes):
            return laid
        return Laid(self.layout.call(aten.expand.default, laid.node, self.layout.lengths(reads)), reads)

    def up(self, laid: Laid, source: Resolution) -> Laid:
        """From a resolution to full length: every token gets its group's value."""
        key = (laid.node, source)
        if key not in self._restored:

            def apply(part: fx.Node, axes: Axes, dim: int) -> fx.Node:
                index = self._laid(self.assign(source), source.batch, source.run, axes, dim)
                return self.layout.call(self.operators.up, part, index, dim=dim)

            node, axes = laid.node, laid.axes
            while dims := holding(axes, source.axis):
                node, axes = self.layout.along(node, axes, dims[-1], source.axis, source.run, apply)
            self._restored[key] = Laid(node, axes)
        return self._restored[key]

    def down(self, laid: Laid, target: Resolution, how: How) -> Laid:
        """One step from a resolution's parent to it."""
        tokens, grouping = tokens_at(target.run, target.parent), self.groupings[target.index]

        def apply(part: fx.Node, axes: Axes, dim: int) -> fx.Node:
            def along(field: str) -> fx.Node:
                tokens = target.axis if field.startswith("kept") else atom_axis(target.gone)
                return self._laid(grouping[field], target.batch, tokens, axes, dim)

            if how is How.PICK:
                return self.layout.call(self.operators.pick, part, along("kept"), dim=dim)
            fields = ("kept", "source", "target", "kept_weight", "source_weight")
            return self.layout.call(self.operators.down, part, *map(along, fields), dim=dim)

        wanted, laid = at(laid.axes, [target]), self.flat(laid, tokens)
        node, axes = laid.node, laid.axes
        while dims := holding(axes, tokens):
            node, axes = self.layout.along(node, axes, dims[-1], tokens, target.axis, apply)
        if target.parent is None:
            node, axes = self.layout.reshape(node, axes, wanted), wanted
        return Laid(node, axes)

    def flat(self, laid: Laid, tokens: Axis) -> Laid:
        """A run that lies over several dimensions on one of them."""
        while (dims := spread(laid.axes, tokens)) is not None:
            axes = (*laid.axes[: dims[0]], product(laid.axes[dims[0] : dims[1]]), *laid.axes[dims[1] :])
            laid = Laid(self.layout.reshape(laid.node, laid.axes, axes), axes)
        return laid

    def apart(self, laid: Laid, tokens: Axis) -> Laid:
        """Tokens within a sum that is a factor, `b·(1 + n)`: the sum on a dimension of its own."""
        for dim in holding(laid.axes, tokens):
            factors = laid.axes[dim].factors
            if len(factors) > 1 and any(isinstance(f, Axis) and tokens.atoms <= f.atoms for f in factors):
                axes = (*laid.axes[:dim], *(product([f]) for f in factors), *laid.axes[dim + 1 :])
                return Laid(self.layout.reshape(laid.node, laid.axes, axes), axes)
        return laid

    def assign(self, resolution: Resolution) -> fx.Node:
        """The group of every token of the run at full length, `[B, N]`."""
        if resolution not in self._assigned:
            assign = self.groupings[resolution.index]["assign"]
            if resolution.parent is not None:
                assign = self.layout.call(aten.gather.default, assign, 1, self.assign(resolution.parent))
            self._assigned[resolution] = assign
        return self._assigned[resolution]

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
    return [dim for dim in range(len(axes)) if probe in replace(axes[dim], tokens, probe).atoms]
