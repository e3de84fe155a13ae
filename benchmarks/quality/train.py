"""Trains the quality benchmark's model from scratch on made clips; killed and started again, it goes on.

    python -m benchmarks.quality.train
    python -m benchmarks.quality.train --size half
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import VideoMAEForVideoClassification

from benchmarks import timing
from benchmarks.quality import clips, model, report
from benchmarks.quality.clips import Split
from benchmarks.quality.command import status
from benchmarks.quality.model import Measure, Size
from benchmarks.quality.training import Settings, StateError, Training, contrast
from tldr_compile.cli.main import positive
from tldr_compile.quality.accuracy import wilson
from tldr_compile.records.charts import draw
from tldr_compile.records.outputs import check_folder

HERE = Path(__file__).parent
CHECKPOINTS: dict[Size, str] = {"base": "checkpoint", "half": "checkpoint-half"}
LOG_EVERY, VALIDATE_EVERY, SAVE_SECONDS = 50, 500, 120.0
VAL_CLIPS, TEST_CLIPS, EVAL_BATCH = 400, 4000, 80


def train(training: Training, until: int, folder: Path) -> None:
    """Learn until step `until`; keeps `state.pt` and `log.jsonl` in the folder."""
    since: list[Measure] = []
    saved = started = time.perf_counter()
    before = training.seconds
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=until, completed=training.step)
        while training.step < until:
            since.append(training.learn(training.clips()))
            now = time.perf_counter()
            training.seconds = before + now - started
            progress.advance(task)
            if training.step % LOG_EVERY == 0 or training.step == until:
                told = _log(training, folder, model.mean(since))
                progress.update(task, description=told)
                since.clear()
            if now - saved > SAVE_SECONDS or training.step == until:
                training.save(folder / "state.pt")
                saved = now


def _log(training: Training, folder: Path, learned: Measure) -> str:
    """Add to the history, write it out whole (a resumed run takes steps again), and tell it in a line."""
    training.history.append(_entry(training, "train", contrast(training.step, training.settings.steps[0]), learned))
    if training.step % VALIDATE_EVERY == 0:
        training.history.append(_entry(training, "val", 1.0, evaluate(training.model, "val", VAL_CLIPS)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in training.history))
    return f"loss {learned.loss:.2f}  joint {learned.joint:.0%}"


def _entry(training: Training, split: Split, faint: float, told: Measure) -> dict[str, Any]:
    numbers = {"seconds": training.seconds, "contrast": faint, **told._asdict()}
    return {"step": training.step, "split": split, **{name: round(value, 4) for name, value in numbers.items()}}


@torch.no_grad()
def evaluate(network: VideoMAEForVideoClassification, split: Split, number: int) -> Measure:
    """Measures over the first `number` clips of a split, a multiple of 80, at full contrast in float32."""
    network.eval()
    measures = [model.measure(network(batch.pixels).logits, batch.labels) for batch in batches(split, number)]
    network.train()
    return model.mean(measures)


def batches(split: Split, number: int) -> Iterator[clips.Clips]:
    """Batches of 80 clips, so of one of every class. Raises ValueError when they do not add up to `number`."""
    if number % EVAL_BATCH:
        raise ValueError(f"{number} clips are not a multiple of {EVAL_BATCH}, one of every class")
    for first in range(0, number, EVAL_BATCH):
        yield clips.make(split, range(first, first + EVAL_BATCH))


def finish(training: Training, out: Path) -> dict[str, Any]:
    """Measure the test split once; write weights, card, metrics, log and curve into `out`."""
    network = training.model.eval()
    tested = evaluate(network, "test", TEST_CLIPS)
    low, high = wilson(round(tested.joint * TEST_CLIPS), TEST_CLIPS)
    facts = {
        "settings": asdict(training.settings),
        "layers": network.config.num_hidden_layers,
        "width": network.config.hidden_size,
        "parameters": sum(value.numel() for value in network.parameters()),
        "gflops": model.gflops(network),
        "hours": training.seconds / 3600,
        "val": {"clips": TEST_CLIPS, **evaluate(network, "val", TEST_CLIPS)._asdict()},
        "test": {"clips": TEST_CLIPS, **tested._asdict(), "joint_95": [low, high]},
        "machine": timing.machine(torch.device("cpu")),
    }
    network.save_pretrained(out)
    timing.write("metrics", facts, out)
    (out / "README.md").write_text(report.card(facts))
    (out / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in training.history))
    draw([report.curve(training.history)], out / "curve.png")
    return facts


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
    parser.add_argument("--size", choices=model.SIZES, default="base", help="half: about half the GFLOPs")
    parser.add_argument(
        "--steps",
        type=positive,
        nargs="+",
        default=(8000, 4000),
        help="of each cycle of the learning rate (default: 8000 4000); a finished run goes on if one is added",
    )
    parser.add_argument("--batch", type=positive, default=32, help="clips per step (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and clips (default: 0)")
    parser.add_argument("--rate", type=learning_rate, default=1.5e-3, help="peak learning rate (default: 1.5e-3)")
    parser.add_argument("--out", type=Path, help="folder for the result; default: checkpoint or checkpoint-half here")
    parser.add_argument("--work", type=Path, help="folder for state and log; default: .training/SIZE here")
    return parser.parse_args(argv)


def check_kept(out: Path, settings: Settings) -> None:
    """Raises StateError where the folder holds the checkpoint of another run, which would be lost."""
    metrics = out / "metrics.json"
    if not metrics.is_file():
        return
    said = json.loads(metrics.read_text())["settings"]
    kept = Settings(**{**said, "steps": tuple(said["steps"])})
    if not settings.follow(kept):
        raise StateError(f"{out} holds a checkpoint of {kept}: name another folder with --out, or give its options")


def run(chosen: argparse.Namespace) -> None:
    """Train or go on, then measure and keep. Raises StateError, OptionError."""
    settings = Settings(chosen.size, tuple(chosen.steps), chosen.batch, chosen.seed, chosen.rate)
    out = chosen.out or HERE / CHECKPOINTS[chosen.size]
    folder = chosen.work or HERE / ".training" / chosen.size
    check_kept(out, settings)
    check_folder("--out", out)
    check_folder("--work", folder)
    training = Training.fresh(settings, model.config(chosen.size))
    if (folder / "state.pt").exists():
        training.resume(folder / "state.pt")
        print(f"going on from step {training.step}, kept in {folder}")
    train(training, sum(settings.steps), folder)
    test = finish(training, out)["test"]
    low, high = test["joint_95"]
    print(f"test accuracy {test['joint']:.1%} ({low:.1%} to {high:.1%}), kept in {out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after an error that one line on stderr explains."""
    chosen = options(argv)
    return status("train", lambda: run(chosen))


if __name__ == "__main__":
    sys.exit(main())
