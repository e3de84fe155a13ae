"""Every number that needs a GPU, the most important first, in a time that is told.

    python -m benchmarks.gpu [--minutes 8] [--parts correct models ...] [--batches 8 32 1] [--join]
    TRITON_INTERPRET=1 python -m benchmarks.gpu --dry --out /tmp/dry

While the first part checks results, the models of the second compile, every row in a process of its own.
`gpu-<card>.json` is written anew after every row, so a run that is cut keeps what it has. All batches of all models
take longer than 8 minutes to compile: two runs can share them, the second with `--join`. `--dry` runs the whole of it
on a CPU with the smallest sizes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks import timing
from benchmarks.gpu import kernels, merging, models, tiles
from benchmarks.gpu.correct import correct
from benchmarks.gpu.driver import Part, Row, Setup, failed, line, record_name, run
from benchmarks.gpu.load import BATCHES, loads
from benchmarks.gpu.workers import Workers

PARTS: Mapping[str, Part] = {
    "correct": correct,
    "models": models.models,
    "merging": merging.merging,
    "kernels": kernels.kernels,
    "batches": models.batches,
    "tiles": tiles.tiles,
}
TABLES: Mapping[str, Callable[[Sequence[Row]], str]] = {
    "merging": merging.table,
    "kernels": kernels.table,
    "models": models.table,
    "batches": models.table,
    "tiles": tiles.table,
}

# Fractions of the time: when a part ends at the latest, if others follow.
UNTIL = {"correct": 0.35, "models": 0.6, "merging": 0.65, "kernels": 0.75, "batches": 0.9}


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no row begins")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="the first one is `models`")
    parser.add_argument("--join", action="store_true", help="into the record that is there, if one is")
    parser.add_argument("--out", type=Path, default=timing.RESULTS, help="folder of the record")
    parser.add_argument("--dry", action="store_true")
    chosen = parser.parse_args(arguments)
    if chosen.dry and chosen.out == timing.RESULTS:
        parser.error("--dry measures nothing that is worth keeping there: name another folder with --out")
    return chosen


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
    path = chosen.out / f"{record_name(device)}.json"
    before = json.loads(path.read_text()) if chosen.join and path.exists() else None
    found = (
        loads(device, dry=chosen.dry, batches=chosen.batches) if parts.keys() & {"models", "merging", "batches"} else ()
    )
    workers = Workers(device)
    try:
        setup = Setup(device, chosen.dry, begin + 60 * chosen.minutes, found, workers)
        if "models" in parts:
            models.begin(setup)
        rows = run(parts, setup, chosen.out, UNTIL, before)
    finally:
        workers.stop()
    print(summary(rows))
    return int(any(map(failed, rows)))


if __name__ == "__main__":
    sys.exit(main())
