"""What a merged module decided on one input, told for every token at full length: for pictures and for measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tldr_compile.module import MergedModule
from tldr_compile.passes.axes import Axis
from tldr_compile.passes.check import full_length, record


@dataclass(frozen=True)
class Decision:
    """One merge. The `N` tokens of the run are a grid of sizes `grid` whose dimensions are called `labels`.

    `B` are the values of what is grouped apart (samples; frames of a per-frame model; windows), called `apart`, with
    sizes `apart_grid`; `joined` and `joined_grid` are what one grouping serves all values of (frames that share one;
    the places of a block).

    `saliency [B, N]` float32 is what the site gave every token (a token merged before has its group's; ones where the
    saliency is uniform); `assign [B, N]` int64 is the group that every token is in from here on, `mass [B, N]` that
    group's mass.
    """

    site: int
    labels: tuple[str, ...]
    grid: tuple[int, ...]
    apart: tuple[str, ...]
    apart_grid: tuple[int, ...]
    joined: tuple[str, ...]
    joined_grid: tuple[int, ...]
    saliency: Tensor
    assign: Tensor
    mass: Tensor

    def volume(self, values: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        """A number of every token `[B, N]` as `[*apart_grid, *grid, *joined_grid]`, and the names of its dimensions."""
        apart = values.reshape(*self.apart_grid, *self.grid, *(1 for _ in self.joined))
        return apart.expand(*self.apart_grid, *self.grid, *self.joined_grid), (*self.apart, *self.labels, *self.joined)


def inspect(merged: MergedModule, *args: Any, **kwargs: Any) -> list[Decision]:
    """Run a merged module and tell what each of its merges decided. Raises `ShapeError` as calling it does."""
    plan = merged._merged.plan
    inputs = merged._flat_inputs(args, kwargs)
    with torch.no_grad():
        _, found = record(merged._merged.graph, merged._merged.groupings, inputs)
    groups = full_length(plan, found)
    decisions = []
    for merge in plan.merges:
        here, parent = found[merge.target.index], merge.target.parent
        saliency = here.get("saliency", torch.ones(here["assign"].shape))
        decisions.append(
            Decision(
                merge.site.index,
                *_named(merge.grouping.run),
                *_named(merge.grouping.apart),
                *_named(merge.grouping.joined),
                saliency=saliency.gather(1, groups[parent.index].group) if parent else saliency,
                assign=groups[merge.target.index].group,
                mass=groups[merge.target.index].mass.float(),
            )
        )
    return decisions


def _named(axis: Axis) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and sizes of the factors of an axis."""
    names = tuple(getattr(factor, "label", "") for factor in axis.factors)
    return names, tuple(int(factor.size) for factor in axis.factors)
