"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def grid(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def spread(values: Sequence[float], digits: int, scale: float = 1) -> str:
    """Least, middle and most, as one cell."""
    return " / ".join(f"{scale * value:.{digits}f}" for value in values)
