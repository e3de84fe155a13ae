"""The picture of a merge: the frames, the saliency over them, and the groups that the tokens ended in."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Frames = NDArray[np.uint8]  # [T, H, W, 3]
Colours = NDArray[np.float32]  # [..., 3], 0 to 255

Scalar = TypeVar("Scalar", bound=np.generic)

HEAT = np.array([[0, 0, 30], [80, 18, 123], [182, 54, 121], [251, 136, 97], [252, 253, 191]], dtype=np.float32)
DIM = 0.3
OUTLINE = (255, 255, 255)
GAP, CAPTION = 4, 26
LEAST = 160  # pixels of a frame's side: a smaller one is enlarged, so that its tokens and the captions can be seen
PAPER, INK = (18, 18, 20), (235, 235, 235)


def picture(
    frames: Frames, grid: tuple[int, int, int], saliency: NDArray[np.float32], assign: NDArray[np.int64]
) -> Image.Image:
    """Three rows of one column per time step: frames, saliency heat, groups.

    A group of several tokens is drawn in one colour, the mean of its pixels, and outlined; a token alone keeps its
    pixels; tokens of a group whose saliency is 0, the merged background, are dim.

    frames: uint8 [T, H, W, 3]; grid: tokens along (t, h, w), dividing (T, H, W); saliency: [t * h * w] in 0 to 1;
    assign: [t * h * w], the group of every token. Raises ValueError when these do not fit together.
    """
    tokens = grid[0] * grid[1] * grid[2]
    if saliency.shape != (tokens,) or assign.shape != (tokens,):
        raise ValueError(f"grid {grid} has {tokens} tokens, not {saliency.shape} saliencies and {assign.shape} groups")
    if any(size % part for size, part in zip(frames.shape[:3], grid, strict=True)):
        raise ValueError(f"frames {frames.shape[:3]} cannot be divided into a grid of {grid} tokens")
    frames = _enlarged(frames)
    shown = frames[:: frames.shape[0] // grid[0]].astype(np.float32)
    groups = len(np.unique(assign))
    rows = [
        (f"{frames.shape[0]} frames, one of {frames.shape[0] // grid[0]} shown", shown),
        ("saliency at the first merge: dark 0, bright 1", _heated(shown, grid, saliency)),
        (
            f"{tokens} tokens in {groups} groups: merged ones flat and outlined, dim where saliency is 0",
            _grouped(shown, frames, grid, saliency, assign),
        ),
    ]
    return _page(rows)


def _enlarged(frames: Frames) -> Frames:
    times = -(-LEAST // min(frames.shape[1:3]))
    return frames.repeat(times, axis=1).repeat(times, axis=2)


def _heated(shown: Colours, grid: tuple[int, int, int], saliency: NDArray[np.float32]) -> Colours:
    place = np.clip(saliency, 0, 1) * (len(HEAT) - 1)
    heat = np.stack([np.interp(place, np.arange(len(HEAT)), channel) for channel in HEAT.T], axis=-1)
    return (0.4 * shown + 0.6 * _spread(heat.astype(np.float32), grid, shown.shape)).astype(np.float32)


def _grouped(
    shown: Colours, frames: Frames, grid: tuple[int, int, int], saliency: NDArray[np.float32], assign: NDArray[np.int64]
) -> Colours:
    _, group, size = np.unique(assign, return_inverse=True, return_counts=True)
    mean = np.stack([np.bincount(group, channel) for channel in _token_means(frames, grid).T], axis=-1) / size[:, None]
    merged = _spread((size[group] > 1)[:, None], grid, shown.shape)
    flat = _spread(mean[group].astype(np.float32), grid, shown.shape)
    dim = _spread(((size[group] > 1) & (saliency <= 0))[:, None], grid, shown.shape)
    drawn = np.where(merged, flat, shown) * np.where(dim, DIM, 1.0)
    border = merged & ~dim & _borders(_spread(group[:, None], grid, shown.shape))
    return np.where(border, np.array(OUTLINE), drawn).astype(np.float32)


def _token_means(frames: Frames, grid: tuple[int, int, int]) -> Colours:
    t, h, w = grid
    total, height, width, _ = frames.shape
    blocks = frames.reshape(t, total // t, h, height // h, w, width // w, 3).astype(np.float32)
    means: Colours = blocks.mean(axis=(1, 3, 5)).reshape(-1, 3)
    return means


def _spread(values: NDArray[Scalar], grid: tuple[int, int, int], shape: tuple[int, ...]) -> NDArray[Scalar]:
    """Per token [t * h * w, C] -> per pixel [t, H, W, C]."""
    laid = values.reshape(*grid, values.shape[-1])
    return laid.repeat(shape[1] // grid[1], axis=1).repeat(shape[2] // grid[2], axis=2)


def _borders(group: NDArray[np.intp]) -> NDArray[np.bool_]:
    """True on the pixels with a neighbour of another group: [t, H, W, 1]."""
    border = np.zeros(group.shape, dtype=np.bool_)
    rows, columns = group[:, :-1] != group[:, 1:], group[:, :, :-1] != group[:, :, 1:]
    border[:, :-1] |= rows
    border[:, 1:] |= rows
    border[:, :, :-1] |= columns
    border[:, :, 1:] |= columns
    return border


def _page(rows: list[tuple[str, Colours]]) -> Image.Image:
    columns, height, width, _ = rows[0][1].shape
    page = Image.new("RGB", (columns * (width + GAP) + GAP, len(rows) * (height + CAPTION) + GAP), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=16)
    for row, (caption, images) in enumerate(rows):
        top = row * (height + CAPTION)
        draw.text((GAP, top + 3), caption, fill=INK, font=font)
        for column, image in enumerate(images.round().clip(0, 255).astype(np.uint8)):
            page.paste(Image.fromarray(image), (GAP + column * (width + GAP), top + CAPTION))
    return page
