"""Law 8, against the dense model alone: no merge may raise a dependence.

    x  -- second half of one dimension changed -->  x'

    dense(x)[i]  == dense(x')[i]    bit for bit: this slice does not see the change
    merged(x)[i] == merged(x')[i]   must follow

A slice is everything at one place along the leading dimensions of an output: all but its last, the channels. What
counts is the first half of a dimension of which no slice sees the change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Model = Callable[..., Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Change:
    """One dimension of one input changed, and what it did to each output of the dense model."""

    name: str
    inputs: Call
    again: Call
    """Changed otherwise: what agrees by chance once does not twice."""
    kept: dict[int, Tensor]
    """By the number of an output, which of its slices were left as they were: bool, the output's leading dimensions."""


@dataclass(frozen=True)
class Apart:
    """What a dense model keeps apart: found once, it serves any number of merged models."""

    dense: Model
    inputs: Call
    changes: tuple[Change, ...]

    @classmethod
    def of(
        cls,
        dense: Model,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        dims: Collection[int] | None = None,
    ) -> Apart:
        """Change every dimension (or those of `dims`) of every floating input that is longer than 1."""
        inputs: Call = (args, dict(kwargs or {}))
        before = outputs(dense, inputs)
        changes = [
            Change(name, once, twice, _kept(before, outputs(dense, once), half))
            for name, once, twice, half in _changes(inputs, dims)
        ]
        return cls(dense, inputs, tuple(change for change in changes if change.kept))

    @property
    def compared(self) -> list[str]:
        """What there is to compare. Nothing where the model mixes everything, or no dimension is longer than 1."""
        return [
            f"{change.name}: {int(kept.sum())} of {kept.numel()} slices of output {number}"
            for change in self.changes
            for number, kept in change.kept.items()
        ]

    def raised(self, merged: Model) -> list[str]:
        """Where the merged model depends on what the dense one does not: input, dimension, output, slice, how much."""
        if not self.changes:
            return []
        before = outputs(merged, self.inputs)
        return [text for change in self.changes for text in self._raised(merged, before, change)]

    def _raised(self, merged: Model, before: list[Tensor], change: Change) -> Iterator[str]:
        after = outputs(merged, change.inputs)
        for number, kept in change.kept.items():
            one, other = before[number], after[number]
            kept = _as_long(kept, one)
            moved = kept & ~_same(one, other, kept.ndim)
            if moved.any() and (moved & _as_long(self._kept_again(change, number), one)).any():
                place = tuple(moved.nonzero()[0].tolist())
                by = float((one[place].double() - other[place].double()).abs().max())
                yield f"{change.name}: output {number} at {list(place)} moved by {by:.1e}; the dense model's did not"

    def _kept_again(self, change: Change, number: int) -> Tensor:
        before, after = (outputs(self.dense, inputs)[number] for inputs in (self.inputs, change.again))
        return change.kept[number] & _same(before, after, change.kept[number].ndim)


def raised(
    dense: Model,
    merged: Model,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    dims: Collection[int] | None = None,
) -> list[str]:
    """Where `merged` depends on what `dense` does not."""
    return Apart.of(dense, args, kwargs, dims).raised(merged)


@torch.no_grad()
def outputs(model: Model, inputs: Call) -> list[Tensor]:
    """The floating outputs. What draws at random draws the same at every call; no call changes its inputs."""
    args, kwargs = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        leaves = pytree.tree_leaves(model(*args, **kwargs))
    return [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _changes(inputs: Call, dims: Collection[int] | None) -> Iterator[tuple[str, Call, Call, tuple[int, int]]]:
    """For each dimension that is changed a name, two changed calls, and which part of it is left as it was."""
    leaves, structure = pytree.tree_flatten(inputs)
    for number, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            continue
        for dim in range(leaf.ndim):
            if leaf.shape[dim] > 1 and (dims is None or dim in dims):
                changed = (_changed(leaf, dim, seed) for seed in (1, 2))
                once, twice = (
                    pytree.tree_unflatten([*leaves[:number], each, *leaves[number + 1 :]], structure)
                    for each in changed
                )
                left = (leaf.shape[dim] // 2, leaf.shape[dim])
                yield f"input {number}, second half of dimension {dim}", once, twice, left


def _changed(value: Tensor, dim: int, seed: int) -> Tensor:
    """New entries of the same spread in the second half along a dimension."""
    size = value.shape[dim]
    first, second = value.split([size // 2, size - size // 2], dim)
    drawn = torch.randn(second.shape, generator=torch.Generator().manual_seed(seed)).to(value)
    spread = value.std() if value.numel() > 1 else value.new_ones(())
    return torch.cat([first, value.mean() + (spread + (spread == 0)) * drawn], dim)


def _kept(before: list[Tensor], after: list[Tensor], half: tuple[int, int]) -> dict[int, Tensor]:
    """By output the slices that are as they were, where there are any."""
    pairs = zip(before, after, strict=True)
    same = {number: _apart(_same(one, other, _leading(one)), half) for number, (one, other) in enumerate(pairs)}
    return {number: kept for number, kept in same.items() if kept.any()}


def _apart(same: Tensor, half: tuple[int, int]) -> Tensor:
    """Of a dimension that is kept apart the whole first half stays; that one slice of a detector does may be luck."""
    kept = torch.zeros_like(same)
    for dim in range(same.ndim):
        first = same.shape[dim] * half[0] // half[1]
        if first and same.narrow(dim, 0, first).all():
            kept.narrow(dim, 0, first).fill_(True)
    return kept


def _leading(value: Tensor) -> int:
    return max(value.ndim - 1, min(value.ndim, 1))


def _same(one: Tensor, other: Tensor, leading: int) -> Tensor:
    """Which slices are equal bit for bit; NaN is itself."""
    equal = (one == other) | (one.isnan() & other.isnan())
    return equal.reshape(*one.shape[:leading], -1).all(-1)


def _as_long(kept: Tensor, value: Tensor) -> Tensor:
    """Slices of an output that stays merged: along the dimensions before the first that became shorter."""
    pairs = zip(kept.shape, value.shape, strict=False)
    whole = next((dim for dim, (one, two) in enumerate(pairs) if one != two), kept.ndim)
    return kept.reshape(*kept.shape[:whole], -1).all(-1)
