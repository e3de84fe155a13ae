"""The clip of the demo is the test clip that it says it is, to the pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality import sample
from benchmarks.quality.tasks import DIRECTION, ORDER, Task
from benchmarks.quality.train import HERE
from tldr_compile.media import video
from tldr_compile.quality.folders import listed


def test_the_kept_file_is_the_test_clip() -> None:
    path = HERE / sample.name(sample.INDEX)
    assert video.count(path) == DIRECTION.frames
    shown = video.sample(path, DIRECTION.frames, DIRECTION.frames)
    assert np.array_equal(shown, sample.frames(DIRECTION, sample.INDEX))


def test_the_name_says_what_is_to_be_seen() -> None:
    assert sample.name(8 * 7 + 1) == "digit-7-to-NE.mkv"


@pytest.mark.parametrize("task", [DIRECTION, ORDER])
def test_a_folder_of_clips_is_read_with_their_labels(task: Task, tmp_path: Path) -> None:
    names = {name: label for label, name in enumerate(task.names)}
    sample.main(["--task", task.name, "--out", str(tmp_path), "--split", "val", "--clips", "3"])
    found = listed(tmp_path, names)
    assert sorted((path.name, label) for path, label in found) == [(f"0000{label}.mkv", label) for label in range(3)]
    for path, label in found:
        assert np.array_equal(video.sample(path, task.frames, task.frames), sample.frames(task, label, "val"))
