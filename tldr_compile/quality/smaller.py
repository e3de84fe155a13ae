"""The same weights on less video: fewer frames, or a lower resolution, with the table of positions interpolated."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tldr_compile.errors import OptionError
from tldr_compile.media.models import FRAMES, SIDES, Subject, said

TUBES, PATCHES = ("tubelet_size",), ("patch_size",)
"""What configurations call the frames and the pixels along a side of one patch."""

Grid: TypeAlias = tuple[int, int, int]


class Less(NamedTuple):
    """Frames and pixels along a side of what a model is given of a clip."""

    frames: int
    side: int


class OnLess(nn.Module):
    """A model for smaller clips that is called with whole ones, `[B, T, 3, H, W]`.

    Frames are taken at even distances, their pixels shrunk without aliasing.
    """

    def __init__(self, model: nn.Module, less: Less) -> None:
        super().__init__()
        self.model, self.less = model, less

    def forward(self, clips: Tensor) -> Any:
        frames, side = self.less
        if frames < clips.shape[1]:
            step = clips.shape[1] / frames
            clips = clips[:, [int(step * (index + 0.5)) for index in range(frames)]]
        if side < clips.shape[-1]:
            flat = clips.flatten(0, 1)
            shrunk = F.interpolate(flat, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
            clips = shrunk.unflatten(0, clips.shape[:2])
        return self.model(clips)


def fewer_frames(subject: Subject) -> Iterator[Less]:
    """All that the model could be given instead, more frames first."""
    tube, side = said(subject.model.config, TUBES), said(subject.model.config, SIDES)
    return (Less(frames, side) for frames in range(subject.frames - tube, 0, -tube))


def lower_resolution(subject: Subject) -> Iterator[Less]:
    """All that the model could be given instead, more pixels first."""
    patch, side = said(subject.model.config, PATCHES), said(subject.model.config, SIDES)
    return (Less(subject.frames, pixels) for pixels in range(side - patch, 0, -patch))


def on_less(subject: Subject, less: Less) -> OnLess:
    """The model with its weights, made for less of each clip, and called with whole clips.

    Raises OptionError for a model whose configuration does not say its frames, side and patches, or with weights that
    depend on the size of the clip and are no table over its grid of patches.
    """
    config = copy.deepcopy(subject.model.config)
    for names, number in ((FRAMES, less.frames), (SIDES, less.side)):
        for name in names:
            if hasattr(config, name):
                setattr(config, name, number)
    try:
        model = type(subject.model)(config).eval()
    except (ValueError, TypeError, RuntimeError) as error:
        raise OptionError(f"{type(subject.model).__name__} cannot be made for {less}: {error}") from error
    before, after = _grid(subject.model.config), _grid(config)
    theirs = {place: value for place, _, value in _tensors(subject.model)}
    with torch.no_grad():
        for place, owner, value in _tensors(model):
            fitted = _resized(theirs[place], value.shape, before, after)
            if fitted is None:
                name = ".".join(place)
                raise OptionError(
                    f"{type(model).__name__} cannot be made for {less}: {name} is {list(theirs[place].shape)}, would "
                    f"be {list(value.shape)}, and is no table over its grid of {before} patches"
                )
            if isinstance(value, nn.Parameter):
                value.copy_(fitted)
            else:
                setattr(owner, place[1], fitted)
    return OnLess(model, less)


def _tensors(model: nn.Module) -> Iterator[tuple[tuple[str, str], nn.Module, Tensor]]:
    """All tensors of the model with their places, those too that are neither parameters nor buffers."""
    for name, module in model.named_modules():
        for held in (module._parameters, module._buffers, vars(module)):
            for attribute, value in held.items():
                if isinstance(value, Tensor):
                    yield (name, attribute), module, value


def _resized(table: Tensor, shape: Sequence[int], before: Grid, after: Grid) -> Tensor | None:
    """A table `[1, k + t h w, C]` over another grid, its first k rows as they are; None if it is none.

    What has the right shape already is what it was.
    """
    if list(table.shape) == list(shape):
        return table
    extra = table.shape[1] - prod(before) if table.dim() == 3 else -1
    if extra < 0 or list(shape) != [1, extra + prod(after), table.shape[2]]:
        return None
    first, rest = table.split([extra, prod(before)], 1)
    volume = rest.unflatten(1, before).movedim(-1, 1)
    fitted = F.interpolate(volume, size=after, mode="trilinear", align_corners=False)
    return torch.cat((first, fitted.flatten(2).mT), 1)


def _grid(config: Any) -> Grid:
    """Patches along time, height and width."""
    side = said(config, SIDES) // said(config, PATCHES)
    return said(config, FRAMES) // said(config, TUBES), side, side
