"""All measurements that `speed.py` has kept, as one table.

    python benchmarks/speeds.py [--write docs/speed.md]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).parent.parent)

from benchmarks import timing
from benchmarks.models import MODELS
from benchmarks.speed import DENSE, OURS
from benchmarks.table import replaced

MARKER = "<!-- speeds -->"
HEAD = (
    "| model | schedule | device | dtype | clips | dense, ms | ours, ms | dense ÷ ours | ours ÷ floor | "
    "memory, ours ÷ dense |\n"
    "| --- " + "| --- " * 9 + "|"
)


def line(record: Mapping[str, Any]) -> str:
    """The middles of one measurement; the floor is that through the backend, which every model has."""
    rows = {row["name"]: row for row in record["rows"]}
    dense, ours, floor = rows[DENSE], rows[OURS], rows["floor"]
    weights = record["weight_bytes"]
    cells = (
        MODELS[record["model"]].title,
        f"`{json.dumps(record['schedule'])}`",
        record["machine"]["device"],
        record["dtype"],
        record["batch"],
        f"{1000 * dense['latency'][1]:.0f}",
        f"{1000 * ours['latency'][1]:.0f}",
        f"{1 / dense['ours_over_this'][1]:.2f}",
        f"{floor['ours_over_this'][1]:.2f}",
        f"{(weights + ours['peak_bytes']) / (weights + dense['peak_bytes']):.2f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def table(records: Iterable[Mapping[str, Any]]) -> str:
    """One line for each record."""
    return "\n".join((HEAD, *map(line, records)))


def kept(folder: Path = timing.RESULTS) -> list[dict[str, Any]]:
    """All records of `speed.py` that have the three rows, in the order of the models."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("speed-*.json"))]
    records = [each for each in records if {DENSE, OURS, "floor"} <= {row["name"] for row in each["rows"]}]
    order = list(MODELS)
    return sorted(records, key=lambda each: (each["machine"]["device"], order.index(each["model"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help=f"file with two lines {MARKER} to put the table between")
    chosen = parser.parse_args()
    text = table(kept())
    print(text)
    if chosen.write is not None:
        chosen.write.write_text(replaced(chosen.write.read_text(), text, MARKER))


if __name__ == "__main__":
    main()
