"""The small VideoMAE of each task, and what it is trained for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

import tldr_compile
from benchmarks.quality.tasks import DIRECTION, ORDER, Task

Size = Literal["base", "half"]
SIZES: tuple[Size, ...] = get_args(Size)
LAYERS: dict[Size, int] = {"base": 6, "half": 3}

SHAPES: dict[str, dict[str, Any]] = {
    DIRECTION.name: {"tubelet_size": 2, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512},
    ORDER.name: {
        "tubelet_size": 4,
        "hidden_size": 96,
        "num_attention_heads": 3,
        "intermediate_size": 384,
        "decoder_hidden_size": 64,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 256,
    },
}
HIDDEN = 0.75
"""Part of the tokens that masked pretraining hides; VideoMAE (Tong et al., arXiv 2203.12602) hides 0.75 to 0.95."""

Measure = dict[str, float]
"""Loss and accuracies over some clips, by name: `joint` is that of the class, the others those of its parts."""


def config(task: Task, size: Size) -> VideoMAEConfig:
    """256 tokens, each of 2 or 4 frames x 8 x 8 pixels.

    `half` is `base` with every second layer left out, so half the GFLOPs.
    """
    return VideoMAEConfig(
        image_size=task.size,
        num_frames=task.frames,
        patch_size=8,
        num_hidden_layers=LAYERS[size],
        use_mean_pooling=True,
        id2label=dict(enumerate(task.names)),
        label2id={name: label for label, name in enumerate(task.names)},
        **SHAPES[task.name],
    )


def tokens(config: VideoMAEConfig) -> tuple[int, int]:
    """How many there are in time, and in a frame."""
    return config.num_frames // config.tubelet_size, (config.image_size // config.patch_size) ** 2


def gflops(model: VideoMAEForVideoClassification) -> float:
    """GFLOPs of one clip in matrix products and attention."""
    frames, side = model.config.num_frames, model.config.image_size
    told = tldr_compile.explain(model, (torch.zeros(1, frames, 3, side, side),), schedule=())
    return float(told.to_dict()["gflops_before"])


def tubes(config: VideoMAEConfig, clips: int, seed: int) -> Tensor:
    """Which tokens are hidden, bool [B, N]: the same places at all times (tube masks: VideoMAE, section 3.2)."""
    times, places = tokens(config)
    order = torch.rand(clips, places, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return (order < round(HIDDEN * places)).repeat(1, times)


def masked_loss(model: VideoMAEForPreTraining, pixels: Tensor, seed: int) -> Tensor:
    """Mean squared error of the pixels of hidden tokens, which are normalised token by token."""
    error: Tensor = model(pixels, tubes(model.config, len(pixels), seed)).loss
    return error


def marginals(logits: Tensor, task: Task) -> list[Tensor]:
    """Logits of the classes [B, C] -> those of every part, each [B, P], by summing probabilities."""
    table = logits.unflatten(1, task.sizes)
    every = range(1, table.ndim)
    return [table.logsumexp([other for other in every if other != own]) for own in every]


def loss(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Cross-entropy of the class and of all its parts: on the class alone, learning stands still for long."""
    parts = zip(marginals(logits, task), task.split(labels).values(), strict=True)
    return torch.stack([F.cross_entropy(*part) for part in ((logits, labels), *parts)]).sum()


@torch.no_grad()
def measure(logits: Tensor, labels: Tensor, task: Task) -> Measure:
    """Loss and accuracies of logits [B, C]; the parts are read off the predicted class."""
    found = logits.argmax(1)
    wanted, said = task.split(labels), task.split(found)
    hits = {"joint": found == labels, **{part: said[part] == wanted[part] for part in task.parts}}
    shares = {name: float(hit.float().mean()) for name, hit in hits.items()}
    return {"loss": float(loss(logits, labels, task)), **shares}


def mean(measures: Sequence[Measure]) -> Measure:
    """Of batches of one size."""
    return {name: sum(each[name] for each in measures) / len(measures) for name in measures[0]}
