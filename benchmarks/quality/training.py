"""Training that can be killed at any time: everything that a step depends on is one state file.

A step draws its clips and its mask by its own number and the model has no dropout, so there is no random state to
keep: the model, the optimiser and the step say it all.

A run has one or two phases. Where the settings say `pretrain`, as many steps come first that predict the pixels of
hidden tokens (VideoMAE: Tong et al., arXiv 2203.12602); then a classifier begins from that encoder.
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
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

from benchmarks.quality import clips
from benchmarks.quality.clips import Clips
from benchmarks.quality.model import Measure, Size, loss, masked_loss, measure
from benchmarks.quality.tasks import DIRECTION, TASKS, Task
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
    task: str = DIRECTION.name
    pretrain: int = 0
    """Steps of masked pretraining, one more cycle before the others."""

    @property
    def total(self) -> int:
        """All steps."""
        return self.pretrain + sum(self.steps)

    def follow(self, kept: Settings) -> bool:
        """Whether they are those of the same run, or of one that goes on with more cycles."""
        return kept == replace(self, steps=self.steps[: len(kept.steps)])


@dataclass
class Training:
    """A model, its optimiser and how far they are."""

    settings: Settings
    model: VideoMAEForPreTraining | VideoMAEForVideoClassification
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def fresh(cls, settings: Settings, config: VideoMAEConfig) -> Training:
        """Random weights by the seed."""
        torch.manual_seed(settings.seed)
        model = (VideoMAEForPreTraining if settings.pretrain else VideoMAEForVideoClassification)(config).train()
        return cls(settings, model, _optimizer(model, settings.rate))

    @property
    def task(self) -> Task:
        return TASKS[self.settings.task]

    @property
    def pretraining(self) -> bool:
        """Whether the next step is one that predicts hidden pixels."""
        return self.step < self.settings.pretrain

    @property
    def contrast(self) -> float:
        """Of the next step's clips."""
        return 1.0 if self.pretraining else contrast(self.step - self.settings.pretrain, self.settings.steps[0])

    @property
    def rate(self) -> float:
        """Of the next step."""
        if self.pretraining:
            return rate(self.step, (self.settings.pretrain,), self.settings.rate)
        return rate(self.step - self.settings.pretrain, self.settings.steps, self.settings.rate)

    def clips(self) -> Clips:
        """The next step's."""
        first = self.step * self.settings.batch
        indices = range(first, first + self.settings.batch)
        return clips.make(self.task, "train", indices, seed=self.settings.seed, contrast=self.contrast)

    def learn(self, batch: Clips) -> Measure:
        """One step; what it measures is from before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        error, told = self._ask(batch)
        error.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_GRADIENT)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.step == self.settings.pretrain:
            self._classify()
        return told

    def _ask(self, batch: Clips) -> tuple[Tensor, Measure]:
        """The loss of this phase, and what is to be told of it."""
        with torch.autocast("cpu", torch.bfloat16):
            if self.pretraining:
                error = masked_loss(self.model, batch.pixels, seed=self.settings.seed * 1_000_003 + self.step)
                return error, {"loss": float(error.detach())}
            logits = self.model(batch.pixels).logits
        logits = logits.float()
        return loss(logits, batch.labels, self.task), measure(logits.detach(), batch.labels, self.task)

    def _classify(self) -> None:
        """Go on with a classifier whose encoder is the pretrained one, with a new head by the seed."""
        torch.manual_seed(self.settings.seed)
        encoder = self.model.videomae.state_dict()
        self.model = VideoMAEForVideoClassification(self.model.config).train()
        self.model.videomae.load_state_dict(encoder)
        self.optimizer = _optimizer(self.model, self.settings.rate)

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
            if self.pretraining and state["step"] >= self.settings.pretrain:
                self._classify()
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
