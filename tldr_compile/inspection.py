"""What a merged module decided on one input, told for every token at full length: for pictures and for measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tldr_compile.module import MergedModule
from tldr_compile.passes.axes import Atom
from tldr_compile.passes.check import full_length, record


@dataclass(frozen=True)
class Decision:
    """One merge. The `N` tokens of the run are a grid of sizes `grid` whose dimensions are called `labels`.

    `saliency [B, N]` float32 is what the site gave every token (a token merged before has its group's; ones where the
    saliency is uniform); `assign [B, N]` int64 is the group that every token is in from here on, `mass [B, N]` that
    group's mass.
    """

    site: int
    labels: tuple[str, ...]
    grid: tuple[int, ...]
    saliency: Tensor
    assign: Tensor
    mass: Tensor


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
        atoms = [factor for factor in merge.target.run.factors if isinstance(factor, Atom)]
        decisions.append(
            Decision(
                site=merge.site.index,
                labels=tuple(atom.label for atom in atoms),
                grid=tuple(int(atom.size) for atom in atoms),
                saliency=saliency.gather(1, groups[parent.index].group) if parent else saliency,
                assign=groups[merge.target.index].group,
                mass=groups[merge.target.index].mass.float(),
            )
        )
    return decisions
