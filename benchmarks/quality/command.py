"""What the commands share: errors as one line, and a file to write a table into."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import timing
from benchmarks.pages import replaced
from tldr_compile.errors import OptionError, TldrError
from tldr_compile.records.outputs import check_file


def status(name: str, work: Callable[[], None]) -> int:
    """The exit status of the work: 0, or 1 after an error made on purpose, told in one line on stderr."""
    try:
        work()
    except TldrError as error:
        print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def placed(chosen: argparse.Namespace, what: str, picture: Path | None = None) -> argparse.Namespace:
    """The options with a folder and a picture: what is kept here is of the model that ships, not replaced by others."""
    own = Path(f"{what}-{Path(chosen.model).name}") if chosen.model else timing.RESULTS
    chosen.out = chosen.out or own
    if picture is not None:
        chosen.picture = chosen.picture or (chosen.out / f"{what}.png" if chosen.model else picture)
    return chosen


def check_writable(path: Path | None, marker: str) -> None:
    """Before the work, not after it: raises OptionError for a file without the two markers."""
    if path is None:
        return
    try:
        replaced(path.read_text(), "", marker)
    except (OSError, ValueError) as error:
        raise OptionError(f"--write {path}: {error}") from error
    check_file("--write", path)
