"""Every number that needs a GPU, the most important first, in a time that is told.

    python -m benchmarks.gpu [--minutes 8] [--parts correct models kernels merging] [--out benchmarks/results]
    TRITON_INTERPRET=1 python -m benchmarks.gpu --dry --out /tmp/dry

While the first part checks results, other processes compile the models of the second. `gpu.json` is written anew after
every row, so a run that is cut keeps what it has. `--dry` runs the whole of it on a CPU with the smallest sizes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks import timing
from benchmarks.gpu import merging, models
from benchmarks.gpu.correct import correct
from benchmarks.gpu.driver import Part, Row, Setup, failed, line, run
from benchmarks.gpu.kernels import kernels
from benchmarks.gpu.load import loads
from benchmarks.gpu.warm import Warm, fresh_caches

PARTS: Mapping[str, Part] = {
    "correct": correct,
    "models": models.models,
    "kernels": kernels,
    "merging": merging.merging,
}
TABLES: Mapping[str, Callable[[Sequence[Row]], str]] = {"models": models.table, "merging": merging.table}

# Fractions of the time: when a part ends at the latest, if others follow.
UNTIL = {"correct": 0.4, "models": 0.75, "kernels": 0.9}
AHEAD = 0.35  # of the time may pass before what is not yet compiled is compiled where it is measured


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no row begins")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=timing.RESULTS, help="folder of gpu.json")
    parser.add_argument("--dry", action="store_true")
    chosen = parser.parse_args(arguments)
    if chosen.dry and chosen.out == timing.RESULTS:
        parser.error("--dry measures nothing that is worth keeping there: name another folder with --out")
    return chosen


def processes() -> int:
    """That compile beside this one, which needs some cores for itself."""
    return max(1, len(os.sched_getaffinity(0)) * 5 // 8)


def summary(rows: Sequence[Row]) -> str:
    """The tables of the parts that have one, then what failed."""
    tables = [table([row for row in rows if row["part"] == part and not failed(row)]) for part, table in TABLES.items()]
    bad = [line(row) for row in rows if failed(row)]
    return "\n\n".join(filter(None, (*tables, "\n".join(bad), f"{len(rows)} rows, {len(bad)} failed")))


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = options(arguments)
    begin = time.monotonic()
    device = torch.device("cpu" if chosen.dry else "cuda")
    parts = {name: part for name, part in PARTS.items() if name in chosen.parts}
    with ExitStack() as stack:
        if not chosen.dry:
            stack.enter_context(fresh_caches())
        found = loads(device, dry=chosen.dry) if parts.keys() & {"models", "merging"} else ()
        warm = None
        if "models" in parts:
            until = begin + AHEAD * 60 * chosen.minutes
            warm = Warm(found, device, processes=processes(), until=until, fresh=not chosen.dry)
            stack.callback(warm.stop)
        setup = Setup(device, chosen.dry, begin + 60 * chosen.minutes, found, warm)
        rows = run(parts, setup, chosen.out, UNTIL)
    print(summary(rows))
    return int(any(map(failed, rows)))


if __name__ == "__main__":
    sys.exit(main())
