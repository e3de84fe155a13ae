"""From a budget to the fraction that meets it: what plans cost is compared, and nothing is rewritten.

part of the dense operations
1 |.
  |   '.          one fraction at every site that can merge: the larger it is, the cheaper, but for rounding
b |-------'.---
  |           '
  0        f   1/2
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil
from typing import Any, Final, TypeAlias

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from tldr_compile.passes.axes import TypedGraph
from tldr_compile.passes.errors import NothingToMerge, ScheduleError
from tldr_compile.passes.plan import cost
from tldr_compile.passes.plan.plan import Plan, Solved

PlannedAt: TypeAlias = Callable[[float], Plan]

# Fractions are told in so many parts. Where sizes are left open, the graph multiplies by their numerators.
PARTS: Final = 100_000
NEAR: Final = 0.995
"""A plan that costs this part of its budget, or more, is near enough."""


def meeting(budget: float, planned: PlannedAt) -> Plan:
    """The plan with one fraction that costs at most `budget`, a part of the dense operations, and most of those tried.

    What is tried halves what is left between a fraction that costs too much and one that does not, until a plan is
    `NEAR`.

    Raises:
        ScheduleError: half of the tokens at every site is not enough, with the part that it costs; or what is in the
            inputs decides over sizes.
        NothingToMerge: there is no site that can merge, or no merge pays.
    """
    low, high = 0, PARTS // 2
    best = planned(high / PARTS)
    dense = cost.dense(best)
    part = cost.operations(best) / dense
    _refuse_open(budget, best.typed)
    if part > budget:
        raise ScheduleError(_least(budget, part))
    found = high
    while part < NEAR * budget and high - low > 1:
        tried = (low + high) // 2
        plan = _planned(planned, tried / PARTS)
        if plan is None or (costs := cost.operations(plan) / dense) > budget:
            low = tried
            continue
        high = tried
        if costs > part:
            best, part, found = plan, costs, tried
    return replace(best, solved=Solved(budget, found / PARTS, part, _sizes(best.typed)))


def _planned(planned: PlannedAt, fraction: float) -> Plan | None:
    """None where a fraction is too small to remove a token, or to remove any that pays."""
    try:
        return planned(fraction)
    except NothingToMerge:
        return None


def _least(budget: float, part: float) -> str:
    least = ceil(part * 1000) / 1000
    way = f"give {least:g} or more" if least < 1 else "no budget can be met"
    return (
        f"budget={budget:g}: with half of the tokens merged at every site that can merge, the most there is, the graph "
        f"still costs {part:.3f} of the dense operations at the traced sizes: {way}, or another grouping= or outputs=; "
        "explain(..., schedule=0.5) says what is refused, restored or left out"
    )


def _refuse_open(budget: float, typed: TypedGraph) -> None:
    for node in typed.captured.graph.graph.nodes:
        if free_unbacked_symbols(node.meta.get("val")):
            raise ScheduleError(
                f"budget={budget:g}: the sizes of {node.name} depend on what is in the inputs, so that operations "
                "cannot be counted ahead of time. Give a schedule, such as schedule=0.2"
            )


def _sizes(typed: TypedGraph) -> dict[str, tuple[int, ...]]:
    """Of the inputs that carry the video, as in the example."""
    captured = typed.captured
    return {
        captured.names.get(node.name, node.name): tuple(_hint(size) for size in node.meta["val"].shape)
        for node in captured.graph.graph.find_nodes(op="placeholder")
        if node.name not in captured.constants and _is_clip(typed, node)
    }


def _is_clip(typed: TypedGraph, node: fx.Node) -> bool:
    return any(value.clip for value in typed.values.get(node, ()))


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
