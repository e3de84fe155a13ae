"""`tune`: the configuration that keeps a model's answers best at a budget, found on somebody's own clips."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tldr_compile.config import TokenMerging
from tldr_compile.config_file import this_version
from tldr_compile.errors import OptionError, ScheduleError
from tldr_compile.tuning import ways
from tldr_compile.tuning.answers import Far, answer, check_answer, objective_of
from tldr_compile.tuning.calls import Call, Clips, calls_of, digest
from tldr_compile.tuning.judge import Judge, Met, Way
from tldr_compile.tuning.latency import part_with, ratio
from tldr_compile.tuning.search import Search
from tldr_compile.tuning.store import Store

BATCH: Final = 16
TUNED: Final = "tuned"
Z95: Final = 1.959964
SEARCHED: Final[Mapping[str, Any]] = {
    name: getattr(TokenMerging(), name) for name in ("saliency", "metric", "reduction", "margin")
}
"""Options that tuning finds, beside the schedule, as they are where none is given."""
AROUND: Final = (0.8, 1.25)
"""Parts of the budget at which the chosen way and the published ones are measured too, for the picture."""


@dataclass(frozen=True)
class Row:
    """A configuration on the clips that chose nothing."""

    name: str
    part: float
    """Of the dense operations."""
    config: TokenMerging
    same: tuple[float, float]
    """Share of the clips with the dense model's answer, or the cosine: mean, and half of its 95 % interval."""
    distance: float
    ahead: tuple[float, float]
    """How far the tuned configuration is ahead in `same` over the same clips: mean, and half of its 95 % interval."""
    at_budget: bool


@dataclass(frozen=True)
class Tuned:
    """What tuning found."""

    config: TokenMerging
    """Give it to `apply(config=)`, or save it and give the path."""
    budget: float
    latency: float | None
    """Of the dense model's time, measured; None where operations were asked for."""
    objective: str
    rows: tuple[Row, ...]
    """The first is the tuned configuration."""
    choosing: int
    reporting: int
    """Clips that chose, and those that the rows are of."""
    refused: Mapping[str, str]
    """Ways that could not be tried, and why."""


