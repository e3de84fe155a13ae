"""Which tokens become one, and what a merge does to a value over tokens: down, pick and up.

A merge splits the N tokens of a sample into N - r groups. Each group is represented by the token it *kept*; the other
tokens are *sources* that joined a *target* group. Indices are found without gradients, weights carry them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .reductions import REDUCTIONS, Tokens
from .reference import wide


class Grouping(NamedTuple):
    """Everything that a merge of `N` tokens into `N - r` groups decided; the weights of a group sum to 1."""

    kept: Tensor
    """int64 `[B, N-r]`: positions of the groups' representatives, in the order of the result."""
    source: Tensor
    """int64 `[B, r]`: positions of the tokens that went away, ascending."""
    target: Tensor
    """int64 `[B, r]`: the group that each source joins."""
    kept_weight: Tensor
    """float32 `[B, N-r]`: weight of each representative in its group."""
    source_weight: Tensor
    """float32 `[B, r]`: weight of each source in its group."""
    mass: Tensor
    """float32 `[B, N-r]`: mass of each group."""
    size: Tensor
    """float32 `[B, N-r]`: how many tokens of the original run each group stands for."""
    assign: Tensor
    """int64 `[B, N]`: the group of every token."""


def group(
    metric: Tensor,
    saliency: Tensor | None,
    mass: Tensor,
    size: Tensor,
    r: int,
    *,
    reduction: str = "merge",
    seed: int = 0,
    depth: float = 0.0,
    margin: float | None = None,
    place: Tensor | None = None,
) -> Grouping:
    """Decide which `r` of `N` tokens go where: steps 5 and 6 of vid-TLDR (arXiv 2403.13347, section 3).

    `metric [B, N, C]`, `N >= 2`; `saliency [B, N]`, None for 1 everywhere; `mass`, `size [B, N]`; `0 <= r <= N // 2`.
    All are floats; the fields of the result say their own shapes and dtypes.
    `reduction` names one of `REDUCTIONS`, which read `seed`, `depth` and `margin` as `Tokens` says. A source gives its
    size to the group that it joins; and its value and mass, weighed by its saliency, if the reduction gives. Groups
    come in the order of the reduction, or of what `place` (int64 `[B, N]`) says of their representatives.

    Raises:
        ValueError: no reduction has that name, or it ranks by saliency and that is None.

    >>> ones = torch.ones(2, 1568)
    >>> found = ops.group(torch.randn(2, 1568, 768), None, ones, ones, 768)
    >>> found.kept.shape, found.source.shape, found.assign.shape
    (torch.Size([2, 800]), torch.Size([2, 768]), torch.Size([2, 1568]))
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, not {reduction!r}")
    chosen = REDUCTIONS[reduction]
    with torch.autocast(metric.device.type, enabled=False):
        told = None if saliency is None else saliency.detach()
        split = chosen.choose(Tokens(metric.detach(), told, r, seed, depth, margin))
    kept, source, target = split
    if place is not None:
        order = place.gather(1, kept).argsort(1)
        kept, target = kept.gather(1, order), order.argsort(1).gather(1, target)
    dtype = wide(mass.dtype)
    mass, size = mass.to(dtype), size.to(dtype)
    kept_mass, given = mass.gather(1, kept), mass.gather(1, source)
    if not chosen.gives:
        given = torch.zeros_like(given)
    elif saliency is not None:
        given = given * saliency.to(dtype).gather(1, source)
    merged_mass = kept_mass.scatter_add(1, target, given)
    groups = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    return Grouping(
        kept,
        source,
        target,
        kept_weight=kept_mass / merged_mass,
        source_weight=given / merged_mass.gather(1, target),
        mass=merged_mass,
        size=size.gather(1, kept).scatter_add(1, target, size.gather(1, source)),
        assign=kept.new_zeros(mass.shape).scatter(1, kept, groups).scatter(1, source, target),
    )


def pick(x: Tensor, index: Tensor, *, dim: int) -> Tensor:
    """The values of `x` (any dtype) at `index` along `dim`.

    `index` has the rank of `x`; elsewhere than along `dim` the two broadcast. A merge picks at `kept` what must not be
    averaged: tables of positions, ids, masks. Raises RuntimeError where they do not broadcast, or an index is none.

    >>> ops.pick(torch.randn(1, 1568, 3), torch.randint(1568, (2, 800, 1)), dim=1).shape
    torch.Size([2, 800, 3])
    """
    x_shape, index_shape = list(x.shape), list(index.shape)
    x_shape[dim] = index_shape[dim] = 1
    shape = list(torch.broadcast_shapes(x_shape, index_shape))
    shape[dim] = -1
    return x.expand(shape).gather(dim, index.expand(shape))


def up(x: Tensor, assign: Tensor, *, dim: int) -> Tensor:
    """Every token gets the value of its group: `x` (any dtype) over groups along `dim`, `assign` laid along it.

    Errors as in `pick`.

    >>> ops.up(torch.randn(2, 800, 768), torch.randint(800, (2, 1568, 1)), dim=1).shape
    torch.Size([2, 1568, 768])
    """
    return pick(x, assign, dim=dim)


def down(
    x: Tensor, kept: Tensor, source: Tensor, target: Tensor, kept_weight: Tensor, source_weight: Tensor, *, dim: int
) -> Tensor:
    """Step 6: each group's weighted mean, `x` over `N` tokens along `dim` to the same over `N - r` groups.

    The fields of a `Grouping` are laid along `dim`: they have the rank of `x` and broadcast elsewhere. Merged in
    float32 (float64 of float64), then cast back to the dtype of `x`. Errors as in `pick`.

    >>> x, ones = torch.randn(2, 1568, 768), torch.ones(2, 1568)
    >>> found = ops.group(x, None, ones, ones, 768)
    >>> ops.down(x, *(field.unsqueeze(-1) for field in found[:5]), dim=1).shape
    torch.Size([2, 800, 768])
    """
    values = x.to(wide(x.dtype))
    base, given = pick(values, kept, dim=dim) * kept_weight, pick(values, source, dim=dim) * source_weight
    return base.scatter_add(dim, target.expand_as(given), given).to(x.dtype)
