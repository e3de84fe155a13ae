"""Which tokens become one, and what a merge does to a value over tokens: down, pick and up.

A merge splits the N tokens of a sample into N - r groups. Each group is represented by the token it *kept*; the other
tokens are *sources* that joined a *target* group. Indices are found without gradients, weights carry them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .reference import match, wide

Reduction = Literal["merge", "drop", "random", "slice"]


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


class _Split(NamedTuple):
    kept: Tensor
    source: Tensor
    target: Tensor


def group(
    metric: Tensor,
    saliency: Tensor | None,
    mass: Tensor,
    size: Tensor,
    r: int,
    *,
    reduction: Reduction = "merge",
    seed: int = 0,
) -> Grouping:
    """Decide which `r` of `N` tokens go where (vid-TLDR, section 3; steps 5 and 6 of the method).

    `metric [B, N, C]`, `N >= 2`; `saliency [B, N]`, None for 1 everywhere; `mass`, `size [B, N]`; `0 <= r <= N // 2`.
    "merge" joins the `r` best matched sources to their destinations. The others are baselines that lose tokens: "drop"
    the least salient, "random" ones that follow from `seed` alone, "slice" the last; a lost token's group is the
    nearest kept token (the earlier of two), to which it gives size but neither value nor mass. Every sort is stable.

    Raises ValueError for a reduction without that name, and for "drop" without a saliency.
    """
    with torch.autocast(metric.device.type, enabled=False):
        split = _split(metric.detach(), None if saliency is None else saliency.detach(), r, reduction, seed)
    kept, source, target = split
    dtype = wide(mass.dtype)
    mass, size = mass.to(dtype), size.to(dtype)
    kept_mass, given = mass.gather(1, kept), mass.gather(1, source)
    if reduction != "merge":
        given = torch.zeros_like(given)
    elif saliency is not None:
        given = given * saliency.to(dtype).gather(1, source)
    merged_mass = kept_mass.scatter_add(1, target, given)
    groups = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    return Grouping(
        *split,
        kept_weight=kept_mass / merged_mass,
        source_weight=given / merged_mass.gather(1, target),
        mass=merged_mass,
        size=size.gather(1, kept).scatter_add(1, target, size.gather(1, source)),
        assign=kept.new_zeros(mass.shape).scatter(1, kept, groups).scatter(1, source, target),
    )


def _split(metric: Tensor, saliency: Tensor | None, r: int, reduction: Reduction, seed: int) -> _Split:
    if reduction == "merge":
        return _merging(metric, r)
    batch, tokens = metric.shape[:2]
    position = torch.arange(tokens, device=metric.device)
    if reduction == "drop":
        if saliency is None:
            raise ValueError('reduction="drop" loses the least salient tokens and needs their saliency, which is None')
        return _losing(saliency, r)
    if reduction == "random":
        return _losing(_scrambled(position, seed).expand(batch, -1), r)
    if reduction == "slice":
        return _losing(-position.expand(batch, -1), r)
    raise ValueError(f'reduction must be "merge", "drop", "random" or "slice", not {reduction!r}')


def _merging(metric: Tensor, r: int) -> _Split:
    similarity, destination = match(metric)
    order = similarity.argsort(dim=-1, descending=True, stable=True)
    merged, remaining = order[:, :r].sort(-1).values, order[:, r:].sort(-1).values
    odd = torch.arange(1, metric.shape[1], 2, device=metric.device).expand(metric.shape[0], -1)
    kept = torch.cat((2 * remaining, odd), 1)
    return _Split(kept, 2 * merged, destination.gather(1, merged) + remaining.shape[1])


def _losing(worth: Tensor, r: int) -> _Split:
    """Lose the `r` tokens of least `worth [B, N]`; the rest stay in order."""
    order = worth.argsort(dim=-1, stable=True)
    source, kept = order[:, :r].sort(-1).values, order[:, r:].sort(-1).values
    after = torch.searchsorted(kept, source)
    before = (after - 1).clamp_min(0)
    after = after.clamp_max(kept.shape[1] - 1)
    closer = (source - kept.gather(1, before)).abs() <= (kept.gather(1, after) - source).abs()
    return _Split(kept, source, torch.where(closer, before, after))


def _scrambled(position: Tensor, seed: int) -> Tensor:
    """A 32-bit hash of every position: a random order that touches no generator's state."""
    low = 0xFFFFFFFF
    mixed = (position + (seed * 0x9E3779B9 & low)) & low
    for _ in range(2):
        mixed = ((mixed ^ (mixed >> 16)) * 0x45D9F3B) & low
    return mixed ^ (mixed >> 16)


def pick(x: Tensor, index: Tensor, *, dim: int) -> Tensor:
    """The values of `x` (any dtype) at `index` along `dim`.

    `index` has the rank of `x`; elsewhere than along `dim` the two broadcast. A merge picks at `kept` what must not be
    averaged: tables of positions, ids, masks.
    """
    x_shape, index_shape = list(x.shape), list(index.shape)
    x_shape[dim] = index_shape[dim] = 1
    shape = list(torch.broadcast_shapes(x_shape, index_shape))
    shape[dim] = -1
    return x.expand(shape).gather(dim, index.expand(shape))


def up(x: Tensor, assign: Tensor, *, dim: int) -> Tensor:
    """Every token gets the value of its group: `x` (any dtype) over groups along `dim`, `assign` laid along it."""
    return pick(x, assign, dim=dim)


def down(
    x: Tensor, kept: Tensor, source: Tensor, target: Tensor, kept_weight: Tensor, source_weight: Tensor, *, dim: int
) -> Tensor:
    """Step 6: each group's weighted mean, `x` over `N` tokens along `dim` to the same over `N - r` groups.

    The fields of a `Grouping` are laid along `dim`: they have the rank of `x` and broadcast elsewhere. Merged in
    float32, then cast back.
    """
    values = x.to(wide(x.dtype))
    base, given = pick(values, kept, dim=dim) * kept_weight, pick(values, source, dim=dim) * source_weight
    return base.scatter_add(dim, target.expand_as(given), given).to(x.dtype)
