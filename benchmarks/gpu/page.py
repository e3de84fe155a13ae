"""What `python -m benchmarks.gpu` has kept, as tables.

python -m benchmarks.gpu.page [--write docs/gpu.md]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.gpu.driver import failed
from benchmarks.gpu.load import BY_HAND
from benchmarks.models import MODELS
from benchmarks.pages import replaced
from benchmarks.speed import DENSE, OURS

MARKER = "<!-- gpu -->"
NOT_MEASURED = "Not measured: the run ended before."

Rows = Sequence[Mapping[str, Any]]


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """A part for each card, a section of it for each part of the command."""
    return "\n\n".join(map(card, records))


def records() -> Iterator[Mapping[str, Any]]:
    """Of every card, by its name."""
    for path in sorted(timing.RESULTS.glob("gpu-*.json")):
        if path.stem != "gpu-tiles":
            yield json.loads(path.read_text())


def card(record: Mapping[str, Any]) -> str:
    rows = record["rows"]
    machine, versions = record["machine"], record["versions"]
    loads = [row for row in rows if "clips_per_second" in str(row.get("rows"))]
    sections = {
        "Whole models": ratios(loads),
        "Every row of them": models(loads),
        "Where the time goes": groups([row for row in rows if "groups" in row]),
        "Attention alone": ways([row for row in rows if "ways" in row]),
        "Tiles": tiles([row for row in rows if "seconds" in row]),
        "Correctness": correctness([row for row in rows if row["part"] == "correct"]),
    }
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    others = "".join(
        f" {len(run['rows'])} rows are of another run, {run['with']['date'][:16]}." for run in record.get("joined", ())
    )
    head = f"## {machine['device']}\n\n{machine['date'][:10]}; {told}; Python {machine['python']}.{others}"
    return "\n\n".join((head, *(f"### {title}\n\n{text or NOT_MEASURED}" for title, text in sections.items())))


def ratios(rows: Rows) -> str:
    """Median milliseconds of dense, ours and the floor, and the median of each by another, taken in pairs."""
    lines = []
    for row in rows:
        found = {each["row"]: each for each in row["rows"]}
        floor = next((each for name, each in found.items() if name.startswith("floor")), None)
        by_hand = (_ratio(_at(found.get(name), "this_over_ours")) for name in BY_HAND[3:])
        cells = (
            *_model(row),
            *(_ms(_at(each, "latency")) for each in (found.get(DENSE), found.get(OURS), floor)),
            _ratio(_at(found.get(DENSE), "this_over_ours")),
            _ratio(_at(floor, "ours_over_this")),
            *by_hand,
        )
        lines.append(f"| {' | '.join(cells)} |")
    head = ("model", "clips", "dense, ms", "ours, ms", "floor, ms", "dense ÷ ours", "ours ÷ floor")
    return _table(" | ".join((*head, *(f"{name.split()[0]} ÷ ours" for name in BY_HAND[3:]))), lines)


def models(rows: Rows) -> str:
    """Every row of every load: min, median and max milliseconds, memory beside weights, and torch's fused attention."""
    lines = []
    for row in rows:
        for each in row["rows"]:
            spread = " / ".join(f"{1000 * value:.2f}" for value in each["latency"])
            peak = "-" if row["graphs"] else f"{each['peak_bytes'] / 1e6:.0f}"
            called = ", ".join(f"{_attention(name)} {count}" for name, count in each["attention"].items())
            cells = (*_model(row), each["row"], spread, f"{each['clips_per_second']:.1f}", peak, called or "-")
            lines.append(f"| {' | '.join(cells)} | {each['first_call']:.0f} |")
    head = "model | clips | row | ms | clips/s | peak beside weights, MB | torch's fused attention | first call, s"
    return _table(head, lines)


def tiles(rows: Rows) -> str:
    """The fastest tile (rows, keys, warps, stages) of every operator at every shape, in milliseconds."""
    best: dict[tuple[str, str], tuple[float, str]] = {}
    for row in rows:
        for name, seconds in row["seconds"].items():
            key, found = (str(tuple(row["shape"])), name), (1000 * seconds, str(tuple(row["tile"])))
            best[key] = min(best.get(key, found), found)
    names = list(dict.fromkeys(name for _, name in best))
    lines = []
    for shape in dict.fromkeys(shape for shape, _ in best):
        fastest = (best.get((shape, name)) for name in names)
        cells = ("-" if each is None else f"{each[0]:.3f}: {each[1]}" for each in fastest)
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    return _table(" | ".join(("samples, heads, tokens, channels", *names)), lines)


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


def _model(row: Mapping[str, Any]) -> tuple[str, str]:
    return MODELS[row["name"].split()[0]].title, f"{row['batch']}{', CUDA graphs' if row['graphs'] else ''}"


def _attention(operator: str) -> str:
    """The kind of fused attention that an operator of torch is: cudnn, flash, efficient."""
    return operator.removeprefix("aten::_scaled_dot_product_").removesuffix("_attention")


def _at(found: Mapping[str, Any] | None, name: str) -> Any:
    return None if found is None else found[name]


def _ms(latency: Sequence[float] | None) -> str:
    return "-" if latency is None else f"{1000 * latency[1]:.3g}"


def _ratio(spread: Sequence[float] | None) -> str:
    return "-" if spread is None else f"{spread[1]:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help=f"file with two lines {MARKER} to put the tables between")
    chosen = parser.parse_args()
    text = page(list(records()))
    print(text)
    if chosen.write is not None:
        chosen.write.write_text(replaced(chosen.write.read_text(), text, MARKER))


if __name__ == "__main__":
    main()
