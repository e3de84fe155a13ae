"""What is a signal worth? Tokens go by it at one layer alone, and the answer is asked how much that changed it.

    python -m benchmarks.quality.worth [--write docs/quality.md]

For every signal and every layer, half of the tokens of that layer are dropped, those of least saliency; then those of
most, as if the sign were flipped. Likewise half are merged, weighed by the signal and by the flipped one. All lose as
many tokens at the same place: what differs is which. The KL divergence from the dense model's classes says how much
that matters. A signal is worth something where its own column is below its flipped one, and below random dropping, or
below merging without weights. `--write` replaces what stands between two lines `<!-- worth -->`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from rich.progress import track
from torch import Tensor

from benchmarks import timing
from benchmarks.pages import add_write, write
from benchmarks.quality.command import check_writable, placed, status
from benchmarks.quality.made import check_made, checkpoint, made
from tldr_compile import TokenMerging, ops
from tldr_compile.cli.main import positive
from tldr_compile.quality.accuracy import Estimate, normal
from tldr_compile.quality.budget import Merger
from tldr_compile.quality.data import load
from tldr_compile.records.outputs import check_folder
from tldr_compile.records.tables import grid
from tldr_compile.tuning.answers import OBJECTIVES

MARKER: Final = "<!-- worth -->"
FRACTION: Final = 0.5
FLIPPED: Final = "{}, flipped"
RULES: Final[Mapping[str, Mapping[str, Any]]] = {"drop": {"reduction": "drop"}, "merge": {"metric": "tokens"}}
NEUTRAL: Final[Mapping[str, Mapping[str, Any]]] = {"drop": {"reduction": "random"}, "merge": {"saliency": "uniform"}}
"""The same without any signal."""


def signals() -> list[str]:
    """Those that read something, without the flipped ones."""
    return [name for name, each in ops.SIGNALS.items() if each.reads and not name.endswith("flipped")]


def register() -> None:
    """Every signal with its sign flipped: the largest becomes 0, and 0 the largest."""
    for name in signals():
        each = ops.SIGNALS[name]
        if FLIPPED.format(name) not in ops.SIGNALS:
            ops.signal(FLIPPED.format(name), reads=each.reads)(flipped(each.function or (lambda reading: reading)))


def flipped(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def other(*readings: Tensor) -> Tensor:
        saliency = function(*readings)
        return saliency.amax(1, keepdim=True) - saliency

    return other


def cases(sites: int) -> Iterator[tuple[str, str, int, TokenMerging]]:
    """What is done, by which signal, at which layer, and as a configuration."""
    for rule, options in RULES.items():
        for name in ("none", *signals(), *map(FLIPPED.format, signals())):
            told = NEUTRAL[rule] if name == "none" else {**options, "saliency": name}
            for site in range(sites):
                yield rule, name, site, TokenMerging(schedule=[0.0] * site + [FRACTION], **told)


@torch.inference_mode()
def measured(name: str, clips: int) -> dict[str, dict[str, list[Estimate]]]:
    """KL divergence by rule, signal and layer."""
    subject = load(name)
    task = check_made(subject, name, clips)
    batches = [batch.pixels for batch in made(task, "test", clips).batches]
    dense = [subject.model(pixels).logits for pixels in batches]
    merger = Merger(subject.model, batches[0])
    found: dict[str, dict[str, list[Estimate]]] = {}
    for rule, signal, _, config in track(list(cases(len(merger.able))), "asking", transient=True):
        model = merger.merged(config)
        far = [OBJECTIVES["logits"](told, model(pixels).logits) for told, pixels in zip(dense, batches, strict=True)]
        values = torch.cat([each.distance for each in far])
        found.setdefault(rule, {}).setdefault(signal, []).append(normal(values))
    return found


def markdown(found: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> str:
    """A table for each rule: a line for every signal, its own and flipped, a column for every layer."""
    return "\n\n".join(_table(rule, by) for rule, by in found.items())


def _table(rule: str, by: Mapping[str, Sequence[Sequence[float]]]) -> str:
    layers = range(1, 1 + len(by["none"]))
    head = (f"{rule} half, KL in nats", *(f"layer {layer}" for layer in layers))
    names = {"none": "at random" if rule == "drop" else "without weights"}
    order = sorted(by, key=lambda name: (name != "none", name))
    return grid(head, ((names.get(name, name), *(f"{low[0]:.3f}" for low in by[name])) for name in order))


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model for made clips; default: the one that is trained here")
    parser.add_argument("--clips", type=positive, default=400, help="test clips, a multiple of 80 (default: 400)")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default: benchmarks/results, or one for --model")
    add_write(parser, MARKER)
    return placed(parser.parse_args(argv), "worth")


def run(chosen: argparse.Namespace) -> None:
    """Measure, print, keep. Raises TldrError."""
    check_folder("--out", chosen.out)
    check_writable(chosen.write, MARKER)
    register()
    found = measured(chosen.model or checkpoint(), chosen.clips)
    machine = timing.machine(torch.device("cpu"))
    facts = {"clips": chosen.clips, "fraction": FRACTION, "machine": machine, "divergence": found}
    print(markdown(found))
    print(timing.write("worth", facts, chosen.out))
    write(chosen.write, markdown(found), MARKER)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after an error that one line on stderr explains."""
    chosen = options(argv)
    return status("worth", lambda: run(chosen))


if __name__ == "__main__":
    sys.exit(main())
