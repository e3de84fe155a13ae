"""What merging does to accuracy, beside what else makes a video model cheaper, at equal GFLOPs.

    python -m benchmarks.quality.compare [--write docs/quality.md]                     # the model that is trained here
    python -m benchmarks.quality.compare --model HUB_ID_OR_FOLDER --data FOLDER  # real weights on real videos

FOLDER is laid out as Kinetics (FOLDER/class name/clip.mp4) or as Something-Something (FOLDER/videos/id.webm,
FOLDER/validation.json, FOLDER/labels.json). Each video is read as one clip, evenly sampled, centre crop. The shape of
the schedule is chosen for every method on other clips than those of the table. `--write` replaces what stands between
two lines `<!-- quality -->`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TimeElapsedColumn, track

from benchmarks import timing
from benchmarks.plot import PICTURES, draw
from benchmarks.quality import latency, methods, tell
from benchmarks.quality.accuracy import Said, alone, hits, rows, said, verdict
from benchmarks.quality.budget import Cell, Merger
from benchmarks.quality.command import check_outputs, check_writable, placed, status
from benchmarks.quality.data import VAL_CLIPS, Part, check_made, checkpoint, folder, load, made
from benchmarks.quality.methods import CANDIDATES, METHODS, TIMED
from benchmarks.quality.train import CHECKPOINTS, HERE
from benchmarks.tables import add_write, write
from tldr_compile.cli.main import positive
from tldr_compile.cli.models import Subject, device_of
from tldr_compile.errors import OptionError

DENSE, HALF = "dense", "dense, half the layers"


def budget(text: str) -> float:
    """A part of the dense GFLOPs."""
    try:
        part = float(text)
    except ValueError:
        part = 0.0
    if not 0 < part < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no budget: write a part of the dense GFLOPs, such as 0.6")
    return part


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="methods:\n" + "".join(f"  {name!r}\n" for name in METHODS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="hub id or folder; default: the checkpoint that is trained here")
    parser.add_argument("--data", type=Path, help="folder of videos; default: made clips")
    parser.add_argument(
        "--clips", type=positive, default=1600, help="test clips; of made ones a multiple of 80 (default: 1600)"
    )
    parser.add_argument(
        "--budgets",
        type=budget,
        nargs="+",
        default=(0.9, 0.75, 0.6, 0.45, 0.3),
        help="parts of the dense GFLOPs (default: 0.9 0.75 0.6 0.45 0.3)",
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, metavar="NAME", default=tuple(METHODS), help="default: all; see below"
    )
    parser.add_argument("--batch", type=positive, default=8, help="videos per call, timed ones too (default: 8)")
    parser.add_argument("--rounds", type=positive, default=15, help="measurements of each latency (default: 15)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default: benchmarks/results, or one for --model")
    parser.add_argument("--picture", type=Path, help="PNG; default: docs/quality.png, or beside the JSON of --model")
    add_write(parser, tell.MARKER)
    return placed(parser.parse_args(argv), "quality", PICTURES / "quality.png")


def subject(chosen: argparse.Namespace) -> Subject:
    """The dense model. Raises OptionError, ModelError."""
    if chosen.data and not chosen.model:
        raise OptionError("--data needs --model: the checkpoint that is trained here knows made clips alone")
    return load(chosen.model or checkpoint())


def half(chosen: argparse.Namespace) -> dict[str, Subject]:
    """The smaller dense model; nothing where there is none."""
    path = HERE / CHECKPOINTS["half"]
    if chosen.model:
        return {}
    if not path.is_dir():
        print(f"left out: {HALF}: there is no {path.name} (python -m benchmarks.quality.train --size half)")
        return {}
    return {HALF: load(str(path))}


def parts(chosen: argparse.Namespace, dense: Subject) -> tuple[Part, Part]:
    """The clips to choose the shape by, and those of the table."""
    if chosen.data:
        return folder(dense, chosen.data, chosen.clips, chosen.batch)
    check_made(dense, chosen.model or CHECKPOINTS["base"], chosen.clips)
    return made("val", min(VAL_CLIPS, chosen.clips)), made("test", chosen.clips)


def listen(merger: Merger, cells: Sequence[Cell], dense: Mapping[str, Subject], part: Part, title: str) -> Said:
    """What the dense models and those of the cells say of the clips; models that several cells share run once."""
    configs = dict.fromkeys(config for cell in cells for config in cell.configs)
    models: dict[Any, torch.nn.Module] = {name: each.model for name, each in dense.items()}
    models |= {config: merger.merged(config) for config in track(configs, "rewriting", transient=True)}
    try:
        with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as progress:
            told = f"{title}: {part.clips} clips, {len(models)} models"
            task = progress.add_task(told, total=part.count * len(models))
            return said(models, part.batches, merger.device, lambda: progress.advance(task))
    finally:
        for text in part.skipped:
            print(f"skipped: {text}")


def candidates(
    merger: Merger, names: Sequence[str], budgets: Sequence[float], all_budgets: Sequence[float]
) -> dict[tuple[str, str], list[Cell]]:
    """Of every method whose shape is open, and every shape that meets all budgets: the cells at some of them.

    Raises OptionError for a method of which no shape does.
    """
    found: dict[tuple[str, str], list[Cell]] = {}
    tried = product((name for name in names if METHODS[name].shape is None), CANDIDATES)
    for name, shape in track(list(tried), "shapes of the schedules", transient=True):
        *some, least = merger.cells(name, METHODS[name], shape, [*budgets, min(all_budgets)])
        missed = next((cell.missed for cell in (*some, least) if cell.missed), "")
        if not missed:
            found[name, shape] = some
        elif shape == CANDIDATES[-1] and not any(known == name for known, _ in found):
            raise OptionError(f"--budgets: no shape of schedule meets them all for {name}; {shape}: {missed}")
    return found


def choose(merger: Merger, names: Sequence[str], budgets: Sequence[float], part: Part) -> dict[str, Any]:
    """For every method the shape that is best for it over every second budget. Raises OptionError."""
    some = budgets[1::2] or budgets
    cells = candidates(merger, names, some, budgets)
    heard = listen(merger, [cell for each in cells.values() for cell in each], {}, part, "choosing")
    accuracy: dict[str, dict[str, float]] = {}
    for (name, shape), each in cells.items():
        mean = torch.stack([hits(heard, cell.configs).mean() for cell in each]).mean()
        accuracy.setdefault(name, {})[shape] = float(mean)
    return {
        "chosen": {name: max(by, key=by.__getitem__) for name, by in accuracy.items()},
        "by": "mean accuracy over the budgets below, on clips that are not in the table; shapes that miss one are out",
        "budgets": list(some),
        "clips": len(heard.labels),
        "accuracy": accuracy,
        "skipped": part.skipped,
    }


def record(chosen: argparse.Namespace) -> dict[str, Any]:
    """Measure everything. Raises TldrError."""
    device = device_of(chosen.device)
    dense = {DENSE: subject(chosen), **half(chosen)}
    val, test = parts(chosen, dense[DENSE])
    for each in dense.values():
        each.model.to(device)
    first = dense[DENSE]
    shape = (first.frames, 3, *first.preprocessing.crop)
    mergers = {name: Merger(each.model, torch.zeros(test.batch, *shape, device=device)) for name, each in dense.items()}
    merger = mergers[DENSE]
    shapes = choose(merger, chosen.methods, chosen.budgets, val)
    cells = [
        cell
        for name in track(chosen.methods, "meeting budgets", transient=True)
        for cell in merger.cells(name, METHODS[name], shapes["chosen"].get(name, METHODS[name].shape), chosen.budgets)
    ]
    heard = listen(merger, cells, dense, test, "testing")
    told = [alone(name, mergers[name].dense, heard, DENSE) for name in dense] + rows(cells, heard, DENSE)
    timed = [cell for cell in cells if cell.method in TIMED]
    calls = latency.calls({name: each.model for name, each in dense.items()}, DENSE, timed)
    clips = torch.randn(chosen.batch, *shape, device=device)
    over = latency.ratios(calls, (DENSE, None), clips, chosen.rounds)
    return {
        "model": chosen.model or CHECKPOINTS["base"],
        "data": str(chosen.data or "made clips, test split"),
        "clips": len(heard.labels),
        "skipped": test.skipped,
        "budgets": list(chosen.budgets),
        "shapes": shapes,
        "latency": {"batch": chosen.batch, "rounds": chosen.rounds, "dense": "torch.compile, Inductor"},
        "verdict": verdict(told),
        "machine": timing.machine(device),
        "rows": [{**asdict(row), "over_dense": over.get((row.method, row.budget))} for row in told],
    }


def run(chosen: argparse.Namespace) -> None:
    """Measure, print, keep, draw. Raises TldrError."""
    check_outputs(chosen)
    check_writable(chosen.write, tell.MARKER)
    methods.register()
    facts = record(chosen)
    print(tell.long(facts))
    print(timing.write("quality", facts, chosen.out))
    print(draw(tell.charts(facts), chosen.picture))
    write(chosen.write, tell.short(facts), tell.MARKER)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after an error that one line on stderr explains."""
    chosen = options(argv)
    return status("quality", lambda: run(chosen))


if __name__ == "__main__":
    sys.exit(main())
