"""What every entry weighs in a sum over tokens: its group's mass, or its share of it where it was restored."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import fx

from passes.axes import UNIT, Axes, Axis, Factor, product
from passes.convert import Converter, Laid
from passes.layout import Layout
from passes.nodes import named
from passes.plan import Resolution, Weighing
from passes.rules import Kind, Use

aten = torch.ops.aten


class Weights(Protocol):
    """The options that say which sums carry mass."""

    @property
    def pooling(self) -> str: ...
    @property
    def proportional(self) -> bool: ...


@dataclass
class Weigher:
    """Emits the weights of sums."""

    converter: Converter
    policy: Weights
    _shares: dict[tuple[Resolution, bool], fx.Node] = field(default_factory=dict)

    @property
    def _layout(self) -> Layout:
        return self.converter.layout

    def weight(self, weighing: Weighing, operands: Sequence[Laid]) -> fx.Node | None:
        """The weight of each entry of an operand, laid along it; None where entries count alike."""
        pooled = weighing.use.kind in (Kind.MEAN, Kind.SUM)
        mass = self.policy.pooling == "mass" if pooled else self.policy.proportional
        if weighing.held and not mass:
            return None
        resolution = weighing.resolution
        grouping = self.converter.groupings[resolution.index]
        source: Axes
        if weighing.held:
            weight, source = grouping["mass"], (resolution.batch, resolution.axis)
        else:
            weight, source = self._share(resolution, mass), (resolution.batch, resolution.run)
        axes, dims = operands[weighing.use.operand].axes, weighing.use.dims
        if weighing.use.kind is Kind.KEYS:
            axes, dims = (*axes[:-2], UNIT, axes[-2]), (len(axes) - 1,)
        return self._spread(weight, source, axes, dims)

    def multiplied(self, operand: Laid, weight: fx.Node, node: fx.Node) -> Laid:
        """An operand of a contraction, each entry as often as it counts."""
        weight = self._layout.call(aten.to.dtype, weight, node.meta["val"].dtype)
        return Laid(self._layout.call(aten.mul.Tensor, operand.node, weight), operand.axes)

    def sum(self, node: fx.Node, use: Use, operand: Laid, weight: fx.Node) -> fx.Node:
        """A mean, a sum or a softmax with weights, in the place of `node`."""
        given, operators = named(node), self.converter.operators
        dtype = given.get("dtype") or node.meta["val"].dtype
        if use.kind is Kind.SOFTMAX:
            safe = node.target is aten._safe_softmax.default
            return self._layout.call(operators.softmax, operand.node, weight, dim=given["dim"], dtype=dtype, safe=safe)
        function = operators.mean if use.kind is Kind.MEAN else operators.sum
        keepdim = bool(given.get("keepdim", False))
        return self._layout.call(function, operand.node, weight, dims=list(use.dims), keepdim=keepdim, dtype=dtype)

    def _share(self, resolution: Resolution, mass: bool) -> fx.Node:
        """What each restored token weighs: its part of the group's mass, or of one. `[B, N]`."""
        if (resolution, mass) not in self._shares:
            grouping = self.converter.groupings[resolution.index]
            call = self._layout.call
            part = call(aten.reciprocal.default, grouping["size"])
            part = call(aten.mul.Tensor, part, grouping["mass"]) if mass else part
            self._shares[resolution, mass] = call(
                self.converter.operators.up, part, self.converter.assign(resolution), dim=1
            )
        return self._shares[resolution, mass]

    def _spread(self, weight: fx.Node, source: Axes, axes: Axes, dims: Sequence[int]) -> fx.Node:
        """Lay weights along axes, for a sum over `dims`. What stands beside the tokens on an axis weighs one."""
        atoms = {factor for axis in source for factor in axis.factors}
        apart = [(dim, product([factor])) for dim, axis in enumerate(axes) for factor in axis.factors]
        summed = {atom for atom in atoms if any(dim in dims and _shares(each, {atom}) for dim, each in apart)}
        thin = tuple(each if _shares(each, atoms if dim in dims else atoms - summed) else UNIT for dim, each in apart)
        laid = self._beside_ones(weight, source, thin)
        used = {dim for (dim, _), each in zip(apart, thin, strict=True) if each != UNIT}
        wide = tuple(each if dim in used else UNIT for dim, each in apart)
        if wide != thin:
            laid = self._layout.call(aten.expand.default, laid, self._layout.lengths(wide))
        return self._layout.reshape(laid, wide, tuple(axis if dim in used else UNIT for dim, axis in enumerate(axes)))

    def _beside_ones(self, weight: fx.Node, source: Axes, target: Axes) -> fx.Node:
        """Lay weights along axes of which one may be a sum; its other segments weigh one."""
        atoms = {factor for axis in source for factor in axis.factors}
        mixed = [dim for dim, axis in enumerate(target) if len(axis.segments) > 1 and axis not in atoms]
        if not mixed:
            return self._layout.arrange(weight, source, target)
        (dim,) = mixed
        pieces = []
        for segment in target[dim].segments:
            laid = (*target[:dim], product([Axis((segment,))]), *target[dim + 1 :])
            if set(segment) & atoms:
                pieces.append(self._layout.arrange(weight, source, laid))
            else:
                pieces.append(self._layout.call(aten.new_ones.default, weight, self._layout.lengths(laid)))
        return self._layout.call(aten.cat.default, pieces, dim)


def _shares(axis: Axis, atoms: Collection[Factor]) -> bool:
    """Whether an axis has one of the factors, in one product or in a segment of a sum."""
    return axis in atoms or any(factor in atoms for segment in axis.segments for factor in segment)
