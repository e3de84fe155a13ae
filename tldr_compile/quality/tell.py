"""The record of a run as tables and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from tldr_compile.quality.accuracy import points
from tldr_compile.quality.methods import OURS
from tldr_compile.records.charts import Chart, Line
from tldr_compile.records.tables import grid, spread

MARKER: Final = "<!-- quality -->"
AHEAD: Final = "tuned is ahead by, points"
Row = Mapping[str, Any]
"""A row of the record: the fields of `accuracy.Row`, and `over_dense`, its latency by the dense model's."""


def long(facts: Mapping[str, Any]) -> str:
    """All that is known, a line for each row, by budgets."""
    same, over = "same answer as dense, %", "over random drop, points"
    head = ("method", "of dense", "GFLOPs", "accuracy, %", same, over, AHEAD, "latency ÷ dense")
    ordered = sorted(facts["rows"], key=lambda row: -(row["budget"] or 1))
    return "\n\n".join((grid(head, map(_line, ordered)), about(facts)))


def short(facts: Mapping[str, Any]) -> str:
    """Accuracies, agreement with the dense model and latencies, a column for each budget."""
    budgets = sorted(facts["budgets"], reverse=True)
    columns = ("dense", *(f"{budget:g} of its GFLOPs" for budget in budgets))
    timed = [row for row in facts["rows"] if row["over_dense"]]
    behind = [row for row in facts["rows"] if row["tuned_ahead"]]
    return "\n\n".join(
        (
            grid(("accuracy, %", *columns), wide(facts["rows"], budgets, _accuracy)),
            about(facts),
            grid(("same answer as dense, %", *columns), wide(facts["rows"], budgets, _agreement)),
            *([grid((AHEAD, *columns), wide(behind, budgets, _behind))] if behind else []),
            grid(("latency ÷ dense", *columns), wide(timed, budgets, _latency)),
        )
    )


def wide(rows: Iterable[Row], budgets: Sequence[float], cell: Callable[[Row], str]) -> list[tuple[str, ...]]:
    """One line for each method, with an entry for no budget and for each."""
    by = {(row["method"], row["budget"]): row for row in rows}
    return [
        (name, *(cell(by[name, budget]) if (name, budget) in by else "-" for budget in (None, *budgets)))
        for name in dict.fromkeys(name for name, _ in by)
    ]


def about(facts: Mapping[str, Any]) -> str:
    """What the numbers are of, and how vid-TLDR stands against random dropping."""
    shapes = facts["shapes"]
    skipped = f", {len(facts['skipped'])} more could not be read" if facts["skipped"] else ""
    left_out = "".join(f"Left out: {name}: {reason}. " for name, reason in facts["left_out"].items())
    return (
        f"{facts['model']} on {facts['clips']} clips ({facts['data']}){skipped}, with Wilson's 95 % intervals. "
        f"Schedules: one fraction at the sites that are best for each method on {shapes['clips']} other clips "
        f"({_places(shapes['chosen'])}). Latencies: min / median / max, {facts['latency']['batch']} clips a call. "
        f"{left_out}{facts['verdict']}"
    ).strip()


def _places(chosen: Mapping[str, str]) -> str:
    by = {shape: [name for name, said in chosen.items() if said == shape] for shape in dict.fromkeys(chosen.values())}
    return "; ".join(f"{shape}: {', '.join(names)}" for shape, names in by.items())


def charts(facts: Mapping[str, Any]) -> list[Chart]:
    """Accuracy over GFLOPs: the methods, and the variants of vid-TLDR. Budgets that are not met are not drawn."""
    dense = [row for row in facts["rows"] if row["budget"] is None]
    merged = [row for row in facts["rows"] if row["budget"] is not None and not row["missed"]]
    ours = [row for row in merged if row["method"] == OURS]
    variants = [row for row in merged if row["method"].startswith(f"{OURS},")]
    methods = [row for row in merged if row not in ours and row not in variants]
    parts = [(f"{facts['clips']} clips", [*ours, *methods])]
    if variants:
        parts.append((f"variants of {OURS}", [*ours, *variants]))
    return [Chart(title, "GFLOPs of one clip", "accuracy, %", _lines([*dense, *some])) for title, some in parts]


def _lines(rows: Sequence[Row]) -> dict[str, Line]:
    def line(name: str) -> Line:
        some = sorted((row for row in rows if row["method"] == name), key=lambda row: row["gflops"])
        values = zip(*(row["accuracy"] for row in some), strict=True)
        middle, low, high = ([100 * value for value in column] for column in values)
        return Line([row["gflops"] for row in some], middle, low, high)

    return {name: line(name) for name in dict.fromkeys(row["method"] for row in rows)}


def _line(row: Row) -> tuple[str, ...]:
    return (
        row["method"],
        "1" if row["budget"] is None else f"{row['budget']:g}{': ' if row['missed'] else ''}{row['missed']}",
        f"{row['gflops']:.3f}",
        _accuracy({**row, "missed": ""}),
        f"{100 * row['agreement']:.1f}",
        points(row["over_random"]) if row["over_random"] else "-",
        _behind(row),
        _latency(row),
    )


def _accuracy(row: Row) -> str:
    if row["missed"]:
        return row["missed"].partition(",")[2].strip()
    middle, low, high = (f"{100 * value:.1f}" for value in row["accuracy"])
    several = row["variants"]
    spread = f", {len(several)} seeds {100 * min(several):.1f} to {100 * max(several):.1f}" if several else ""
    return f"{middle} ({low} to {high}){spread}"


def _agreement(row: Row) -> str:
    return "-" if row["missed"] else f"{100 * row['agreement']:.1f}"


def _behind(row: Row) -> str:
    """In the same answers; of another dense model, which has answers of its own, in accuracy."""
    if not row["tuned_ahead"]:
        return "-"
    agreement, accuracy = row["tuned_ahead"]
    return points(accuracy) if row["budget"] is None else points(agreement)


def _latency(row: Row) -> str:
    return spread(row["over_dense"], 2) if row["over_dense"] else "-"
