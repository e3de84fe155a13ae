"""What the merged models say of the clips, and what that is worth: accuracy, agreement, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from tldr_compile.config import TokenMerging
from tldr_compile.quality.budget import MET, Cell
from tldr_compile.quality.data import Batch
from tldr_compile.quality.folders import DataError
from tldr_compile.quality.methods import OURS, RANDOM

Z95: Final = 1.959964

Key = TypeVar("Key", bound=Hashable)


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    middle: float
    low: float
    high: float


class Said(NamedTuple):
    """What every model says of every clip."""

    classes: Mapping[Hashable, Tensor]  # int64 [N]
    labels: Tensor  # int64 [N]


class Ahead(NamedTuple):
    """How far one model is ahead of another."""

    agreement: Estimate
    accuracy: Estimate


@dataclass(frozen=True)
class Row:
    """One method at one budget, or a dense model."""

    method: str
    budget: float | None
    """Part of the dense GFLOPs; None for a dense model."""
    gflops: float
    schedule: Sequence[float]
    accuracy: Estimate
    """Of several variants the mean, with the Wilson interval of one."""
    agreement: float
    """Share of the clips of which it says what the dense model says."""
    over_random: Estimate | None
    """Accuracy less that of random dropping at this budget, over the same clips."""
    variants: Sequence[float]
    """Accuracy of each, where there are several."""
    tuned_ahead: Ahead | None = None
    """How far the tuned configuration that costs no more is ahead, over the same clips."""
    missed: str = ""
    """Why the budget is not met; the row is then of what comes closest."""


@torch.inference_mode()
def said(
    models: Mapping[Key, nn.Module], batches: Iterable[Batch], device: torch.device, tick: Callable[[], object]
) -> Said:
    """Every model on every batch, in turn, so that each clip is made or decoded once. Raises DataError of no clips."""
    found: dict[Key, list[Tensor]] = {key: [] for key in models}
    labels: list[Tensor] = []
    for batch in batches:
        labels.append(batch.labels)
        pixels = batch.pixels.to(device)
        for key, model in models.items():
            found[key].append(model(pixels).logits.argmax(1)[: len(batch.labels)].cpu())
            tick()
    if not labels:
        raise DataError("no clip could be read, for the reasons above")
    return Said({key: torch.cat(parts) for key, parts in found.items()}, torch.cat(labels))


def hits(heard: Said, keys: Sequence[Hashable]) -> Tensor:
    """float32 [N]: which clips are told right; of several models, by which part of them."""
    return torch.stack([(heard.classes[key] == heard.labels).float() for key in keys]).mean(0)


def wilson(hits: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson interval of a share; z is that of 95 %."""
    share = hits / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return middle - half, middle + half


def proportion(right: Tensor) -> Estimate:
    """Of the mean of `right [N]`."""
    return Estimate(float(right.mean()), *wilson(round(float(right.sum())), len(right)))


def normal(values: Tensor) -> Estimate:
    """Of the mean of many values `[N]`."""
    middle = float(values.mean())
    half = Z95 * float(values.std(correction=0)) / len(values) ** 0.5
    return Estimate(middle, middle - half, middle + half)


def paired(ours: Tensor, theirs: Tensor) -> Estimate:
    """Of the mean difference of two `[N]` in 0 to 1 over the same clips.

    The interval counts one more clip that only ours tells right and one that only theirs does, so that few clips do not
    look certain (Bonett and Price, Statistics in Medicine 31, 2012).
    """
    off = ours - theirs
    _, low, high = normal(torch.cat((off, off.new_tensor([1, -1]))))
    return Estimate(float(off.mean()), max(low, -1.0), min(high, 1.0))


def agreement(heard: Said, keys: Sequence[Hashable], dense: Hashable) -> Tensor:
    """float32 [N]: whether each clip is told as by the dense model; of several models, by which part of them."""
    return torch.stack([(heard.classes[key] == heard.classes[dense]).float() for key in keys]).mean(0)


def alone(name: str, gflops: float, heard: Said, dense: Hashable, tuned: Sequence[Cell] = ()) -> Row:
    """The row of a dense model; it is called `name` in what was heard, too."""
    same = float(agreement(heard, [name], dense).mean())
    right = proportion(hits(heard, [name]))
    ahead = None if name == dense else _ahead(heard, [name], gflops, tuned, dense)
    return Row(name, None, gflops, (), right, same, None, (), ahead)


def _ahead(
    heard: Said, keys: Sequence[Hashable], gflops: float, tuned: Sequence[Cell], dense: Hashable
) -> Ahead | None:
    """Of the most expensive tuned configuration that costs no more, by 2 % of the budget at most."""
    affordable = [cell for cell in tuned if cell.gflops <= (1 + MET) * gflops]
    if not affordable:
        return None
    best = max(affordable, key=lambda cell: cell.gflops).configs
    same = paired(agreement(heard, best, dense), agreement(heard, keys, dense))
    return Ahead(same, paired(hits(heard, best), hits(heard, keys)))


def rows(cells: Sequence[Cell], heard: Said, dense: Hashable, tuned: Sequence[Cell] = ()) -> list[Row]:
    """One for each cell, those of tuned configurations among them."""
    random = {cell.budget: hits(heard, cell.configs) for cell in cells if cell.method == RANDOM and not cell.missed}

    def row(cell: Cell) -> Row:
        right = hits(heard, cell.configs)
        same = agreement(heard, cell.configs, dense)
        compared = cell.budget in random and cell.method != RANDOM and not cell.missed
        variants = [float(hits(heard, [key]).mean()) for key in cell.configs]
        return Row(
            cell.method,
            cell.budget,
            cell.gflops,
            _entries(cell.configs[0]),
            proportion(right),
            float(same.mean()),
            paired(right, random[cell.budget]) if compared else None,
            variants if len(variants) > 1 else [],
            None if cell in tuned else _ahead(heard, cell.configs, cell.gflops, tuned, dense),
            cell.missed,
        )

    return [row(cell) for cell in cells]


def _entries(config: object) -> list[float]:
    """The schedule; none where less of a clip is given."""
    return list(config.entries) if isinstance(config, TokenMerging) and isinstance(config.entries, tuple) else []


def verdict(told: Sequence[Row]) -> str:
    """How vid-TLDR stands against random dropping, in words; empty where they are not compared."""
    ours = [(row.budget, row.over_random) for row in told if row.method == OURS and row.over_random]
    sides = {
        "better": [(budget, over) for budget, over in ours if over.low > 0],
        "worse": [(budget, over) for budget, over in ours if over.high < 0],
        "not shown to be either": [(budget, over) for budget, over in ours if over.low <= 0 <= over.high],
    }
    parts = [
        f"{side} at {', '.join(f'{budget:g} ({points(over)})' for budget, over in some)}"
        for side, some in sides.items()
        if some
    ]
    return (
        f"Than random dropping, {OURS} is {'; '.join(parts)} of the dense GFLOPs (in brackets points of accuracy over "
        "the same clips, with the 95 % interval of the paired difference)."
        if parts
        else ""
    )


def points(difference: Sequence[float]) -> str:
    """In points of accuracy."""
    middle, low, high = (f"{100 * value:+.1f}" for value in difference)
    return f"{middle}, {low} to {high}"
