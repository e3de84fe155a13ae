"""What tuning found, as a table, a picture and files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tldr_compile.records.charts import Chart, Line
from tldr_compile.records.tables import grid
from tldr_compile.tuning.answers import SAME
from tldr_compile.tuning.tuner import TUNED, Row, Tuned


def table(tuned: Tuned) -> str:
    """The rows at the budget, and what was chosen in words."""
    head = ("configuration", "of dense", SAME[tuned.objective], "distance", "tuned is ahead by")
    at_budget = [row for row in tuned.rows if row.at_budget]
    return "\n\n".join((grid(head, map(_line, at_budget)), about(tuned)))


def about(tuned: Tuned) -> str:
    """What was chosen, and by what."""
    took = "" if tuned.latency is None else f" It takes {tuned.latency:.2f} of the dense model's time, compiled."
    refused = f" {len(tuned.refused)} ways could not be tried." if tuned.refused else ""
    config = tuned.config
    entries = config.entries if isinstance(config.entries, tuple) else ()
    schedule = ", ".join(f"{each:.3f}" if isinstance(each, float) else str(each) for each in entries)
    what = "tokens" if any(isinstance(each, int) for each in entries) else "fractions"
    margin = "" if config.margin is None else f", margin {config.margin:g}"
    return (
        f"Chosen by {tuned.choosing} clips; the table is of {tuned.reporting} others, which chose nothing, with 95 % "
        f"intervals. Tuned: reduction {config.reduction}{margin}, saliency {config.saliency}, metric {config.metric}, "
        f"{what} by site {schedule}.{took}{refused}"
    )


def chart(tuned: Tuned) -> Chart:
    """Answers kept over the part of the dense operations, a line for each way."""

    def line(name: str) -> Line:
        some = sorted((row for row in tuned.rows if row.name == name), key=lambda row: row.part)
        means, halves = zip(*(row.same for row in some), strict=True)
        return Line(
            [row.part for row in some],
            [100 * mean for mean in means],
            [100 * (mean - half) for mean, half in zip(means, halves, strict=True)],
            [100 * (mean + half) for mean, half in zip(means, halves, strict=True)],
        )

    names = dict.fromkeys(row.name for row in tuned.rows)
    title = f"{tuned.reporting} clips that chose nothing"
    return Chart(title, "part of the dense operations", SAME[tuned.objective], {name: line(name) for name in names})


def record(tuned: Tuned) -> Mapping[str, Any]:
    """As JSON keeps it."""
    return asdict(tuned)


def _line(row: Row) -> tuple[str, ...]:
    mean, half = (100 * value for value in row.same)
    ahead, within = (100 * value for value in row.ahead)
    return (
        row.name,
        f"{row.part:.3f}",
        f"{mean:.1f} ± {half:.1f}",
        f"{row.distance:.4g}",
        "-" if row.name == TUNED else f"{ahead:+.1f} ± {within:.1f}",
    )
