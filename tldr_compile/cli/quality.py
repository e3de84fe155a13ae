"""`tldr quality`: what merging does to what a model says of somebody's own videos."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tldr_compile.config import TokenMerging
from tldr_compile.media.models import device_of
from tldr_compile.quality import tell
from tldr_compile.quality.compare import Study, record
from tldr_compile.quality.data import folder, load
from tldr_compile.records import kept
from tldr_compile.records.charts import draw
from tldr_compile.records.outputs import check_folder, check_png


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, keep, draw. Raises TldrError; outputs are looked at before the work."""
    out = arguments.out or Path(f"quality-{Path(arguments.model).name}")
    picture = arguments.picture or out / "quality.png"
    check_outputs(out, picture)
    device = device_of(arguments.device)
    subject = load(arguments.model)
    choosing, testing = folder(subject, arguments.data, arguments.clips, arguments.batch)
    study = Study(
        subject,
        arguments.model,
        str(arguments.data),
        choosing,
        testing,
        arguments.budgets,
        arguments.methods,
        tuned=[TokenMerging.load(path) for path in arguments.config],
        batch=arguments.batch,
        rounds=arguments.rounds,
    )
    keep(record(study, device), out, picture)


def check_outputs(out: Path, picture: Path) -> None:
    """Raises OptionError for a folder or a picture that cannot be written."""
    check_folder("--out", out)
    check_png("--picture", picture)
    check_folder("--picture", picture.parent)


def keep(facts: Mapping[str, Any], out: Path, picture: Path) -> None:
    """Print the table; keep the record in the folder `out`, and the picture."""
    print(tell.long(facts))
    print(kept.write("quality", facts, out))
    print(draw(tell.charts(facts), picture))
