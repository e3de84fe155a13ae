"""`tldr export`: a merged model as a file that runs where this package is not, and its report beside it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import tldr_compile
from tldr_compile import writing
from tldr_compile.cli.main import options
from tldr_compile.errors import OptionError
from tldr_compile.media import models
from tldr_compile.records.outputs import check_file

NOTES = {
    "aoti": "\nother sizes and dtypes are computed wrongly unless AOTI_RUNTIME_CHECK_INPUTS=1 is set where it is read",
    "onnx": "\nits input is named clip, its output output",
}


class Logits(nn.Module):
    """A classifier whose answer is a tensor: whoever reads the file needs no class of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, clip: Tensor) -> Tensor:
        logits: Tensor = self.model(clip).logits
        return logits


def run(arguments: argparse.Namespace) -> None:
    """Writes what `tldr export --help` says. Raises TldrError; nothing is captured before the output is looked at."""
    path = arguments.out
    beside = path.with_name(f"{path.name}.txt")
    writing.check(arguments.format, path)
    for each in (path, beside):
        check_file("--out", each)
    if arguments.native and arguments.format == "onnx":
        raise OptionError("--native: onnxruntime knows no operators of torch; use the format aoti or pt2")
    if arguments.native:
        check_file("--out", path.with_name(writing.LIBRARY))
    portable = "native" if arguments.native else True
    config = tldr_compile.TokenMerging.from_options({**options(arguments), "portable": portable})
    device = models.device_of(arguments.device)
    subject = models.load(arguments.model, attention=arguments.attn, seed=arguments.seed)
    height, width = subject.preprocessing.crop
    most = arguments.most_clips
    clip = torch.zeros(min(2, most), subject.frames, 3, height, width, device=device)
    shapes = {"clip": {0: torch.export.Dim("clips", min=1, max=most)}} if most > 1 else None
    model = Logits(subject.model.to(device)).eval()
    with torch.no_grad():
        merged = tldr_compile.apply(model, (clip,), dynamic_shapes=shapes, config=config)
        writing.write(torch.export.export(merged, (clip,), dynamic_shapes=shapes), arguments.format, path)
        library = writing.write_library(path.parent) if arguments.native else None
    clips, many = (f"1 to {most} clips", "B") if most > 1 else ("one clip", "1")
    sizes = ", ".join(map(str, (many, *clip.shape[1:])))
    told = f"{subject.origin}\n{arguments.format}: {clips} [{sizes}] in, logits out{NOTES.get(arguments.format, '')}"
    if library is not None:
        told += f"\nload {library.name} before it: torch.ops.load_library(path) in Python, dlopen in C++"
    beside.write_text(f"{told}\n{merged.report}\n", encoding="utf-8")
    print(f"{told}\n{merged.report}\nwritten {path} ({_size(path)}), report {beside}")


def _size(path: Path) -> str:
    files = (path, path.with_name(path.name + ".data"))
    return f"{sum(each.stat().st_size for each in files if each.exists()) / 2**20:.1f} MiB"
