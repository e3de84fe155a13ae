"""Latency beside the dense model's, of everything that is timed in one alternating run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tldr_compile import TokenMerging
from tldr_compile.quality.budget import Cell
from tldr_compile.records import measure
from tldr_compile.records.measure import Spread

Name = tuple[str, float | None]
"""A method and its budget; None for a dense model."""


def calls(models: Mapping[str, nn.Module], dense: str, cells: Sequence[Cell]) -> dict[Name, Callable[[Tensor], Any]]:
    """Dense models compiled by Inductor, and those of the cells that meet their budgets through the backend."""
    plain: dict[Name, Callable[[Tensor], Any]] = {(name, None): torch.compile(model) for name, model in models.items()}
    merged: dict[Name, Callable[[Tensor], Any]] = {
        (cell.method, cell.budget): torch.compile(models[dense], backend="tldr", options=options(config))
        for cell in cells
        for config in cell.configs[:1]
        if isinstance(config, TokenMerging) and not cell.missed
    }
    return {**plain, **merged}


def options(config: TokenMerging) -> dict[str, Any]:
    """As `torch.compile` takes them."""
    return {each.name: getattr(config, each.name) for each in fields(config)}


@torch.inference_mode()
def ratios(run: Mapping[Name, Callable[[Tensor], Any]], dense: Name, clips: Tensor, rounds: int) -> dict[Name, Spread]:
    """Latency of each by that of `dense`, over rounds in which all take their turn; first calls, which compile, apart.

    clips: float32 [B, T, 3, H, W].
    """
    torch.compiler.reset()
    bound = {name: partial(call, clips) for name, call in run.items()}
    # All variants are compiled from one forward(), and torch keeps 8 of those by default.
    with torch._dynamo.config.patch(recompile_limit=len(run) + 1):
        taken = measure.in_turn(bound, clips.device, rounds, "timing in turn", first=2)
    return {name: measure.ratio(seconds, taken[dense]) for name, seconds in taken.items()}
