"""Trains the quality benchmark's models from scratch on made clips; killed and started again, it goes on.

    python -m benchmarks.quality.train
    python -m benchmarks.quality.train --size half
    python -m benchmarks.quality.train --task order     # masked pretraining, then fine-tuning
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import VideoMAEForVideoClassification

from benchmarks import timing
from benchmarks.quality import clips, model, report
from benchmarks.quality.command import status
from benchmarks.quality.model import Measure
from benchmarks.quality.sources import Split
from benchmarks.quality.tasks import DIRECTION, ORDER, TASKS, Task
from benchmarks.quality.training import Settings, StateError, Training
from tldr_compile.cli.main import positive
from tldr_compile.quality.accuracy import wilson
from tldr_compile.records.charts import draw
from tldr_compile.records.outputs import check_folder

HERE = Path(__file__).parent
RECIPES = {
    DIRECTION.name: Settings("base", (8000, 4000), batch=32, seed=0, rate=1.5e-3),
    ORDER.name: Settings("base", (8000,), batch=16, seed=0, rate=1.5e-3, task=ORDER.name, pretrain=500),
}
"""What the kept models are trained by."""
LOG_EVERY, VALIDATE_EVERY, SAVE_SECONDS = 50, 500, 120.0
VAL_CLIPS, TEST_CLIPS, EVAL_BATCH = 400, 4000, 80


def kept(settings: Settings) -> str:
    """The name of the folder, here, that holds the model of such a run."""
    task = "" if settings.task == DIRECTION.name else f"-{settings.task}"
    return f"checkpoint{task}{'' if settings.size == 'base' else f'-{settings.size}'}"


def train(training: Training, until: int, folder: Path) -> None:
    """Learn until step `until`; keeps `state.pt` and `log.jsonl` in the folder."""
    since: list[Measure] = []
    saved = started = time.perf_counter()
    before = training.seconds
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=until, completed=training.step)
        while training.step < until:
            faint, split = training.contrast, "pretrain" if training.pretraining else "train"
            since.append(training.learn(training.clips()))
            now = time.perf_counter()
            training.seconds = before + now - started
            progress.advance(task)
            if training.step % LOG_EVERY == 0 or training.step in (until, training.settings.pretrain):
                told = model.mean(since)
                training.history.append(_entry(training, split, faint, told))
                _log(training, folder)
                progress.update(task, description="  ".join(f"{name} {value:.2f}" for name, value in told.items()))
                since.clear()
            if now - saved > SAVE_SECONDS or training.step == until:
                training.save(folder / "state.pt")
                saved = now


def _log(training: Training, folder: Path) -> None:
    """Add validation to the history, and write it out whole: a resumed run takes steps again."""
    if training.step % VALIDATE_EVERY == 0 and not training.pretraining:
        told = evaluate(training.model, training.task, "val", VAL_CLIPS)
        training.history.append(_entry(training, "val", 1.0, told))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in training.history))


def _entry(training: Training, split: str, faint: float, told: Measure) -> dict[str, Any]:
    numbers = {"seconds": training.seconds, "contrast": faint, **told}
    return {"step": training.step, "split": split, **{name: round(value, 4) for name, value in numbers.items()}}


@torch.no_grad()
def evaluate(network: VideoMAEForVideoClassification, task: Task, split: Split, number: int) -> Measure:
    """Measures over the first `number` clips of a split, a multiple of 80, at full contrast in float32."""
    network.eval()
    some = batches(task, split, number)
    measures = [model.measure(network(batch.pixels).logits, batch.labels, task) for batch in some]
    network.train()
    return model.mean(measures)


def batches(task: Task, split: Split, number: int) -> Iterator[clips.Clips]:
    """Batches of 80 clips, so as many of every class. Raises ValueError when they do not add up to `number`."""
    if number % EVAL_BATCH:
        raise ValueError(f"{number} clips are not a multiple of {EVAL_BATCH}, as many of every class")
    for first in range(0, number, EVAL_BATCH):
        yield clips.make(task, split, range(first, first + EVAL_BATCH))


def finish(training: Training, out: Path) -> dict[str, Any]:
    """Measure the test split once; write weights, card, metrics, log and curve into `out`."""
    network = training.model.eval()
    tested = evaluate(network, training.task, "test", TEST_CLIPS)
    low, high = wilson(round(tested["joint"] * TEST_CLIPS), TEST_CLIPS)
    facts = {
        "settings": asdict(training.settings),
        "layers": network.config.num_hidden_layers,
        "width": network.config.hidden_size,
        "tokens": math.prod(model.tokens(network.config)),
        "parameters": sum(value.numel() for value in network.parameters()),
        "gflops": model.gflops(network),
        "hours": training.seconds / 3600,
        "val": {"clips": TEST_CLIPS, **evaluate(network, training.task, "val", TEST_CLIPS)},
        "test": {"clips": TEST_CLIPS, **tested, "joint_95": [low, high]},
        "machine": timing.machine(torch.device("cpu")),
    }
    network.save_pretrained(out)
    timing.write("metrics", facts, out)
    (out / "README.md").write_text(report.card(facts, training.task))
    (out / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in training.history))
    draw(report.curves(training.history, training.task), out / "curve.png")
    return facts


def whole(text: str) -> int:
    """What `--pretrain` takes: `positive`, or 0."""
    return 0 if text == "0" else positive(text)


def learning_rate(text: str) -> float:
    try:
        said = float(text)
    except ValueError:
        said = math.nan
    if not 0 < said < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no learning rate: write a positive number, such as 1.5e-3")
    return said


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default=DIRECTION.name, help="what the clips ask")
    recipe = parser.add_argument_group("recipe", "defaults: what the kept model of the task was trained by")
    add = partial(recipe.add_argument, default=argparse.SUPPRESS)
    add("--size", choices=model.SIZES, help="half: about half the GFLOPs")
    add("--pretrain", type=whole, help="steps of masked pretraining; 0: none")
    add(
        "--steps",
        type=positive,
        nargs="+",
        help="of each cycle of the learning rate; a finished run goes on if one is added",
    )
    add("--batch", type=positive, help="clips per step")
    add("--seed", type=int, help="of weights and clips")
    add("--rate", type=learning_rate, help="peak learning rate")
    parser.add_argument("--out", type=Path, help="folder for the result; default: the kept model's, here")
    parser.add_argument("--work", type=Path, help="folder for state and log; default: one in .training, here")
    return parser.parse_args(argv)


def settings_of(chosen: argparse.Namespace) -> Settings:
    """The task's recipe, with what the options say instead."""
    recipe = RECIPES[chosen.task]
    given = {name: value for name, value in vars(chosen).items() if name in asdict(recipe)}
    return replace(recipe, **{**given, "steps": tuple(given.get("steps", recipe.steps))})


