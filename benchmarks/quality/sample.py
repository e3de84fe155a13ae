"""Made clips as video files: one test clip for `make demo`, or a labelled folder of any split.

    python -m benchmarks.quality.sample
    python -m benchmarks.quality.sample --split val --clips 800 --out FOLDER    # for `tldr tune` and `tldr quality`
    python -m benchmarks.quality.sample --task order --out FOLDER

The files are lossless: what is read back are the clip's own pixels, rounded to 8 bits. Names say what is to be seen.
The background of the demo's clip is cut out of flower.jpg as scikit-learn ships it (Flickr user vultilion, CC BY 2.0).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import av
import torch
from rich.progress import track

from benchmarks.quality import clips
from benchmarks.quality.sources import Split
from benchmarks.quality.tasks import DIRECTION, TASKS, Task
from benchmarks.quality.train import HERE
from tldr_compile.cli.main import positive
from tldr_compile.media.video import IMAGENET_MEAN, IMAGENET_STD, Frames

INDEX = 41
RATE = 8  # frames per second


def frames(task: Task, index: int, split: Split = "test", seed: int = 0) -> Frames:
    """A made clip as pixels: uint8 [T, H, W, 3]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = (clips.make(task, split, [index], seed=seed).pixels[0] * std + mean).mul(255).round().clamp(0, 255)
    shown: Frames = pixels.byte().permute(0, 2, 3, 1).contiguous().numpy()
    return shown


def name(index: int) -> str:
    """The demo's: what moves, and where to."""
    return "digit-{}-to-{}.mkv".format(*DIRECTION.names[index % DIRECTION.classes].split())


def write(shown: Frames, path: Path) -> Path:
    """Keep pixels as video without loss."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = *shown.shape[1:3], "bgr0"
        for pixels in shown:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def folder(task: Task, out: Path, split: Split, number: int, seed: int) -> Path:
    """Clips 0 to `number` of a split, laid out as Kinetics: FOLDER/class name/index.mkv."""
    for index in track(range(number), "writing", transient=True):
        home = out / task.names[index % task.classes]
        home.mkdir(parents=True, exist_ok=True)
        write(frames(task, index, split, seed), home / f"{index:05}.mkv")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for many clips; default: the one clip of the demo")
    parser.add_argument("--task", choices=list(TASKS), default=DIRECTION.name, help="of many clips: what they ask")
    parser.add_argument("--split", choices=get_args(Split), default="val", help="of many clips (default: val)")
    parser.add_argument("--clips", type=positive, default=800, help="how many (default: 800)")
    parser.add_argument("--seed", type=int, default=0, help="of many clips (default: 0)")
    chosen = parser.parse_args(argv)
    if chosen.out:
        print(folder(TASKS[chosen.task], chosen.out, chosen.split, chosen.clips, chosen.seed))
    else:
        print(write(frames(DIRECTION, INDEX), HERE / name(INDEX)))


if __name__ == "__main__":
    main()
