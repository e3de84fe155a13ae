"""What every token weighs in a sum: its part of its group's mass, on average 1. There is one weight for all sums.

    a token of the run       w_i = (m_g / |g|) · N / Σ m         over the run, for each value of the grouping's batch
    a group                  the sum of its tokens:  m_g · N / Σ m
    what is left of a run    once a part of it has been summed:  the mean of w over that part
    everything else          1

Without masses (`pooling="plain"`, `proportional=False`) every group has the mass 1.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from tldr_compile.passes.axes import UNIT, Axes, Axis, Factor, Kind, Use, product
from tldr_compile.passes.emit.resample import Converter
from tldr_compile.passes.emit.views import Laid, Layout
from tldr_compile.passes.fx_utils import named
from tldr_compile.passes.options import Policy
from tldr_compile.passes.plan import Resolution, Scaling, Weighing, Weight

aten = torch.ops.aten

# Sums that a constant factor of all weights does not change.
_RELATIVE = frozenset({Kind.MEAN, Kind.KEYS})


def carries_mass(kind: Kind, policy: Policy) -> bool:
    """Whether the options give mass to such a sum."""
    return policy.pooling == "mass" if kind in (Kind.MEAN, Kind.SUM) else policy.proportional


@dataclass(frozen=True)
class Weigher:
    """Emits the weights of sums."""

    converter: Converter
    policy: Policy

    @property
    def _layout(self) -> Layout:
        return self.converter.layout

    def weights(self, weighings: Sequence[Weighing], operands: Sequence[Laid]) -> dict[Use, fx.Node]:
        """For every use of a call what each entry of its operand weighs, laid along it; weights of two runs multiply.

        A use is missing where all entries count alike.
        """
        found: dict[Use, fx.Node] = {}
        for each in weighings:
            if (weight := self._weight(each, operands)) is not None:
                before = found.get(each.use)
                found[each.use] = weight if before is None else self._layout.call(aten.mul.Tensor, before, weight)
        return found

    def _weight(self, weighing: Weighing, operands: Sequence[Laid]) -> fx.Node | None:
        use, mass = weighing.use, carries_mass(weighing.use.kind, self.policy)
        axes, dims = operands[use.operand].axes, use.dims
        if use.kind is Kind.KEYS:
            axes, dims = (*axes[:-2], UNIT, axes[-2]), (len(axes) - 1,)
        if weighing.weight.held and not mass and use.kind in _RELATIVE and _alone(weighing.weight, axes, dims):
            return None
        if weighing.counts:
            resolution = weighing.weight.resolution
            sizes = Laid(self.converter.grouped[resolution].size, (resolution.batch, resolution.axis))
            return self._over(sizes, axes, dims)
        laid = self._laid(weighing.weight, mass)
        weight = self._over(laid, axes, dims)
        if weighing.partial and use.kind not in (*_RELATIVE, Kind.SOFTMAX):
            mean = self._layout.call(aten.mean.dim, weight, list(dims), True)
            weight = self._layout.call(aten.div.Tensor, weight, mean)
        return weight

    def scaled(self, operand: Laid, scaling: Scaling) -> Laid:
        """A distribution, each entry multiplied by what its token weighs."""
        laid = self._laid(scaling.weight, self.policy.proportional)
        weight = self._spread(laid.node, laid.axes, operand.axes, (scaling.dim,))
        return self.multiplied(operand, weight)

    def multiplied(self, operand: Laid, weight: fx.Node) -> Laid:
        """An operand, each entry as often as it counts, in its own dtype."""
        product = self._layout.call(self.converter.operators.multiply, operand.node, weight)
        return Laid(product, operand.axes)

    def sum(self, node: fx.Node, weighing: Weighing, operand: Laid, weight: fx.Node) -> fx.Node:
        """A mean, a sum or a softmax with weights, in the place of `node`."""
        given, operators, use = named(node), self.converter.operators, weighing.use
        dtype = weighing.dtype or given.get("dtype") or _other_dtype(node)
        if use.kind is Kind.SOFTMAX:
            safe = node.target is aten._safe_softmax.default
            return self._layout.call(operators.softmax, operand.node, weight, dim=given["dim"], dtype=dtype, safe=safe)
        function = operators.mean if use.kind is Kind.MEAN else operators.sum
        keepdim = bool(given.get("keepdim", False))
        return self._layout.call(function, operand.node, weight, dims=list(use.dims), keepdim=keepdim, dtype=dtype)

    def _laid(self, weight: Weight, mass: bool) -> Laid:
        if weight.held:
            groups = self._of_groups(weight.resolution, mass)
            return Laid(groups, (weight.resolution.batch, weight.resolution.axis))
        return self._of_tokens(weight, mass)

    def _of_groups(self, resolution: Resolution, mass: bool) -> fx.Node:
        """What each group weighs, `[B, N - r]` float32."""

        def shares() -> fx.Node:
            call, masses = self._layout.call, self.converter.grouped[resolution].mass
            masses = masses if mass else call(aten.ones_like.default, masses)
            total = call(aten.sum.dim_IntList, masses, [1], True)
            share = call(aten.div.Tensor, masses, total)
            return call(aten.mul.Tensor, share, self._layout.length(resolution.run))

        return self._layout.once(("weight of groups", resolution, mass), shares)

    def _of_tokens(self, weight: Weight, mass: bool) -> Laid:
        """What each token weighs at full length, `[B, N]` float32; less what has been summed."""
        resolution, gone = weight.resolution, weight.gone

        def parts() -> Laid:
            call, sizes = self._layout.call, self.converter.grouped[resolution].size
            part = call(aten.div.Tensor, self._of_groups(resolution, mass), sizes)
            node = call(self.converter.operators.up, part, self.converter.assign(resolution), dim=1)
            axes: Axes = (resolution.batch, resolution.run)
            if gone:
                apart = (resolution.batch, *(product([factor]) for factor in resolution.run.factors))
                dims = [dim for dim, each in enumerate(apart) if each.atoms & gone]
                node = call(aten.mean.dim, self._layout.reshape(node, axes, apart), dims)
                axes = tuple(each for dim, each in enumerate(apart) if dim not in dims)
            return Laid(node, axes)

        return self._layout.once(("weight of tokens", resolution, gone, mass), parts)

    def _over(self, laid: Laid, axes: Axes, dims: Sequence[int]) -> fx.Node:
        """Weights for a sum over `dims`; of a matrix of pairs of tokens, those of both."""
        tokens = {factor for axis in laid.axes[1:] for factor in axis.factors}
        several = [dim for dim in dims if _shares(axes[dim], tokens)]
        pairs = len(several) > 1 and any(sum(_shares(axes[d], {t}) for d in several) > 1 for t in tokens)
        weight, *others = [
            self._spread(laid.node, laid.axes, axes, each) for each in ([(d,) for d in several] if pairs else [dims])
        ]
        for other in others:
            weight = self._layout.call(aten.mul.Tensor, weight, other)
        return weight

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
        """Lay weights along axes of which some may be sums; their other segments weigh one."""
        atoms = {factor for axis in source for factor in axis.factors}
        mixed = [dim for dim, axis in enumerate(target) if len(axis.segments) > 1 and axis not in atoms]
        if not mixed:
            return self._layout.arrange(weight, source, target)
        dim, pieces = mixed[0], []
        for segment in target[dim].segments:
            laid = (*target[:dim], product([Axis((segment,))]), *target[dim + 1 :])
            if set(segment) & atoms:
                pieces.append(self._beside_ones(weight, source, laid))
            else:
                pieces.append(self._layout.call(aten.new_ones.default, weight, self._layout.lengths(laid)))
        return self._layout.call(aten.cat.default, pieces, dim)


def _shares(axis: Axis, atoms: Collection[Factor]) -> bool:
    """Whether an axis has one of the factors, in one product or in a segment of a sum."""
    return axis in atoms or any(factor in atoms for segment in axis.segments for factor in segment)


def _alone(weight: Weight, axes: Axes, dims: Sequence[int]) -> bool:
    """Whether a sum runs over groups of one resolution and nothing beside them."""
    groups = weight.resolution.groups
    return all(groups in segment for dim in dims for segment in axes[dim].segments if axes[dim].atoms)


def _other_dtype(node: fx.Node) -> torch.dtype | None:
    """The dtype of a result, where it is not that of what is summed."""
    summed, *_ = node.all_input_nodes
    result: torch.dtype = node.meta["val"].dtype
    return None if summed.meta["val"].dtype == result else result
