"""What each way to merge costs in time: every reduction and every signal on one model, in one alternating run.

    python -m benchmarks.ways [--model umt-b] [--rows merge energy] [--write docs/speed.md]

A row is a reduction or a signal; what it does not name is as it comes. The schedule is the model's own, so that all
rows keep as many tokens, and what differs is what choosing and merging them costs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import timing
from benchmarks.models import MODELS
from benchmarks.pages import add_write, write
from benchmarks.timing import Spread
from tldr_compile import ops
from tldr_compile.records.tables import grid, spread

MARKER = "<!-- ways -->"
DENSE, FIRST = "dense", "merge"
UNIFORM = "{}, uniform"
HEAD = ("way", "latency, ms", "÷ merge", "÷ dense")


def ways() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Names of rows, and the options of each."""
    for name in ops.REDUCTIONS:
        yield name, {"reduction": name}
        if ops.REDUCTIONS[name].gives:  # what is dropped weighs nothing
            yield UNIFORM.format(name), {"reduction": name, "saliency": "uniform"}
    for name in ops.SIGNALS:
        if name not in ("attention", "uniform"):
            yield f"{FIRST}, {name}", {"saliency": name}


@torch.inference_mode()
def measured(chosen: argparse.Namespace, rows: Sequence[str]) -> dict[str, list[float]]:
    """Seconds per call of the dense model and of every row, in the same rounds."""
    spec, options = MODELS[chosen.model], dict(ways())
    model, inputs = spec.on(chosen.device, chosen.dtype, 1)
    calls: dict[str, timing.Call] = {DENSE: partial(torch.compile(model), *inputs)}
    for row in rows:
        told = {"schedule": list(spec.schedule), **options[row]}
        calls[row] = partial(torch.compile(model, backend="tldr", options=told), *inputs)
    # All are compiled from one forward(), and torch keeps 8 of those by default.
    with torch._dynamo.config.patch(recompile_limit=len(calls) + 1):
        return timing.in_turn(calls, inputs[0].device, chosen.rounds, "ways")


def markdown(taken: Mapping[str, Sequence[float]]) -> str:
    """A line for every row: latency, and its ratios in the same rounds."""
    lines = []
    for row, seconds in taken.items():
        over = [spread(timing.ratio(seconds, taken[other]), 2) for other in (FIRST, DENSE)]
        lines.append((row, spread(Spread.of(seconds), 0, 1e3), *over))
    return grid(HEAD, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    known = dict(ways())
    parser = timing.parser(__doc__, 5)
    parser.add_argument("--model", choices=MODELS, default="umt-b")
    parser.add_argument("--rows", nargs="+", choices=known, default=list(known), help="default: all")
    add_write(parser, MARKER)
    chosen = parser.parse_args(arguments)
    taken = measured(chosen, list(dict.fromkeys((FIRST, *chosen.rows))))
    facts = {**timing.machine(torch.device(chosen.device)), "model": chosen.model, "dtype": chosen.dtype}
    table = markdown(taken)
    print(table)
    print(timing.write(f"ways-{chosen.model}-{chosen.device}-{chosen.dtype}", {**facts, "seconds": taken}))
    write(chosen.write, table, MARKER)


if __name__ == "__main__":
    main()
