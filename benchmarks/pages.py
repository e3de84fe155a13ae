"""The pages that tables stand in, and the folder of pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

PICTURES = Path(__file__).parent.parent / "docs"


def replaced(text: str, block: str, marker: str) -> str:
    """`text` with `block` between its two markers. Raises ValueError where there are not exactly two."""
    parts = text.split(marker)
    if len(parts) != 3:
        raise ValueError(f"expected two lines {marker}, found {len(parts) - 1}")
    return f"{parts[0]}{marker}\n{block}\n{marker}{parts[2]}"


def write(path: Path | None, block: str, marker: str) -> None:
    """Put the block between the file's two markers, if there is a file. Raises ValueError as `replaced` does."""
    if path is not None:
        path.write_text(replaced(path.read_text(), block, marker))


def add_write(parser: argparse.ArgumentParser, *markers: str) -> None:
    """The option that names a file for `write`."""
    where = " or ".join(f"two lines {marker}" for marker in markers)
    parser.add_argument("--write", type=Path, help=f"file with {where} to put the table between")