def tune(
    model: nn.Module,
    clips: Clips,
    *,
    budget: float | None = None,
    latency: float | None = None,
    objective: str = "auto",
    config: TokenMerging | None = None,
    batch: int = BATCH,
    seed: int = 0,
    folder: str | Path | None = None,
    tick: Callable[[str], Any] = lambda what: None,
) -> Tuned:
    """Find the configuration that keeps the answers of `model` best while its graph costs `budget` of the dense one.

    Every registered signal, metric and reduction is tried, then shapes of the schedule, then single sites, by
    successive halving (Jamieson and Talwalkar, AISTATS 2016). Half of the clips choose; the rows of the result are of
    the other half. On the clips that choose, the result is no worse than any published way at the same budget.

    Args:
        model: in eval mode, as `apply` takes it.
        clips: a tensor `[K, ...]` of K clips for a model that takes one tensor; or a sequence of calls, each a tensor
            `[B, ...]` or a tuple of arguments, all of the same shapes. They need no labels.
        budget: the part of the dense operations that the merged graph may cost, in (0, 1).
        latency: instead, the part of the dense model's time that the merged one may take, both compiled by Inductor
            and called with `batch` clips, in (0, 1). It is measured, so nothing else should run meanwhile; the best
            way is compared with plain merging once more where both take as long.
        objective: what is kept: "logits" (KL divergence; told as agreement), "embedding" (cosine) or "tokens" (mean
            cosine over tokens). "auto" reads it off the output: what is called logits, or a plain `[B, K]`, is logits.
        config: options that stay as they are: all but schedule, saliency, metric, reduction and margin.
        batch: clips of one call.
        seed: of how clips are divided and ordered.
        folder: where measurements are kept; a run that was interrupted goes on from there.
        tick: called with what is being done.

    Raises:
        OptionError: too few clips, clips of several shapes, a folder of another model, clips or objective, a model
            that answers with no number, or the same clips differently.
        ScheduleError: a budget below what the sites allow; the least that is possible is named.
        CaptureError, NothingToMerge: as `apply`.
    """
    base = config or TokenMerging()
    _check(model, base, batch)
    check_limit(budget, latency)
    base = replace(base, **SEARCHED)
    calls = calls_of(clips, batch)
    with torch.inference_mode():
        first = model(*calls[0].args)
    objective = objective_of(first) if objective == "auto" else objective
    check_answer(objective, answer(first))
    store = Store(Path(folder) if folder is not None else None, _about(model, calls, objective))
    try:
        judge = Judge(model, calls, base, objective, store)
        order = random.Random(seed).sample(range(len(calls)), len(calls))
        choosing, reporting = order[: len(order) // 2], order[len(order) // 2 :]
        plain = ways.plain(base, judge.able)
        if latency is not None:
            budget = part_with(judge, model, plain, latency, tick)
        assert budget is not None
        search = Search(judge, budget, choosing, seed, tick)
        published = search.published(base)
        best = search.best(base, published)
        if latency is not None:  # ways of equal operations differ in time
            best = search.ranked(_in_time(search, model, [best.way, plain], latency))[0]
        rows = _rows(judge, search, best, published, sorted(reporting), budget)
        made_for = {"model": type(model).__name__, "sites": len(judge.able)}
        took = None if latency is None else ratio(judge, model, best.config)
    finally:
        store.close()
    chose, told = (sum(calls[index].clips for index in some) for some in (choosing, reporting))
    return Tuned(replace(best.config, made_for=made_for), budget, took, objective, rows, chose, told, search.refused)


def check_limit(budget: float | None, latency: float | None) -> None:
    """Raises OptionError for both or none of them, and for what is no part."""
    if (budget is None) == (latency is None):
        raise OptionError("tune takes budget=, a part of the dense operations, or latency=, of its time: give one")
    if latency is not None and not (isinstance(latency, float) and 0 < latency < 1):
        raise OptionError(f"latency={latency!r}: latency is a part of the dense model's time, between 0 and 1")
    TokenMerging(budget=budget)  # says what is no budget


def _check(model: nn.Module, base: TokenMerging, batch: int) -> None:
    """Raises OptionError."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"the model is {type(model).__name__}: tuning calls it, and takes an nn.Module")
    if not isinstance(base, TokenMerging):
        raise OptionError(f"config={base!r}: tuning takes a TokenMerging, with the options that stay as they are")
    if not isinstance(batch, int) or batch < 1:
        raise OptionError(f"batch={batch!r}: batch is a number of clips, 1 or more")
    if not base.is_default_schedule or base.budget is not None:
        raise OptionError("config= says a schedule or a budget: tuning finds the schedule, and budget= is its own")
    if base.outputs != "restore":
        raise OptionError("config= says outputs='merged': answers are compared at full length; set it on the result")
    if model.training:
        raise OptionError(f"{type(model).__name__} is in training mode, where answers vary: call model.eval() first")


def _about(model: nn.Module, calls: Sequence[Call], objective: str) -> dict[str, Any]:
    """What measurements in a folder are of."""
    return {
        "tldr-compile": this_version(),
        "model": type(model).__name__,
        "weights": digest(each for entry in model.state_dict().items() for each in entry),
        "clips": digest(each for call in calls for each in pytree.tree_leaves(call.args)),
        "calls": len(calls),
        "objective": objective,
    }


def _in_time(search: Search, model: nn.Module, some: Sequence[Way], latency: float) -> list[Met]:
    """Those ways that can have the latency, each with as many operations as have it."""
    found, judge = [], search.judge
    for way in dict.fromkeys(each for each in some if each.weights):
        try:
            found.append(judge.meets(way, part_with(judge, model, way, latency, search.tick)))
        except ScheduleError as error:  # not of the plain way, which had it before there was a search
            search.refused[way.name] = str(error)
    return found


def _rows(
    judge: Judge, search: Search, best: Met, published: Sequence[Met], some: Sequence[int], budget: float
) -> tuple[Row, ...]:
    """The tuned configuration and the published ones on clips that chose nothing; both around the budget, too."""
    tuned = replace(best, way=replace(best.way, name=TUNED))
    at_budget = [tuned, *published]
    scalable = [each.way for each in at_budget if each.way.weights]
    near = [
        met
        for part in AROUND
        if budget * part < 1
        for met in Search(judge, budget * part, some, 0, search.tick).met(scalable)
    ]
    chosen = judge.far(best.config, some)
    return tuple(
        _row(met, judge.far(met.config, some), chosen, at_budget=index < len(at_budget))
        for index, met in enumerate([*at_budget, *near])
    )


def _row(met: Met, far: Far, chosen: Far, *, at_budget: bool) -> Row:
    return Row(
        met.way.name,
        met.part,
        met.config,
        _mean(far.same),
        float(far.distance.mean()),
        _mean(chosen.same - far.same),
        at_budget,
    )


def _mean(values: Tensor) -> tuple[float, float]:
    """Of `values [N]` the mean, and half of its 95 % interval."""
    return float(values.mean()), Z95 * float(values.std(correction=0)) / len(values) ** 0.5
