"""Training that can be killed at any time: everything that a step depends on is one state file.

A step draws its clips by its own number and the model has no dropout, so there is no random state to keep: the model,
the optimiser and the step say it all.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from benchmarks.quality import clips
from benchmarks.quality.clips import Clips
from benchmarks.quality.model import Measure, Size, loss, measure
from tldr_compile.errors import TldrError

FAINT, RAMP, WARM_UP = 0.1, 0.3, 0.02  # contrast at the start; parts of the first cycle, and of every cycle
WEIGHT_DECAY, LARGEST_GRADIENT = 0.05, 1.0


class StateError(TldrError):
    """A state file, or a checkpoint, of another run than the one that is wanted."""


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run."""

    size: Size
    steps: tuple[int, ...]
    """Of each cycle of the learning rate (warm restarts: Loshchilov and Hutter, arXiv 1608.03983)."""
    batch: int
    seed: int
    rate: float

    def follow(self, kept: Settings) -> bool:
        """Whether they are those of the same run, or of one that goes on with more cycles."""
        return kept == replace(self, steps=self.steps[: len(kept.steps)])


@dataclass
class Training:
    """A model, its optimiser and how far they are."""

    settings: Settings
    model: VideoMAEForVideoClassification
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def fresh(cls, settings: Settings, config: VideoMAEConfig) -> Training:
        """Random weights by the seed."""
        torch.manual_seed(settings.seed)
        model = VideoMAEForVideoClassification(config).train()
        return cls(settings, model, _optimizer(model, settings.rate))

    def clips(self) -> Clips:
        """The next step's."""
        first = self.step * self.settings.batch
        indices = range(first, first + self.settings.batch)
        faint = contrast(self.step, self.settings.steps[0])
        return clips.make("train", indices, seed=self.settings.seed, contrast=faint)

    def learn(self, batch: Clips) -> Measure:
        """One step; what it measures is from before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.step, self.settings.steps, self.settings.rate)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(batch.pixels).logits
        logits = logits.float()
        loss(logits, batch.labels).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_GRADIENT)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return measure(logits.detach(), batch.labels)

    def save(self, path: Path) -> None:
        """Replace the state file at once, so a kill leaves the old one or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
        }
        unfinished = path.with_suffix(".unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, path)

    def resume(self, path: Path) -> None:
        """Go on from a state file, of this run or of one with fewer cycles.

        Raises StateError when it is damaged or of a run with other settings.
        """
        advice = f"delete {path} to start again"
        try:
            state = torch.load(path, weights_only=True)
            settings = Settings(**state["settings"])
            if not self.settings.follow(settings):
                raise StateError(f"{path} is of {settings}, not {self.settings}: give its options, or {advice}")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        except (RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
            raise StateError(f"{path} is damaged, or of another version ({type(error).__name__}): {advice}") from error


def contrast(step: int, steps: int) -> float:
    """Of the background, from faint to full within the `steps` of the first cycle."""
    return min(1.0, FAINT + (1 - FAINT) * step / (RAMP * steps))


def rate(step: int, cycles: Sequence[int], peak: float) -> float:
    """Learning rate: in every cycle a linear warm-up, then a cosine to 0; each peaks at half of the one before."""
    for steps in cycles[:-1]:
        if step < steps:
            break
        step, cycles, peak = step - steps, cycles[1:], peak / 2
    warm = max(1, round(WARM_UP * cycles[0]))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, cycles[0] - warm)))


def _optimizer(model: nn.Module, peak: float) -> torch.optim.Optimizer:
    weights = [value for value in model.parameters() if value.ndim > 1]
    others = [value for value in model.parameters() if value.ndim <= 1]
    groups = [{"params": weights, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=True)
