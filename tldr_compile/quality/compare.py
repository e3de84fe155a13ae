"""What merging does to accuracy, beside what else makes a video model cheaper, at equal GFLOPs.

    choosing clips -> the shape of the schedule of every method; testing clips -> the table

The clips of the table choose nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any, Final, NamedTuple

import torch
from rich.progress import Progress, TimeElapsedColumn, track
from torch import Tensor, nn

from tldr_compile.api import explain
from tldr_compile.config import TokenMerging
from tldr_compile.errors import OptionError, TldrError
from tldr_compile.media.models import Subject
from tldr_compile.quality import latency, methods
from tldr_compile.quality.accuracy import Said, alone, hits, rows, said, verdict
from tldr_compile.quality.budget import MET, Cell, Merger
from tldr_compile.quality.data import Part
from tldr_compile.quality.methods import CANDIDATES, METHODS, TIMED, TUNED
from tldr_compile.quality.smaller import Less, fewer_frames, lower_resolution, on_less
from tldr_compile.records import kept

DENSE: Final = "dense"
FEWER_FRAMES, LOWER_RESOLUTION = "fewer frames", "lower resolution"


@dataclass(frozen=True)
class Study:
    """What is compared, and on which clips."""

    subject: Subject
    """The dense model, whose tokens are merged."""
    model: str
    data: str
    """Names, for people."""
    choosing: Part
    testing: Part
    budgets: Sequence[float]
    """Parts of the dense GFLOPs."""
    methods: Sequence[str]
    others: Mapping[str, nn.Module] = field(default_factory=dict)
    """Other dense models for the same clips, by name."""
    tuned: Sequence[TokenMerging] = ()
    """Configurations that were found on other clips."""
    batch: int = 8
    rounds: int = 15
    """Clips of a timed call, and measurements of each latency."""


def record(study: Study, device: torch.device) -> dict[str, Any]:
    """Measure everything. Raises TldrError."""
    for budget in study.budgets:
        TokenMerging(budget=budget)  # says what is no budget
    methods.register()
    dense: dict[str, nn.Module] = {DENSE: study.subject.model, **study.others}
    for each in dense.values():
        each.to(device)
    shape = (study.subject.frames, 3, *study.subject.preprocessing.crop)
    example = torch.zeros(study.testing.batch, *shape, device=device)
    mergers = {name: Merger(each, example) for name, each in dense.items()}
    merger = mergers[DENSE]
    shapes = choose(merger, study.methods, study.budgets, study.choosing)
    cells = [
        cell
        for name in track([name for name in study.methods if name not in shapes["left_out"]], "meeting budgets")
        for cell in merger.cells(name, METHODS[name], shapes["chosen"].get(name, METHODS[name].shape), study.budgets)
    ]
    tuned = [_tuned(merger, config, study.budgets) for config in study.tuned]
    less, left_out = on_less_video(study, example, merger.dense)
    cells += [*tuned, *less.cells]
    heard = listen(merger, cells, {**dense, **less.models}, study.testing, "testing")
    told = [alone(name, mergers[name].dense, heard, DENSE, tuned) for name in dense]
    told += rows(cells, heard, DENSE, tuned)
    timed = [cell for cell in cells if cell.method in TIMED]
    clips = torch.randn(study.batch, *shape, device=device)
    over = latency.ratios(latency.calls(dense, DENSE, timed), (DENSE, None), clips, study.rounds)
    return {
        "model": study.model,
        "data": study.data,
        "clips": len(heard.labels),
        "skipped": study.testing.skipped,
        "left_out": {**shapes["left_out"], **left_out},
        "budgets": list(study.budgets),
        "shapes": shapes,
        "latency": {"batch": study.batch, "rounds": study.rounds, "dense": "torch.compile, Inductor"},
        "verdict": verdict(told),
        "machine": kept.machine(device),
        "rows": [{**asdict(row), "over_dense": over.get((row.method, row.budget))} for row in told],
    }


class Lesser(NamedTuple):
    """The dense model on less video: modules by what they are given, and which of them stands at which budget."""

    models: dict[Less, nn.Module]
    cells: list[Cell]


def on_less_video(study: Study, example: Tensor, dense: float) -> tuple[Lesser, dict[str, str]]:
    """At every budget the cheapest that costs at least as much; and what is left out, and why."""
    found, left_out = Lesser({}, []), {}
    for name, options in ((FEWER_FRAMES, fewer_frames), (LOWER_RESOLUTION, lower_resolution)):
        try:
            costs = _costs(study, options(study.subject), example, min(study.budgets) * dense)
        except TldrError as error:
            left_out[name] = str(error)
            continue
        for budget in study.budgets:
            enough = [less for less, (_, gflops) in costs.items() if gflops >= budget * dense]
            if enough:
                least = min(enough, key=lambda less: costs[less][1])
                found.models[least], gflops = costs[least]
                found.cells.append(Cell(name, budget, (least,), gflops))
    return found, left_out


def _costs(study: Study, options: Iterable[Less], example: Tensor, least: float) -> dict[Less, tuple[nn.Module, float]]:
    """Modules and their GFLOPs a clip, until one costs less than `least`."""
    costs: dict[Less, tuple[nn.Module, float]] = {}
    for less in options:
        module = on_less(study.subject, less).to(example.device)
        gflops = explain(module, (example,), schedule=()).gflops[0] / len(example)
        if gflops < least:
            break
        costs[less] = module, gflops
    return costs


def _tuned(merger: Merger, config: TokenMerging, budgets: Sequence[float]) -> Cell:
    """A tuned configuration, at the budget that is nearest to what it costs."""
    gflops = merger.gflops(config)
    budget = min(budgets, key=lambda part: abs(part - gflops / merger.dense))
    part = gflops / merger.dense
    missed = f"made for another budget, {part:.3f}" if part > (1 + MET) * budget else ""
    return Cell(TUNED, budget, (config,), gflops, missed)


def choose(merger: Merger, names: Sequence[str], budgets: Sequence[float], part: Part) -> dict[str, Any]:
    """For every method the shape that is best for it over every second budget. Raises OptionError."""
    some = budgets[1::2] or budgets
    cells, left_out = candidates(merger, names, some, budgets)
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
        "left_out": left_out,
    }


def candidates(
    merger: Merger, names: Sequence[str], budgets: Sequence[float], all_budgets: Sequence[float]
) -> tuple[dict[tuple[str, str], list[Cell]], dict[str, str]]:
    """Of every method whose shape is open, and every shape that meets all budgets: the cells at some of them.

    And the methods of which no shape does, with the reason. Raises OptionError where that is all of them.
    """
    found: dict[tuple[str, str], list[Cell]] = {}
    left_out: dict[str, str] = {}
    tried = product((name for name in names if METHODS[name].shape is None), CANDIDATES)
    for name, shape in track(list(tried), "shapes of the schedules", transient=True):
        *some, least = merger.cells(name, METHODS[name], shape, [*budgets, min(all_budgets)])
        missed = next((cell.missed for cell in (*some, least) if cell.missed), "")
        if not missed:
            found[name, shape] = some
        elif shape == CANDIDATES[-1] and not any(known == name for known, _ in found):
            left_out[name] = f"no shape of schedule meets all budgets; {shape}: {missed}"
    if left_out and not found:
        name, why = next(iter(left_out.items()))
        raise OptionError(f"--budgets: {name}: {why}")
    return found, left_out


def listen(merger: Merger, cells: Sequence[Cell], dense: Mapping[Any, nn.Module], part: Part, title: str) -> Said:
    """What the dense models and those of the cells say of the clips; models that several cells share run once."""
    configs = dict.fromkeys(key for cell in cells for key in cell.configs if isinstance(key, TokenMerging))
    models: dict[Any, nn.Module] = dict(dense)
    models |= {config: merger.merged(config) for config in track(configs, "rewriting", transient=True)}
    try:
        with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as progress:
            told = f"{title}: {part.clips} clips, {len(models)} models"
            task = progress.add_task(told, total=part.count * len(models))
            return said(models, part.batches, merger.device, lambda: progress.advance(task))
    finally:
        for text in part.skipped:
            print(f"skipped: {text}")
