"""What was kept, as it stands on its page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.towers import answer, tower

NAME = "towers"  # of the JSON
MARKERS = {"tower": "<!-- tower -->", "answer": "<!-- answer -->"}
TABLES = {"tower": tower.table, "answer": answer.table}


def kept(folder: Path = timing.RESULTS) -> dict[str, Any]:
    """The record of every part that was measured."""
    path = folder / f"{NAME}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def table(part: str, record: Mapping[str, Any]) -> str:
    """The record of one part, as a Markdown table."""
    return TABLES[part](record["rows"])
