"""What `python -m benchmarks.gpu` has kept, as tables.

    python -m benchmarks.gpu.page [--write docs/gpu.md]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.gpu.driver import failed
from benchmarks.models import MODELS
from benchmarks.tables import replaced

MARKER = "<!-- gpu -->"
NOT_MEASURED = "Not measured: the run ended before."

Rows = Sequence[Mapping[str, Any]]


def page(record: Mapping[str, Any]) -> str:
    """One section for each part."""
    rows = record["rows"]
    machine, versions = record["machine"], record["versions"]
    sections = {
        "Whole models": models([row for row in rows if "clips_per_second" in str(row.get("rows"))]),
        "Where the time goes": groups([row for row in rows if "groups" in row]),
        "Attention alone": ways([row for row in rows if "ways" in row]),
        "Correctness": correctness([row for row in rows if row["part"] == "correct"]),
    }
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    head = f"{machine['device']}, {machine['date'][:10]}; {told}; Python {machine['python']}."
    return "\n\n".join((head, *(f"## {title}\n\n{text or NOT_MEASURED}" for title, text in sections.items())))


def models(rows: Rows) -> str:
    """Median milliseconds of every row of every load, and how many times ours that is."""
    lines = [
        f"| {MODELS[row['name'].split()[0]].title} | {row['batch']}{', CUDA graphs' if row['graphs'] else ''} "
        f"| {each['row']} | {_ms(each['latency'])} | {each['clips_per_second']:.1f} "
        f"| {_ratio(each['this_over_ours'])} | {(row['weight_bytes'] + each['peak_bytes']) / 1e9:.2f} |"
        for row in rows
        for each in row["rows"]
    ]
    return _table("model | clips | row | ms | clips/s | this ÷ ours | peak memory, GB", lines)


def groups(rows: Rows) -> str:
    """Milliseconds per call by what kernels are for."""
    names = list(dict.fromkeys(name for row in rows for name in row["groups"]))
    lines = [
        f"| {row['name']} | {1000 * row['seconds_per_call']:.2f} | {row['kernels_per_call']:.0f} | "
        + " | ".join(f"{1000 * row['groups'].get(name, 0):.2f}" for name in names)
        + " |"
        for row in rows
    ]
    return _table(" | ".join(("row", "all", "kernels", *names)), lines)


def ways(rows: Rows) -> str:
    """Median milliseconds of every way at every size, and how many times the fastest dense attention that is."""
    names = list(dict.fromkeys(way["way"] for row in rows for way in row["ways"]))
    found = [{way["way"]: way for way in row["ways"]} for row in rows]

    def cell(way: Mapping[str, Any] | None) -> str:
        return "-" if way is None else f"{_ms(way['latency'])} ({way['over_best_dense'][1]:.2f})"

    lines = [f"| {name} | " + " | ".join(cell(size.get(name)) for size in found) + " |" for name in names]
    return _table(" | ".join(("way: ms (times the fastest dense)", *(row["name"] for row in rows))), lines)


def correctness(rows: Rows) -> str:
    """Every check with its errors and its bound."""
    lines = []
    for row in rows:
        errors = {name: row[name] for name in ("off", "both", "attend", "sharpness") if name in row}
        if errors:  # none where no time was left
            verdict = "beyond it" if failed(row) or any(error != error for error in errors.values()) else "within"
            told = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
            lines.append(f"| {row['name']} | {told} | {row['bound']:.0e} | {verdict} |")
    return _table("check | errors | bound | verdict", lines)


def _table(head: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return "\n".join((f"| {head} |", "| --- " * (head.count("|") + 1) + "|", *lines))


def _ms(latency: Sequence[float]) -> str:
    return f"{1000 * latency[1]:.3g}"


def _ratio(spread: Sequence[float] | None) -> str:
    return "-" if spread is None else f"{spread[1]:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help=f"file with two lines {MARKER} to put the tables between")
    chosen = parser.parse_args()
    text = page(json.loads((timing.RESULTS / "gpu.json").read_text()))
    print(text)
    if chosen.write is not None:
        chosen.write.write_text(replaced(chosen.write.read_text(), text, MARKER))


if __name__ == "__main__":
    main()
