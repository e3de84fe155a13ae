"""Lines with their spreads, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window, wherever it runs

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

MARKED = 50  # a line of more points is drawn without them


@dataclass(frozen=True)
class Line:
    """Middles over `x`, with how far the measurements went to either side (or no spread)."""

    x: Sequence[float]
    middle: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Chart:
    """One picture of several named lines."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Line]
    logarithmic: bool = False


def draw(charts: Sequence[Chart], path: Path) -> Path:
    """Draw the charts side by side and keep them as `path`, a PNG."""
    figure, row = pyplot.subplots(1, len(charts), figsize=(6 * len(charts), 4.2), squeeze=False, layout="constrained")
    for chart, axes in zip(charts, row[0], strict=True):
        _draw(chart, axes)
    return save(figure, path)


def save(figure: Figure, path: Path) -> Path:
    """Keep a figure as a PNG, and forget it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})  # the same numbers make the same file
    pyplot.close(figure)
    return path


def _draw(chart: Chart, axes: Axes) -> None:
    for name, line in chart.lines.items():
        marker = "o" if len(line.x) <= MARKED else ""
        (drawn,) = axes.plot(line.x, line.middle, marker=marker, markersize=4, label=name)
        if line.low:
            axes.fill_between(line.x, line.low, line.high, alpha=0.2, color=drawn.get_color(), linewidth=0)
    if chart.logarithmic:
        axes.set_xscale("log")
        axes.set_yscale("log")
        places = sorted({at for line in chart.lines.values() for at in line.x})
        axes.set_xticks(places, [f"{at:g}" for at in places])
        axes.set_xticks([], minor=True)
    else:
        axes.set_ylim(bottom=0)
    axes.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
    axes.grid(alpha=0.3)
    axes.legend()
