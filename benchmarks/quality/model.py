"""The small VideoMAE of the quality benchmark and what it is trained for."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

import tldr_compile
from benchmarks.quality.clips import CLASSES, DIGITS, DIRECTIONS, FRAMES, SIZE

Size = Literal["base", "half"]
SIZES: tuple[Size, ...] = get_args(Size)
LAYERS: dict[Size, int] = {"base": 6, "half": 3}


class Measure(NamedTuple):
    """Loss and accuracies over some clips."""

    loss: float
    joint: float
    digit: float
    direction: float


def config(size: Size) -> VideoMAEConfig:
    """256 tokens of 2 frames x 8 x 8 pixels. `half` is `base` with every second layer left out, so half the GFLOPs."""
    names = {label: class_name(label) for label in range(CLASSES)}
    return VideoMAEConfig(
        image_size=SIZE,
        num_frames=FRAMES,
        patch_size=8,
        tubelet_size=2,
        hidden_size=128,
        num_hidden_layers=LAYERS[size],
        num_attention_heads=4,
        intermediate_size=512,
        use_mean_pooling=True,
        id2label=names,
        label2id={name: label for label, name in names.items()},
    )


def class_name(label: int) -> str:
    """What moves, and where to."""
    digit, heading = divmod(label, len(DIRECTIONS))
    return f"{digit} {DIRECTIONS[heading]}"


def gflops(model: VideoMAEForVideoClassification) -> float:
    """GFLOPs of one clip in matrix products and attention."""
    told = tldr_compile.explain(model, (torch.zeros(1, FRAMES, 3, SIZE, SIZE),), schedule=())
    return float(told.to_dict()["gflops_before"])


def marginals(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Joint logits [B, 80] -> those of the digit [B, 10] and of the direction [B, 8], by summing probabilities."""
    table = logits.unflatten(1, (DIGITS, len(DIRECTIONS)))
    return table.logsumexp(2), table.logsumexp(1)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the class and of both its parts: on the class alone, learning stands still for long."""
    digit, direction = marginals(logits)
    parts = ((logits, labels), (digit, labels // len(DIRECTIONS)), (direction, labels % len(DIRECTIONS)))
    return torch.stack([F.cross_entropy(*part) for part in parts]).sum()


@torch.no_grad()
def measure(logits: Tensor, labels: Tensor) -> Measure:
    """Loss and accuracies of logits [B, 80]; digit and direction are read off the predicted class."""
    found = logits.argmax(1)
    same = (
        found == labels,
        found // len(DIRECTIONS) == labels // len(DIRECTIONS),
        found % len(DIRECTIONS) == labels % len(DIRECTIONS),
    )
    return Measure(float(loss(logits, labels)), *(float(hit.float().mean()) for hit in same))


def mean(measures: list[Measure]) -> Measure:
    """Of batches of one size."""
    return Measure(*(sum(column) / len(measures) for column in zip(*measures, strict=True)))
