"""Where a merged model goes, and how far its numbers there are from those of `apply`.

    python -m benchmarks.roads [--write docs/roads.md]

Every road is one function with the real library, or a script in a process of its own; `tests/test_roads.py` holds each
to its bound. A table of what was measured, with versions and date, is kept as JSON.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata as metadata
import json
import platform
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks.pages import add_write, write
from benchmarks.roads.roads import ROADS
from tldr_compile.records.tables import grid

MARKER = "<!-- roads -->"
RESULTS = Path(__file__).parents[1] / "results" / "roads.json"
LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "diffusers",
    "peft",
    "torchao",
    "timm",
    "onnx",
    "onnxscript",
    "onnxruntime",
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON to keep")
    add_write(parser, MARKER)
    chosen = parser.parse_args(arguments)
    far = {}
    for road in ROADS:
        if road.needs is not None and find_spec(road.needs) is None:
            print(f"{road.name}: {road.needs} is not installed", flush=True)
            continue
        far.update(road.walk())
        print(f"{road.name}: done", flush=True)
    versions = {name: metadata.version(name) for name in LIBRARIES if find_spec(name) is not None}
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    about = {"date": today, "machine": platform.machine(), "python": platform.python_version()}
    chosen.out.write_text(json.dumps({**about, "versions": versions, "largest difference": far}, indent=1) + "\n")
    table = page(far, versions, about["date"])
    print(table)
    write(chosen.write, table, MARKER)


def page(far: dict[str, float], versions: dict[str, str], date: str) -> str:
    lines = [
        (end, how, _difference(far.get(end)), f"{road.bound:.0e}", f"`{road.test}`")
        for road in ROADS
        for end, how in road.ends.items()
    ]
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    table = grid(("road", "how", "largest difference", "bound", "test"), lines)
    return f"{table}\n\nMeasured {date} with {said}, on a CPU."


def _difference(far: float | None) -> str:
    return "not installed" if far is None else f"{far:.1e}"


if __name__ == "__main__":
    main()
