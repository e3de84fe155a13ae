"""The clip of the demo is the test clip that it says it is, to the pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.quality import clips, sample
from benchmarks.quality.train import HERE
from tldr_compile.media import video


def test_the_kept_file_is_the_test_clip() -> None:
    path = HERE / sample.name(sample.INDEX)
    assert video.count(path) == clips.FRAMES
    assert np.array_equal(video.sample(path, clips.FRAMES, clips.FRAMES), sample.frames(sample.INDEX))


def test_the_name_says_what_is_to_be_seen(tmp_path: Path) -> None:
    path = sample.write(8 * 7 + 1, tmp_path)
    assert path.name == "digit-7-to-NE.mkv"
    assert video.count(path) == clips.FRAMES