def check_kept(out: Path, settings: Settings) -> None:
    """Raises StateError where the folder holds the checkpoint of another run, which would be lost."""
    metrics = out / "metrics.json"
    if not metrics.is_file():
        return
    said = json.loads(metrics.read_text())["settings"]
    before = Settings(**{**said, "steps": tuple(said["steps"])})
    if not settings.follow(before):
        raise StateError(f"{out} holds a checkpoint of {before}: name another folder with --out, or give its options")


def run(chosen: argparse.Namespace) -> None:
    """Train or go on, then measure and keep. Raises StateError, OptionError."""
    settings = settings_of(chosen)
    out = chosen.out or HERE / kept(settings)
    folder = chosen.work or HERE / ".training" / kept(settings)
    check_kept(out, settings)
    check_folder("--out", out)
    check_folder("--work", folder)
    training = Training.fresh(settings, model.config(TASKS[settings.task], settings.size))
    if (folder / "state.pt").exists():
        training.resume(folder / "state.pt")
        print(f"going on from step {training.step}, kept in {folder}")
    train(training, settings.total, folder)
    test = finish(training, out)["test"]
    low, high = test["joint_95"]
    print(f"test accuracy {test['joint']:.1%} ({low:.1%} to {high:.1%}), kept in {out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after an error that one line on stderr explains."""
    chosen = options(argv)
    return status("train", lambda: run(chosen))


if __name__ == "__main__":
    sys.exit(main())
