"""What made clips ask: the two kinds of them, which share scans, backgrounds and distractors.

`DIRECTION`: a digit moves on a straight line; the class is the digit and one of 8 directions. A stretch of the clip
says it all.

`ORDER`: any digit moves in one of 4 directions, stands still, and moves in one of 4 again; the class is the two
directions in their order. No stretch that is as short as the rest shows both, and two different ones the other way
round are another class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor


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


@dataclass(frozen=True)
class Task:
    """A kind of clips, and the classes that it has: one for each choice of a name from every part."""

    name: str
    parts: Mapping[str, tuple[str, ...]]
    """Names by part; the last part changes fastest with the label. A part named `digit` decides what moves."""
    frames: int
    camera_speed: float
    """Pixels per frame, at most."""
    path: Callable[[Mapping[str, Tensor], Draws], Tensor]
    """Which name of every part [B] -> where the digit is, from any origin: float32 [B, T, 2] as (x, y)."""
    asks: str
    shows: str
    size: int = 64  # pixels, as are all that follow
    digit_size: tuple[float, float] = (24.0, 30.0)
    distractor_size: tuple[float, float] = (10.0, 15.0)
    sprite: int = 44
    """Holds the largest digit, turned, with its outline."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many names each part has."""
        return tuple(map(len, self.parts.values()))

    @property
    def classes(self) -> int:
        return math.prod(self.sizes)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes."""
        return tuple(map(" ".join, product(*self.parts.values())))

    def split(self, labels: Tensor) -> dict[str, Tensor]:
        """Labels int64 [B] -> which name of every part, each int64 [B]."""
        return dict(zip(self.parts, map(torch.from_numpy, np.unravel_index(labels.numpy(), self.sizes)), strict=True))


def pick(where: Tensor, number: Tensor | int) -> Tensor:
    """int64: which of `number` equal parts of 0 to 1 a uniform random number is in."""
    return (where * number).long().minimum(torch.as_tensor(number) - 1)


def _headings(which: Tensor, number: int) -> Tensor:
    """Of `number` directions, the first to the right and the next ones against the clock: float32 [B, 2]."""
    angle = which[:, None] * (2 * torch.pi / number)
    return torch.cat([angle.cos(), -angle.sin()], dim=1)


def _line(chosen: Mapping[str, Tensor], draw: Draws) -> Tensor:
    """At 2.4 to 3.6 pixels a frame."""
    move = _headings(chosen["direction"], 8) * draw(1, 2.4, 3.6)
    return move[:, None] * _times(DIRECTION.frames)[:, None]


def _times(frames: int) -> Tensor:
    return torch.arange(frames) - (frames - 1) / 2


REST, SHORTEST = 3, 5  # steps from frame to frame: how many stand still, and how many each of both ways has at least


def _two_motions(chosen: Mapping[str, Tensor], draw: Draws) -> Tensor:
    """At 2.3 to 2.8 pixels a frame, with the rest where it falls."""
    speed, steps = draw(1, 2.3, 2.8), torch.arange(ORDER.frames - 1)
    start = SHORTEST + pick(draw(1), len(steps) - REST - 2 * SHORTEST + 1)
    first, second = (_headings(chosen[part], 4)[:, None] * speed[:, None] for part in ORDER.parts)
    moves = (steps < start)[..., None] * first + (steps >= start + REST)[..., None] * second
    return torch.cat([torch.zeros_like(first), moves.cumsum(1)], dim=1)


EIGHT = ("E", "NE", "N", "NW", "W", "SW", "S", "SE")

DIRECTION = Task(
    name="direction",
    parts={"digit": tuple(map(str, range(10))), "direction": EIGHT},
    frames=8,
    camera_speed=2.0,
    path=_line,
    asks="which digit moves, and in which of 8 directions: 80 classes, `8 * digit + direction`",
    shows="a handwritten digit of 24 to 30 pixels moves 2.4 to 3.6 pixels a frame",
)
ORDER = Task(
    name="order",
    parts={"first": EIGHT[::2], "second": EIGHT[::2]},
    frames=16,
    camera_speed=1.0,
    path=_two_motions,
    asks="in which of 4 directions a digit moves first, and in which after a rest: 16 classes, `4 * first + second`",
    shows="a handwritten digit of 24 to 30 pixels, which is not asked for, moves 2.3 to 2.8 pixels a frame on 5 to 7 "
    "steps, stands still on 3 and moves again on the others of 15,",
)
TASKS = {task.name: task for task in (DIRECTION, ORDER)}
