"""`tldr tune`: the configuration that keeps a model's answers best at a budget, found on a folder of videos."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tldr_compile.media.models import device_of
from tldr_compile.quality.data import load, unlabelled
from tldr_compile.records import kept
from tldr_compile.records.charts import draw
from tldr_compile.records.outputs import check_folder
from tldr_compile.tuning import page, tune
from tldr_compile.tuning.tuner import check_limit

CONFIG, PICTURE = "config.json", "tune.png"


def run(arguments: argparse.Namespace) -> None:
    """Tune, print, keep, draw. Raises TldrError; the folder is looked at before the work."""
    check_limit(arguments.budget, arguments.latency)
    out = arguments.out or Path(f"tune-{Path(arguments.model).name}-{arguments.budget or arguments.latency:g}")
    check_folder("--out", out)
    device = device_of(arguments.device)
    subject = load(arguments.model)
    clips, skipped = unlabelled(subject, arguments.data, arguments.clips)
    for text in skipped:
        print(f"skipped: {text}")
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as bar:
        tuned = tune(
            subject.model.to(device),
            clips.to(device),
            budget=arguments.budget,
            latency=arguments.latency,
            batch=arguments.batch,
            seed=arguments.seed,
            folder=out,
            tick=_ticking(bar),
        )
    print(page.table(tuned))
    tuned.config.save(out / CONFIG)
    print(kept.write("tune", {**page.record(tuned), "machine": kept.machine(device)}, out))
    print(draw([page.chart(tuned)], out / PICTURE))
    print(f"{out / CONFIG}: give its path as options={{'config': PATH}}, apply(config=PATH) or --config PATH")


def _ticking(bar: Progress) -> Callable[[str], None]:
    task = bar.add_task("capturing the model", total=None)
    return lambda what: bar.update(task, description=what)
