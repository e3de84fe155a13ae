"""A model and the clips that it is judged on: made ones, or a folder of videos."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import av
import torch
from torch import Tensor

from tldr_compile.media import models, video
from tldr_compile.media.models import ModelError, Subject
from tldr_compile.media.video import VideoError
from tldr_compile.quality.folders import Clip, DataError, listed, videos

VAL_CLIPS = 400


class Batch(NamedTuple):
    """Clips of which the first are labelled; the last batch of a folder is filled up with clips that do not count."""

    pixels: Tensor  # float32 [B, T, 3, H, W]
    labels: Tensor  # int64 [n], n <= B


@dataclass(frozen=True)
class Part:
    """One part of the clips, in batches of one size."""

    clips: int
    batch: int
    batches: Iterator[Batch]
    skipped: list[str] = field(default_factory=list)
    """What could not be read, known once the batches are used up."""

    @property
    def count(self) -> int:
        """How many batches, at most."""
        return -(-self.clips // self.batch)


def load(name: str, *, attention: str | None = None) -> Subject:
    """A video classifier by hub id or folder. Raises ModelError, also where its weights leave parameters random."""
    subject = models.load(name, attention=attention, seed=0)
    # The command line takes any model; here a head without weights would make every number below meaningless.
    told = type(subject.model).from_pretrained(name, output_loading_info=True)[1]
    if told["missing_keys"]:
        few = ", ".join(sorted(told["missing_keys"])[:3])
        raise ModelError(f"{name} has no weights for {len(told['missing_keys'])} of its parameters, such as {few}")
    return subject


def folder(subject: Subject, path: Path, number: int, batch: int) -> tuple[Part, Part]:
    """Videos to choose the schedules by, and others to test on, at most `number` of each. Raises DataError."""
    found = listed(path, {name: int(label) for label, name in subject.model.config.id2label.items()})
    if len(found) < 2:
        raise DataError(f"--data {path} has one clip: one is needed to choose a schedule by, and others to test on")
    random.Random(0).shuffle(found)  # listed by class: a part of the list would be of few classes
    val = min(VAL_CLIPS, number, max(1, len(found) // 5))
    return _videos(subject, found[:val], batch), _videos(subject, found[val : val + number], batch)


def unlabelled(subject: Subject, path: Path, number: int) -> tuple[Tensor, list[str]]:
    """At most `number` videos of a folder and those in it, in random order: float32 `[K, T, 3, H, W]`.

    Also what could not be read. Raises DataError where there are none.
    """
    found = videos(path)
    random.Random(0).shuffle(found)
    skipped: list[str] = []
    clips = [pixels for pixels, _ in _read(subject, [Clip(each, 0) for each in found[:number]], skipped)]
    if not clips:
        raise DataError(f"--data {path}: none of its {len(found)} videos could be read, the first: {skipped[0]}")
    return torch.cat(clips), skipped


def _videos(subject: Subject, chosen: Sequence[Clip], batch: int) -> Part:
    skipped: list[str] = []
    return Part(len(chosen), batch, _batched(_read(subject, chosen, skipped), batch), skipped)


def _read(subject: Subject, chosen: Sequence[Clip], skipped: list[str]) -> Iterator[tuple[Tensor, int]]:
    for clip in chosen:
        try:
            frames = video.sample(clip.path, video.count(clip.path), subject.frames)
            fitted = video.fit(frames, subject.preprocessing)
        except (VideoError, av.FFmpegError, OSError) as error:
            skipped.append(str(error) if isinstance(error, VideoError) else f"{clip.path}: {error}")
            continue
        yield video.normalise(fitted, subject.preprocessing), clip.label


def _batched(read: Iterator[tuple[Tensor, int]], size: int) -> Iterator[Batch]:
    while some := list(islice(read, size)):
        pixels = [pixels for pixels, _ in some]
        pixels += [pixels[-1]] * (size - len(some))
        yield Batch(torch.cat(pixels), torch.tensor([label for _, label in some]))
