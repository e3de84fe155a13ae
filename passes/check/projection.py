"""What a merged graph means: the original graph at full length, its streams replaced by their projections.

This interpreter is the definition that the rewriter is checked against. It shares the plan and the groupings with it
and nothing else: no value is ever short, tokens are found by coordinates, sums are weighed token by token.

    merge, float operand      x_i  <-  sum over the group of i of  weight_j x_j
    merge, table operand      x_i  <-  x at the group's representative
    sum over tokens           token i weighs  w_i = (m_g / |g|) · N / Σ m,  over its run for each value of its batch
    counting tokens           each token counts 1
    probabilities leave       p_i  <-  w_i p_i
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from tldr_compile.passes.axes import Atom, Axes, Axis, Factor, Kind, Use, gathered, product, replace, subaxis
from tldr_compile.passes.capture import SDPA
from tldr_compile.passes.fx_utils import named
from tldr_compile.passes.options import Policy
from tldr_compile.passes.plan import Conversion, How, Plan, Resolution, Step, Weighing, Weight, at
from tldr_compile.passes.sizes import Size, one_symbol, size

aten = torch.ops.aten


@dataclass(frozen=True)
class Groups:
    """One resolution, told for every token of the full run: all `[B, N]`."""

    group: Tensor
    weight: Tensor
    representative: Tensor
    mass: Tensor
    size: Tensor


def full_length(plan: Plan, groupings: Mapping[int, Mapping[str, Tensor]]) -> dict[int, Groups]:
    """Every merge's grouping, composed with those before it.

    Only indices and weights are taken from it: masses follow from the weights (a representative brings its own mass,
    which is `kept_weight` of the group's), sizes from counting.
    """
    found: dict[int, Groups] = {}
    for merge in plan.merges:
        fields, parent = groupings[merge.target.index], merge.target.parent
        step = torch.zeros(fields["assign"].shape, dtype=torch.float64)
        step.scatter_(1, fields["kept"], fields["kept_weight"].double())
        step.scatter_(1, fields["source"], fields["source_weight"].double())
        above = found[parent.index] if parent else None
        group = fields["assign"] if above is None else fields["assign"].gather(1, above.group)
        kept = fields["kept"].gather(1, group)
        representative = kept if above is None else _representative(above, kept)
        ones = torch.ones(group.shape, dtype=torch.float64)
        brought = ones if above is None else above.mass.gather(1, representative)
        found[merge.target.index] = Groups(
            group=group,
            weight=step if above is None else step.gather(1, above.group) * above.weight,
            representative=representative,
            mass=brought / fields["kept_weight"].double().gather(1, group),
            size=torch.zeros_like(ones).scatter_add(1, group, ones).gather(1, group),
        )
    return found


def _representative(above: Groups, kept: Tensor) -> Tensor:
    """The token at full length that stands for group `kept` of the resolution above."""
    first = torch.zeros(kept.shape[0], int(above.group.max()) + 1, dtype=torch.int64)
    first.scatter_(1, above.group, above.representative)
    return first.gather(1, kept)


class Projection(fx.Interpreter):
    """Runs the plan's graph at full length with the meaning that the plan gives it."""

    def __init__(self, plan: Plan, groups: Mapping[int, Groups], policy: Policy) -> None:
        super().__init__(plan.typed.captured.graph, garbage_collect_values=not plan.leaving)
        self.plan, self.groups, self.policy = plan, groups, policy
        self.symbols: dict[sympy.Symbol, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return self._output(n)
        step = self.plan.steps.get(n)
        if step is None or n.target is getitem or not (step.conversions or step.weighings or step.scalings):
            result = super().run_node(n)
        else:
            result = self._call(n, step)
        self._learn(n, result)
        for merge in self.plan.merges_after(n):
            projected = self._project(result, self.plan.typed.value(n).axes, merge.target, How.MERGE)
            result = torch.empty_like(result).copy_(projected)  # laid in memory as before
        return result

    def _learn(self, node: fx.Node, value: Any) -> None:
        traced = node.meta.get("val")
        pairs = zip(traced.shape, value.shape, strict=True) if isinstance(traced, Tensor) else [(traced, value)]
        for symbol, number in pairs:
            if isinstance(symbol, torch.SymInt) and (solved := one_symbol(size(symbol))) is not None:
                name, times, offset = solved
                self.symbols[name] = (int(number) - offset) // times

    def _number(self, length: Size) -> int:
        return length if isinstance(length, int) else int(length.subs(self.symbols))

    def _call(self, node: fx.Node, step: Step) -> Any:
        operands = [self.env[each] for each in self.plan.typed.operands(node)]
        typed, own = self.plan.typed.calls.get(node), self.plan.typed.own(node)
        for conversion in step.conversions:
            if conversion.target is not None and typed is not None:
                number = conversion.operand
                reads = typed.reads[number]
                wide = _widened(operands[number], reads, self._number)
                operands[number] = self._project(
                    wide, reads[len(reads) - wide.ndim :], conversion.target, conversion.how
                )
        operands = self._scaled(step, operands, own)
        weights: dict[Use, Tensor] = {}
        for weighing in step.weighings:
            assert typed is not None
            each = self._weight(weighing, typed.reads[weighing.use.operand])
            weights[weighing.use] = weights[weighing.use] * each if weighing.use in weights else each
        if node.target is SDPA:
            return _attention(node, operands, next(iter(weights.values()), None), self.fetch_args_kwargs_from_env(node))
        for use, weight in weights.items():
            if use.kind in (Kind.CONTRACT, Kind.LINEAR):
                operands[use.operand] = (operands[use.operand] * weight).to(operands[use.operand].dtype)
            else:
                weighing = next(w for w in step.weighings if w.use is use)
                dtype = weighing.dtype or node.meta["val"].dtype
                result = _weighed(use.kind, operands[0], weight, use.dims, named(node), dtype, weighing.partial)
                return result.nan_to_num(0.0) if node.target is aten._safe_softmax.default else result
        feed = iter(operands)

        def value(each: fx.Node) -> Any:
            return next(feed) if isinstance(each.meta.get("val"), Tensor) else self.env[each]

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _output(self, node: fx.Node) -> Any:
        results = self.plan.typed.operands(node)
        operands = self._scaled(self.plan.steps[node], [self.env[each] for each in results], self.plan.typed.own(node))
        for each in self.plan.leaving:
            left = operands[each.operand] if each.key is None else self.env[each.value]
            axes = self.plan.typed.value(each.value).axes
            left = self._left(left, axes, each.conversions, each.held)
            if each.key is not None:
                ranks = self.env[each.key].argsort().argsort()
                left = left[self._left(ranks, axes[:1], each.key_conversions, each.held).argsort()]
            operands[each.operand] = left
        feed = iter(operands)
        return fx.node.map_arg(
            node.args[0], lambda n: next(feed) if isinstance(n.meta.get("val"), Tensor) else self.env[n]
        )

    def _left(self, x: Tensor, axes: Axes, conversions: Sequence[Conversion], held: Sequence[Resolution]) -> Tensor:
        """A value as it leaves, with one entry for each group."""
        for conversion in conversions:
            assert conversion.target is not None
            x = self._project(x, axes, conversion.target, conversion.how)
        for number, resolution in enumerate(held):
            x = self.shorten(x, at(axes, held[:number]), resolution)
        return x

    def _scaled(self, step: Step, operands: list[Tensor], own: Sequence[Axes]) -> list[Tensor]:
        """Operands that are distributions, with the weights of their tokens."""
        for scaling in step.scalings:
            axes = own[scaling.operand]
            each = self._token_weights(scaling.weight, axes, (scaling.dim,), self.policy.proportional)
            if scaling.weight.held:  # it leaves with one entry for each group, which stands for all of its tokens
                each = each * self._token_sizes(scaling.weight, axes, (scaling.dim,))
            operands[scaling.operand] = (operands[scaling.operand] * each).to(operands[scaling.operand].dtype)
        return operands

    # --- coordinates ---

    def _coordinates(self, axis: Axis, factor: Factor) -> Tensor:
        """For every position along an axis its coordinate in one factor, -1 where the factor is not; `[size]`."""
        if factor == axis:
            return torch.arange(self._number(axis.size))
        parts = []
        for segment in axis.segments:
            sizes = [self._number(each.size) for each in segment]
            if factor in segment:
                parts.append(_unravel(sizes, segment.index(factor)))
            elif nested := [k for k, each in enumerate(segment) if isinstance(each, Axis) and factor in each.atoms]:
                inner = self._coordinates(segment[nested[0]], factor)  # type: ignore[arg-type]
                parts.append(inner[_unravel(sizes, nested[0])])
            else:
                parts.append(torch.full((self._number(product([Axis((segment,))]).size),), -1))
        return torch.cat(parts)

    def _across(self, axes: Axes, factors: Sequence[Factor], first: Sequence[int] = ()) -> Tensor:
        """The row-major number of some factors' values at every entry, -1 where one is missing; broadcastable.

        A factor on several dimensions is read off those in `first`.
        """
        number, missing = (
            torch.zeros((1,) * len(axes), dtype=torch.int64),
            torch.zeros((1,) * len(axes), dtype=torch.bool),
        )
        for factor in factors:
            dims = [d for d in (*first, *range(len(axes))) if factor in axes[d].atoms or factor in axes[d].factors]
            shape = [1] * len(axes)
            shape[dims[0]] = -1
            at = self._coordinates(axes[dims[0]], factor).reshape(shape)
            number, missing = number * self._number(factor.size) + at.clamp(min=0), missing | (at < 0)
        return number.masked_fill(missing, -1)

    # --- meaning ---

    def _weight(self, weighing: Weighing, axes: Axes) -> Tensor:
        """What every entry of an operand weighs in a sum over some dimensions."""
        if weighing.counts:
            return torch.ones((1,) * len(axes))
        kind, dims = weighing.use.kind, weighing.use.dims
        mass = self.policy.pooling == "mass" if kind in (Kind.MEAN, Kind.SUM) else self.policy.proportional
        run = weighing.weight.resolution.run
        several = [dim for dim in dims if axes[dim].atoms & run.atoms]
        pairs = any(sum(atom in axes[dim].atoms for dim in several) > 1 for atom in run.atoms)
        weights = torch.ones((1,) * len(axes))
        for each in [(dim,) for dim in several] if pairs else [dims]:  # of pairs of tokens, the weights of both
            weights = weights * self._token_weights(weighing.weight, axes, each, mass)
        if weighing.partial and kind in (Kind.CONTRACT, Kind.LINEAR):
            weights = weights / weights.mean(dims, keepdim=True)
        return weights

    def _token_weights(self, weight: Weight, axes: Axes, dims: Sequence[int], mass: bool) -> Tensor:
        """`w_i` of every entry, averaged over what of the run has been summed; 1 of what is no token of the run."""
        groups = self.groups[weight.resolution.index]
        share = (groups.mass if mass else torch.ones_like(groups.mass)) / groups.size
        share = share * (share.shape[1] / share.sum(1, keepdim=True))
        return self._spread(share, weight, axes, dims)

    def _token_sizes(self, weight: Weight, axes: Axes, dims: Sequence[int]) -> Tensor:
        return self._spread(self.groups[weight.resolution.index].size, weight, axes, dims)

    def _spread(self, share: Tensor, weight: Weight, axes: Axes, dims: Sequence[int]) -> Tensor:
        """A number of every token, `[batch, run]`, at every entry along axes; 1 at what is no token."""
        run, batch = weight.resolution.run, weight.resolution.batch
        left: Axis = run
        if weight.gone:
            sizes = [self._number(factor.size) for factor in run.factors]
            summed = [1 + k for k, factor in enumerate(run.factors) if factor in weight.gone]
            share = share.reshape(len(share), *sizes).mean(summed).flatten(1)
            left = product(factor for factor in run.factors if factor not in weight.gone)
        probe = Atom(left.size)
        marked = tuple(replace(each, left, probe) for each in axes)
        whole = any(probe in each.atoms for each in marked)
        token = self._across(marked, [probe] if whole else left.factors, dims)
        sample = self._across(marked, batch.factors, dims)
        sample, token = torch.broadcast_tensors(sample, token)
        return share[sample.clamp(min=0), token.clamp(min=0)].masked_fill(token < 0, 1.0)

    def _project(self, x: Tensor, axes: Axes, resolution: Resolution, how: How) -> Tensor:
        """`up(down(x))` wherever the run is held whole: its tokens brought together, and put back."""
        together, probe = gathered(axes, resolution.run), Atom(resolution.run.size)
        x = self._moved(x, axes, together)
        for dim, axis in enumerate(together):
            marked = replace(axis, resolution.run, probe)
            if probe in marked.atoms:
                whole = (*together[:dim], marked, *together[dim + 1 :])
                x = self._project_dimension(x, whole, dim, probe, resolution, how)
        return self._moved(x, together, axes)

    def _moved(self, x: Tensor, source: Axes, target: Axes) -> Tensor:
        """The entries of `x` with the factors of its axes in another order; sums are moved part by part."""
        if source == target:
            return x
        for dim, (one, two) in enumerate(zip(source, target, strict=True)):
            if len(one.segments) > 1 and one != two:
                sizes = [self._number(subaxis([each]).size) for each in one.segments]
                parts = [
                    self._moved(part, _with(source, dim, subaxis([old])), _with(source, dim, subaxis([new])))
                    for part, old, new in zip(x.split(sizes, dim), one.segments, two.segments, strict=True)
                ]
                return self._moved(torch.cat(parts, dim), _with(source, dim, two), target)
        have, wanted = ([f for axis in axes for f in axis.factors] for axes in (source, target))
        order: list[int] = []
        for factor in wanted:
            order.append(next(k for k, f in enumerate(have) if k not in order and _same_atoms(f, factor)))
        apart = x.reshape([self._number(f.size) for f in have]).permute(order)
        moved = self._moved(apart, tuple(product([have[k]]) for k in order), tuple(product([f]) for f in wanted))
        return moved.reshape([self._number(axis.size) for axis in target])

    def _project_dimension(
        self, x: Tensor, axes: Axes, dim: int, probe: Atom, resolution: Resolution, how: How
    ) -> Tensor:
        groups = self.groups[resolution.index]
        token = self._coordinates(axes[dim], probe)
        beside = self._beside(axes[dim], probe)
        sample = self._across(axes, resolution.batch.factors, (dim,)).expand(x.shape).movedim(dim, -1)
        moved = x.movedim(dim, -1)
        rows, samples = moved.reshape(-1, x.shape[dim]), sample.reshape(-1, x.shape[dim])
        result = rows.clone()
        for number in range(groups.group.shape[0]):
            here = samples == number
            if not here.any():
                continue
            row, place = (here.any(d).nonzero()[:, 0] for d in (1, 0))
            part = rows[row][:, place]
            matrix = _matrix(token[place], beside[place], groups, number, how)
            picked = how is How.PICK
            projected = part[:, matrix.argmax(-1)] if picked else (part.double() @ matrix.T).to(x.dtype)
            result[row[:, None], place] = torch.where(here[row][:, place], projected, part)
        return result.reshape(moved.shape).movedim(-1, dim).contiguous()

    def shorten(self, x: Tensor, axes: Axes, resolution: Resolution) -> Tensor:
        """A projected value `[..., run, ...]` with one entry for each group, as it is held."""
        together, probe = gathered(axes, resolution.run), Atom(resolution.run.size)
        x, axes = self._moved(x, axes, together), together
        for dim, axis in enumerate(axes):
            full = replace(axis, resolution.run, probe)
            if probe in full.atoms:
                short = replace(axis, resolution.run, resolution.groups)
                index = self._representatives((*axes[:dim], short, *axes[dim + 1 :]), full, probe, dim, resolution)
                x = x.gather(dim, index.expand([index.shape[d] if d == dim else n for d, n in enumerate(x.shape)]))
        return x

    def _representatives(self, axes: Axes, full: Axis, probe: Atom, dim: int, resolution: Resolution) -> Tensor:
        """At every entry of a short dimension the position at full length that stands for it; broadcastable."""
        groups = self.groups[resolution.index]
        group, beside = self._coordinates(axes[dim], resolution.groups), self._beside(axes[dim], resolution.groups)
        place = {
            key: position
            for position, key in enumerate(_keys(self._coordinates(full, probe), self._beside(full, probe)))
        }
        tables = []
        for assigned, representative in zip(groups.group, groups.representative, strict=True):
            stands = torch.zeros(int(assigned.max()) + 1, dtype=torch.int64)
            stands[assigned] = representative
            token = torch.where(group >= 0, stands[group.clamp(min=0)], group)
            tables.append([place[key] for key in _keys(token, beside)])
        sample = self._across(axes, resolution.batch.factors, (dim,)).clamp(min=0)
        position = torch.arange(len(group)).reshape([-1 if d == dim else 1 for d in range(len(axes))])
        return torch.tensor(tables)[sample, position]

    def _beside(self, axis: Axis, probe: Atom) -> Tensor:
        """What else tells positions along an axis apart: the number of the other factors' values; `[size]`."""
        number = torch.zeros(self._number(axis.size), dtype=torch.int64)
        for factor in _multiplied_with(axis, probe):
            number = number * (self._number(factor.size) + 1) + self._coordinates(axis, factor)
        return number


def _with(axes: Axes, dim: int, axis: Axis) -> Axes:
    return (*axes[:dim], axis, *axes[dim + 1 :])


def _same_atoms(one: Factor, other: Factor) -> bool:
    """Whether two factors are one atom, or sums of the same atoms in whatever order."""
    if isinstance(one, Axis) and isinstance(other, Axis):
        return one.atoms == other.atoms
    return one == other


def _multiplied_with(axis: Axis, probe: Atom) -> list[Atom]:
    """The atoms that stand in a product with one."""
    for segment in axis.segments:
        inner = [each for each in segment if isinstance(each, Axis) and probe in each.atoms]
        if probe in segment or inner:
            beside = [each for each in segment if isinstance(each, Atom) and each is not probe]
            return beside + [atom for each in inner for atom in _multiplied_with(each, probe)]
    return []


def _keys(token: Tensor, beside: Tensor) -> list[tuple[int, int]]:
    """A name for every position: the token and what stands beside it, or how many such as it came before."""
    outside = (token < 0).cumsum(0)
    return [
        (int(t), int(b)) if t >= 0 else (-1, int(number)) for t, b, number in zip(token, beside, outside, strict=True)
    ]


def _unravel(sizes: Sequence[int], which: int) -> Tensor:
    grid = torch.arange(sizes[which]).reshape([-1 if k == which else 1 for k in range(len(sizes))])
    return grid.expand(*sizes).reshape(-1)


def _matrix(token: Tensor, beside: Tensor, groups: Groups, number: int, how: How) -> Tensor:
    """Row i says of which entries the new entry i is made; protected entries are made of themselves."""
    is_token = token >= 0
    at = token.clamp(min=0)
    group = groups.group[number][at]
    same = (group[:, None] == group[None, :]) & (beside[:, None] == beside[None, :])
    if how is How.PICK:
        same = same & (groups.representative[number][at][:, None] == at[None, :])
        rows = same.double()
    else:
        rows = same.double() * groups.weight[number][at][None, :]
    among = is_token[:, None] & is_token[None, :]
    return torch.where(among, rows, torch.eye(len(token), dtype=torch.float64))


def _widened(x: Tensor, reads: Axes, number: Any) -> Tensor:
    """An operand broadcast to the axes it is read along."""
    shape = [number(axis.size) for axis in reads]
    padded = x.reshape((1,) * (len(shape) - x.ndim) + tuple(x.shape))
    return padded.expand(shape)


def _weighed(
    kind: Kind, x: Tensor, weight: Tensor, dims: Sequence[int], given: Mapping[str, Any], dtype: torch.dtype, part: bool
) -> Tensor:
    """A softmax, mean or sum; the sum over a part of a run is that part's size times its mean."""
    wide, weight, dims = x.double(), weight.expand(x.shape), tuple(dims)
    if kind is Kind.SOFTMAX:
        exponential = (wide - wide.amax(dims, keepdim=True)).exp()
        return (exponential / (weight * exponential).sum(dims, keepdim=True)).to(dtype)
    keepdim = bool(given.get("keepdim", False))
    total = (wide * weight).sum(dims, keepdim=keepdim)
    if kind is Kind.MEAN:
        total = total / weight.sum(dims, keepdim=keepdim)
    if kind is Kind.SUM and part:
        total = total / weight.mean(dims, keepdim=keepdim)
    return total.to(dtype)


def _attention(node: fx.Node, operands: Sequence[Tensor], weight: Tensor | None, arguments: Any) -> Tensor:
    """softmax(scale q k' + mask + log weight) v, written out."""
    query, key, value, *mask = operands
    given = named(node)
    if given.get("enable_gqa", False):
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    scale = given.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query.double() @ key.double().mT) * scale
    if mask:
        scores = scores.masked_fill(~mask[0], -torch.inf) if mask[0].dtype == torch.bool else scores + mask[0].double()
    if given.get("is_causal", False):
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if weight is not None:
        scores = scores + weight[..., 0].unsqueeze(-2).log()
    return (scores.softmax(-1) @ value.double()).to(query.dtype)
