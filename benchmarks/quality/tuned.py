"""Tune the model that is trained here, for several budgets, on clips of the validation split.

    python -m benchmarks.quality.tuned [--model FOLDER] [--budgets 0.5 0.4 0.3] [--write docs/quality.md]

`tldr tune` does the same for any model on a folder of videos. Configurations go to `benchmarks/quality/tuned/`, or to
`tuned/` in the folder of `--model`, where the comparison takes them from. A run that was interrupted goes on where it
was. `--write` replaces what stands between two lines `<!-- tuned -->`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import torch
from rich.progress import Progress

from benchmarks import timing
from benchmarks.pages import PICTURES, add_write, write
from benchmarks.quality.command import check_writable, placed, status
from benchmarks.quality.made import check_made, checkpoint, made
from benchmarks.quality.train import HERE
from tldr_compile.cli.main import part, positive
from tldr_compile.cli.quality import check_outputs
from tldr_compile.quality.data import load
from tldr_compile.records.charts import Chart, draw
from tldr_compile.records.outputs import check_folder
from tldr_compile.tuning import Tuned, page, tune

MARKER: Final = "<!-- tuned -->"
CONFIGS: Final = HERE / "tuned"
CLIPS, BATCH = 1600, 20


def configs(model: str | None) -> Path:
    """The folder of what was found for a model; None is the first that is trained here."""
    return Path(model) / "tuned" if model else CONFIGS


def tuned(name: str, budget: float, clips: int, folder: Path) -> Tuned:
    """What is found for one budget."""
    subject = load(name)
    pixels = torch.cat([batch.pixels for batch in made(check_made(subject, name, clips), "val", clips).batches])
    with Progress(transient=True) as bar:
        task = bar.add_task("capturing", total=None)
        model, tick = subject.model, partial(bar.update, task)
        return tune(model, pixels, budget=budget, batch=BATCH, folder=folder, tick=lambda what: tick(description=what))


def chart(found: Sequence[Tuned]) -> Chart:
    """All budgets as one line for each way; where two measured the same way at one cost, the first."""
    rows = tuple(row for each in found for row in each.rows if row.at_budget)
    merged = Tuned(found[0].config, found[0].budget, None, found[0].objective, rows, 0, found[0].reporting, {})
    return page.chart(merged)


def run(chosen: argparse.Namespace) -> None:
    """Tune, print, keep, draw. Raises TldrError."""
    check_writable(chosen.write, MARKER)
    check_outputs(chosen.out, chosen.picture)
    folder = configs(chosen.model)
    check_folder("--model", folder)
    folder.mkdir(parents=True, exist_ok=True)
    found, tables, records = [], [], {}
    for budget in chosen.budgets:
        each = tuned(chosen.model or checkpoint(), budget, chosen.clips, chosen.work / f"{budget:g}")
        each.config.save(folder / f"{budget:g}.json")
        found.append(each)
        tables.append(f"Budget {budget:g}.\n\n{page.table(each)}")
        records[f"{budget:g}"] = page.record(each)
        print(tables[-1], flush=True)
    machine = timing.machine(torch.device("cpu"))
    print(timing.write("tuned", {"clips": chosen.clips, "machine": machine, "budgets": records}, chosen.out))
    print(draw([chart(found)], chosen.picture))
    write(chosen.write, "\n\n".join(tables), MARKER)


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model for made clips; default: the first that is trained here")
    parser.add_argument("--budgets", type=part, nargs="+", default=(0.5, 0.4, 0.3), metavar="PART")
    parser.add_argument("--clips", type=positive, default=CLIPS, help=f"a multiple of 80 (default: {CLIPS})")
    parser.add_argument("--work", type=Path, help="for what is measured; default: tuning, or tuning-NAME for --model")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default: benchmarks/results, or one for --model")
    parser.add_argument("--picture", type=Path, help="PNG; default: docs/tuned.png, or beside the JSON of --model")
    add_write(parser, MARKER)
    chosen = placed(parser.parse_args(argv), "tuned", PICTURES / "tuned.png")
    chosen.work = chosen.work or Path(f"tuning-{Path(chosen.model).name}" if chosen.model else "tuning")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after an error that one line on stderr explains."""
    chosen = options(argv)
    return status("tuned", lambda: run(chosen))


if __name__ == "__main__":
    sys.exit(main())
