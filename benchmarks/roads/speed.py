"""What a portable program costs beside this package's own operators, and beside the dense model on the same road.

    python -m benchmarks.roads.speed [--rounds 5] [--write docs/roads.md]

VideoMAE-Base at full size, random weights, one clip, the default schedule: Inductor in this process, AOTInductor's
package and onnxruntime, each with the dense model and with the merged one, and AOTInductor with attention in C++ too.
All alternate in one run.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

import tldr_compile
from benchmarks import timing
from benchmarks.pages import add_write, write
from tldr_compile import writing
from tldr_compile.cli.export import Logits
from tldr_compile.records.tables import grid, spread

MARKER = "<!-- roads speed -->"
CPU = torch.device("cpu")


def calls(model: nn.Module, clip: Tensor, folder: Path) -> dict[str, Callable[[], Any]]:
    merged = tldr_compile.apply(model, (clip,))
    programs = {"dense": torch.export.export(model, (clip,))}
    programs["merged, portable"] = torch.export.export(tldr_compile.portable(merged), (clip,))
    programs["merged, native"] = torch.export.export(tldr_compile.portable(merged, native=True), (clip,))
    found: dict[str, Callable[[], Any]] = {"Inductor, dense": partial(torch.compile(model), clip)}
    found["Inductor, merged"] = partial(torch.compile(merged), clip)
    for name, program in programs.items():
        package, file = folder / f"{name}.pt2", folder / f"{name}.onnx"
        writing.write(program, "aoti", package)
        found[f"AOTInductor, {name}"] = partial(torch._inductor.aoti_load_package(str(package)), clip)
        if name == "merged, native":  # operators that onnxruntime does not know
            continue
        writing.write(program, "onnx", file)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file, settings)
        found[f"onnxruntime, {name}"] = partial(session.run, None, {"clip": clip.numpy()})
    return dict(sorted(found.items()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default 5)")
    add_write(parser, MARKER)
    chosen = parser.parse_args(arguments)
    torch.manual_seed(0)
    model, clip = Logits(VideoMAEForVideoClassification(VideoMAEConfig()).eval()), torch.randn(1, 16, 3, 224, 224)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        taken = timing.paired(calls(model, clip, Path(folder)), CPU, rounds=chosen.rounds)
    rows = {name: timing.Spread.of(seconds) for name, seconds in taken.items()}
    timing.write("roads-speed", {**timing.machine(CPU), "model": "videomae-b", "batch": 1, "seconds": taken})
    table = grid(("program", "ms, least / middle / most"), [(name, spread(row, 0, 1e3)) for name, row in rows.items()])
    print(table)
    write(chosen.write, table, MARKER)


if __name__ == "__main__":
    main()
