"""Models and folders of the smallest size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from benchmarks.quality.tasks import DIRECTION
from tests.media.test_video import encode, noise

CLASS_NAMES = ("Riding a bike", "cooking_eggs")


def config(
    *, side: int = DIRECTION.size, frames: int = DIRECTION.frames, names: Sequence[str] = (), layers: int = 2
) -> VideoMAEConfig:
    """`side / 8` squared tokens for every two frames; as many classes as names, or those of the made clips."""
    known = dict(enumerate(names)) or {label: f"LABEL_{label}" for label in range(DIRECTION.classes)}
    return VideoMAEConfig(
        image_size=side,
        num_frames=frames,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        use_mean_pooling=True,
        id2label=known,
        label2id={name: label for label, name in known.items()},
    )


def checkpoint(path: Path, shape: VideoMAEConfig) -> Path:
    """Random weights, kept as a folder."""
    VideoMAEForVideoClassification(shape).save_pretrained(path)
    return path


def kinetics(path: Path, classes: Sequence[str], clips: int) -> Path:
    for name in classes:
        (path / name).mkdir(parents=True)
        for index in range(clips):
            encode(path / name / f"{index}.mp4", noise(4, 32, 40))
    return path
