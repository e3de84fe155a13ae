"""Readers of files that portable programs are written to, in other languages than Python."""

from __future__ import annotations

import subprocess
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths


def build(program: Path) -> None:
    """Compile `reader.cpp`, which links to torch alone."""
    (libraries,) = library_paths()
    source = Path(__file__).with_name("reader.cpp")
    flags = ["-std=c++20", *(f"-I{each}" for each in include_paths()), f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
    linked = ["-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", str(source), *flags, *linked, "-o", program], check=True, timeout=300)
