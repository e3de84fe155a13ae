"""Clips as people have them: whole, cut, damaged, odd, empty; and pixels as an image processor makes them."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tldr_compile.media import video
from tldr_compile.media.video import Frames, Preprocessing, VideoError


def grey(values: list[int], height: int = 48, width: int = 64) -> Frames:
    return np.stack([np.full((height, width, 3), value, dtype=np.uint8) for value in values])


def noise(frames: int, height: int = 48, width: int = 64) -> Frames:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def encode(path: Path, frames: Frames, **options: str) -> Path:
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def silence(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    return path


def cut(path: Path, part: float) -> Path:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    return path


def test_the_sample_is_a_real_clip() -> None:
    path = video.sample_video()
    assert video.count(path) == 250
    assert video.sample(path, 250, 2).shape == (2, 272, 640, 3)


def test_a_missing_sample_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(VideoError, match="install it, or name your own with --video"):
        video.sample_video()


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv"])
@pytest.mark.parametrize("size", [(48, 64), (53, 97), (1, 17)])
def test_any_size_and_container_is_read(tmp_path: Path, suffix: str, size: tuple[int, int]) -> None:
    path = encode(tmp_path / f"clip.{suffix}", noise(9, *size))
    assert video.count(path) == 9
    frames = video.sample(path, 9, 4)
    assert frames.shape == (4, *size, 3)
    assert video.fit(frames, Preprocessing(32, (32, 32))).shape == (4, 32, 32, 3)


def test_frames_are_the_middles_of_equal_parts(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mp4", grey(list(range(0, 240, 20))))
    sampled = video.sample(path, 12, 4).mean(axis=(1, 2, 3))
    assert np.abs(sampled - np.array([20, 80, 140, 200])).max() < 6
    assert len(video.sample(path, 12, 12)) == 12


def test_a_phone_that_was_held_upright(tmp_path: Path) -> None:
    frames = grey([0] * 4)
    frames[:, :, :32] = 255  # left half white
    path = encode(tmp_path / "clip.mp4", frames)
    whole = path.read_bytes()
    at = whole.index(b"tkhd") + 44
    clockwise = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(whole[:at] + clockwise + whole[at + 36 :])
    (frame,) = video.sample(path, 4, 1)
    assert frame.shape == (64, 48, 3)
    assert frame[:24].mean() > 240  # the left half is now the upper one
    assert frame[40:].mean() < 15


def test_a_title_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "titled.avi"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "caf#"
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for pixels in noise(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"caf#", b"caf\xe9"))
    assert video.count(path) == 4


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"gone\.mp4: there is no such file"):
        video.count(tmp_path / "gone.mp4")
    (tmp_path / "file").touch()
    with pytest.raises(VideoError, match="there is no such file"):
        video.count(tmp_path / "file" / "clip.mp4")


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="that is a folder; name one video file in it"):
        video.count(tmp_path)


def test_a_pipe_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opened, it would wait for a writer
    with pytest.raises(VideoError, match="a stream or a device; a clip is read twice, so it has to be a file"):
        video.count(tmp_path / "pipe")


def test_a_path_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").symlink_to("clip.mp4")
    with pytest.raises(VideoError, match=r"clip\.mp4: it cannot be read \(Too many levels"):
        video.count(tmp_path / "clip.mp4")


def test_a_file_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:  # as av does; for root nothing is forbidden
        raise av.error.PermissionError(errno.EACCES, "Permission denied", str(path))

    path = encode(tmp_path / "clip.mp4", noise(4))
    monkeypatch.setattr(video, "_open", refuse)
    with pytest.raises(VideoError, match=r"clip\.mp4: it cannot be read \(Permission denied\)"):
        video.count(path)


def test_of_no_bytes(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.touch()
    with pytest.raises(VideoError, match=r"empty \(0 bytes\)"):
        video.count(path)


def test_not_a_video(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_text("not a video " * 100)
    with pytest.raises(VideoError, match=r"clip\.mp4: not a video, or a truncated one"):
        video.count(path)


def test_sound_only(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"no video stream in it \(its streams: audio\)"):
        video.count(silence(tmp_path / "sound.wav"))


@pytest.mark.parametrize("part", [0.05, 0.5, 0.8])
@pytest.mark.parametrize(
    ("name", "options"), [("clip.mp4", {}), ("clip.mp4", {"movflags": "faststart"}), ("clip.avi", {}), ("clip.mkv", {})]
)
def test_truncated(tmp_path: Path, part: float, name: str, options: dict[str, str]) -> None:
    path = cut(encode(tmp_path / name, noise(30), **options), part)
    with pytest.raises(VideoError, match="truncated"):
        video.count(path)


def test_truncated_between_two_packets(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mp4", noise(30), movflags="faststart")
    with av.open(str(path)) as container:
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: ends[14]])
    with pytest.raises(VideoError, match="truncated"):
        video.count(path)


def test_shorter_than_the_clip(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mp4", noise(15))
    with pytest.raises(VideoError, match="too short: it has 15 frames, and the model reads a clip of 16"):
        video.sample(path, video.count(path), 16)


def test_resizing_is_that_of_image_processors() -> None:
    frames = noise(2, 53, 97)
    fitted = video.fit(frames, Preprocessing(32, (32, 32)))
    for frame, made in zip(frames, fitted, strict=True):
        wide = np.asarray(Image.fromarray(frame).resize((58, 32), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(wide[:, 13:45] - made).max() <= 1  # PIL rounds after each of its two passes


def test_a_crop_larger_than_the_frames_is_refused() -> None:
    with pytest.raises(VideoError, match="frames of 32 x 32 are smaller than the model's 48 x 48"):
        video.fit(noise(1), Preprocessing((32, 32), (48, 48)))


def test_normalised_pixels() -> None:
    how = Preprocessing(2, (2, 2), scale=1 / 127.5, offset=1.0, mean=(0.0, 0.5, -0.5), std=(1.0, 2.0, 4.0))
    clip = video.normalise(grey([0, 255], 2, 2), how)
    assert clip.shape == (1, 2, 3, 2, 2)
    assert clip.dtype == torch.float32
    expected = torch.tensor([[-1.0, -0.75, -0.125], [1.0, 0.25, 0.375]])
    torch.testing.assert_close(clip[0, :, :, 1, 1], expected)
