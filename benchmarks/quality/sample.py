"""One test clip as a video file, so that `make demo` shows the trained model something it has never seen.

    python -m benchmarks.quality.sample

The file is lossless: what is read back are the clip's own pixels, rounded to 8 bits. Its name says what is to be seen.
Its background is cut out of flower.jpg as scikit-learn ships it (Flickr user vultilion, CC BY 2.0).
"""

from __future__ import annotations

from pathlib import Path

import av
import torch

from benchmarks.quality import clips
from benchmarks.quality.clips import DIRECTIONS
from benchmarks.quality.train import HERE
from tldr_compile.media.video import IMAGENET_MEAN, IMAGENET_STD, Frames

INDEX = 41
RATE = 8  # frames per second


def frames(index: int) -> Frames:
    """A test clip as pixels: uint8 [T, H, W, 3]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = (clips.make("test", [index]).pixels[0] * std + mean).mul(255).round().clamp(0, 255)
    shown: Frames = pixels.byte().permute(0, 2, 3, 1).contiguous().numpy()
    return shown


def name(index: int) -> str:
    """The file's: what moves, and where to."""
    digit, heading = divmod(index % clips.CLASSES, len(DIRECTIONS))
    return f"digit-{digit}-to-{DIRECTIONS[heading]}.mkv"


def write(index: int, folder: Path) -> Path:
    """Keep the clip as video without loss."""
    path, shown = folder / name(index), frames(index)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = *shown.shape[1:3], "bgr0"
        for pixels in shown:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


if __name__ == "__main__":
    print(write(INDEX, HERE))
