"""Readers of files that portable programs are written to, in other languages than Python."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths


def run(reader: Path, package: Path, clip: Tensor, library: Path | None = None) -> Tensor:
    """What a reader that `build` made prints of a package on a clip, flat; a library of operators is loaded before."""
    pixels = package.with_suffix(".bin")
    pixels.write_bytes(clip.numpy().tobytes())
    first = [] if library is None else ["--library", library]
    command = [reader, *first, package, pixels, *map(str, clip.shape)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    return torch.tensor([float(line) for line in printed.split()])


def build(program: Path) -> None:
    """Compile `reader.cpp`, which links to torch alone."""
    (libraries,) = library_paths()
    source = Path(__file__).with_name("reader.cpp")
    flags = ["-std=c++20", *(f"-I{each}" for each in include_paths()), f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
    linked = ["-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", str(source), *flags, *linked, "-o", program], check=True, timeout=300)
