"""Each law against mutants: something is broken on purpose, and the law must say so.

A mutant is one of our operators, or a part of the report, that does what it must not. The law holds without it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram, export

import tldr_compile
from tests.laws import spellings, test_accounting, test_spellings, test_streams
from tests.laws.accounting import calls, dearer, miscounted, unaccounted
from tests.laws.independence import raised
from tests.laws.spellings import Encoder
from tldr_compile import MergedModule, Report, ops

Mutant = Callable[..., Any]
NAMES = ("group", "down", "up", "mean", "sum", "softmax", "attend", "attend_and_sharpness", "saliency")
REAL: dict[str, Callable[..., Any]] = {name: getattr(ops, name) for name in NAMES}


def apply(program: ExportedProgram, mutants: dict[str, Mutant], **options: Any) -> MergedModule:
    with pytest.MonkeyPatch.context() as patch:
        for name, mutant in mutants.items():
            patch.setattr(ops, name, mutant)
        if "saliency" in mutants:  # a signal is called, not an operator
            patch.setitem(ops.SIGNALS, "attention", ops.Measure(("sharpness",), mutants["saliency"]))
        return tldr_compile.apply(program, **options)


# --- 8, Samples ---


def tokens_and_mean(s: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    return h, h.mean(1)


@cache
def encoder() -> ExportedProgram:
    torch.manual_seed(0)
    return export(Encoder(tokens_and_mean).eval(), (spellings.video(),))


def over_samples(value: Tensor) -> Tensor:
    return value.mean(0, keepdim=True).expand_as(value)


def grouped_together(metric: Tensor, *args: Any, **options: Any) -> ops.Grouping:
    return REAL["group"](over_samples(metric), *args, **options)


def salient_together(sharpness: Tensor) -> Tensor:
    return REAL["saliency"](sharpness - over_samples(sharpness))


def merged_together(x: Tensor, *fields: Tensor, dim: int) -> Tensor:
    return REAL["down"](x + 1e-5 * over_samples(x), *fields, dim=dim)


def restored_by_neighbour(x: Tensor, assign: Tensor, *, dim: int) -> Tensor:
    return REAL["up"](x, assign.roll(1, 0), dim=dim)


def pooled_together(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return REAL["mean"](x, over_samples(weight), **options)


def attended_together(*qkv: Tensor, log_mass: Tensor | None = None, **options: Any) -> Any:
    mass = None if log_mass is None else over_samples(log_mass)
    return REAL["attend_and_sharpness"](*qkv, log_mass=mass, **options)


def test_samples_hold_without_a_mutant() -> None:
    assert samples({}) == []


def samples(mutants: dict[str, Mutant]) -> list[str]:
    merged = apply(encoder(), mutants, schedule=[5, 3])
    return raised(encoder().module(), merged, (spellings.video(),), dims=(0,))


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("group", grouped_together),
        ("saliency", salient_together),
        ("down", merged_together),
        ("up", restored_by_neighbour),
        ("mean", pooled_together),
        ("attend_and_sharpness", attended_together),
    ],
)
def test_what_mixes_samples_is_found(name: str, mutant: Mutant) -> None:
    assert samples({name: mutant})


# --- 9, Spellings ---


def few(s: Any, h: Tensor) -> dict[str, dict[str, Tensor]]:
    """What the law compares, as little of it as each mutant shows in."""
    ones = torch.ones_like(h[..., :1])
    means = {"mean": h.mean(1), "sum / N": h.sum(1) / h.shape[1], "ones": (h * ones).sum(1) / ones.sum(1)}
    learned = {name: pool(s, h) for name, pool in spellings.LEARNED.items() if name in ("fused", "weighted sum")}
    return {"means": means, "learned pooling": {**learned, "exponentials": spellings.exponentials(s, h)}}


@cache
def spelled() -> ExportedProgram:
    torch.manual_seed(0)
    return export(Encoder(few, leading=1).eval(), (spellings.video(),))


@torch.no_grad()
def unequal(mutants: dict[str, Mutant]) -> list[str]:
    merged = apply(spelled(), mutants, schedule=[5, 3], saliency="uniform")
    return test_spellings.unequal(merged(spellings.video()))


def plain_mean(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return REAL["mean"](x, torch.ones_like(weight), **options)


def plain_sum(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return REAL["sum"](x, torch.ones_like(weight), **options)


def heavy_sum(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """Weights that do not add up to the number of tokens."""
    return REAL["sum"](x, weight * 1.01, **options)


def plain_softmax(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return REAL["softmax"](x, torch.ones_like(weight), **options)


def plain_attend(*qkv: Tensor, log_mass: Tensor | None = None, **options: Any) -> Tensor:
    return REAL["attend"](*qkv, **options)


def squared_attend(*qkv: Tensor, log_mass: Tensor | None = None, **options: Any) -> Tensor:
    return REAL["attend"](*qkv, log_mass=None if log_mass is None else 2 * log_mass, **options)


def mean_without_the_first(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """The class token weighs nothing."""
    first = torch.arange(weight.shape[1]).view(-1, *[1] * (weight.ndim - 2)) == 0
    return REAL["mean"](x, weight.masked_fill(first, 0), **options)


def test_spellings_hold_without_a_mutant() -> None:
    assert unequal({}) == []


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("mean", plain_mean),
        ("sum", plain_sum),
        ("sum", heavy_sum),
        ("softmax", plain_softmax),
        ("attend", plain_attend),
        ("attend", squared_attend),
        ("mean", mean_without_the_first),
    ],
)
def test_what_weighs_one_spelling_otherwise_is_found(name: str, mutant: Mutant) -> None:
    assert unequal({name: mutant})


# --- 10, Duplicates on models of several streams ---

VIEWS = "two views"


@torch.no_grad()
def apart(mutants: dict[str, Mutant]) -> float:
    """How far merging equal tokens is from changing nothing."""
    merged = apply(test_streams.program(VIEWS), mutants, schedule=[0.3, 0.3], **test_streams.LAW)
    return test_streams.off_by(merged(*test_streams.MODELS[VIEWS][1]), test_streams.dense(VIEWS))


def weightless(*args: Any, **options: Any) -> ops.Grouping:
    grouping = REAL["group"](*args, **options)
    return grouping._replace(mass=torch.ones_like(grouping.mass))


def joining_others(*args: Any, **options: Any) -> ops.Grouping:
    """Sources join the group of another one."""
    grouping = REAL["group"](*args, **options)
    return grouping._replace(target=grouping.target.flip(1))


def any_alike(metric: Tensor, *args: Any, **options: Any) -> ops.Grouping:
    noise = torch.randn(metric.shape, generator=torch.Generator().manual_seed(0))
    return REAL["group"](noise, *args, **options)


def kept_alone(x: Tensor, kept: Tensor, source: Tensor, target: Tensor, *weights: Tensor, dim: int) -> Tensor:
    """What the sources give is lost, their share is not given to others."""
    return REAL["down"](x, kept, source, target, weights[0], 0 * weights[1], dim=dim)


def restored_beside(x: Tensor, assign: Tensor, *, dim: int) -> Tensor:
    return REAL["up"](x, assign.roll(1, dim), dim=dim)


def test_duplicates_hold_without_a_mutant() -> None:
    assert apart({}) < 1e-5


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("attend", plain_attend),
        ("mean", plain_mean),
        ("group", weightless),
        ("group", joining_others),
        ("group", any_alike),
        ("down", kept_alone),
        ("up", restored_beside),
    ],
)
def test_what_changes_equal_tokens_is_found(name: str, mutant: Mutant) -> None:
    assert apart({name: mutant}) > 1e-4


# --- 11, Accounting ---

MIXED = "convolution"


def accounts(merged: MergedModule | None = None) -> list[str]:
    """All that the law says of a model whose blocks are restored for a convolution."""
    merged = merged or convolved()
    inputs = test_accounting.MODELS[MIXED][1]
    return [*unaccounted(merged), *miscounted(test_accounting.program(MIXED).module(), merged, inputs)]


def convolved(mutants: dict[str, Mutant] | None = None) -> MergedModule:
    return apply(test_accounting.program(MIXED), mutants or {}, schedule=[0.3, 0.3, 0.3])


def test_accounts_hold_without_a_mutant() -> None:
    assert accounts() == []


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("restorations", lambda real, report: real[:-1]),
        ("restorations", lambda real, report: [*real, {**real[0], "value": "nowhere"}]),
        ("sites", lambda real, report: [{**real[0], "status": "left"}, *real[1:]]),
        ("sites", lambda real, report: [{**site, "tokens_out": site["tokens_in"]} for site in real]),
        ("gflops", lambda real, report: (real[0], real[0])),
        ("gflops", lambda real, report: (real[0] * 0.9, real[1])),
    ],
)
def test_a_report_that_tells_something_else_is_found(
    part: str, told: Callable[[Any, Report], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = convolved().report
    real = getattr(honest, part)
    monkeypatch.setattr(Report, part, property(lambda report: told(real, report)))
    assert accounts()


def test_a_restoration_that_nobody_told_is_found() -> None:
    merged = convolved()
    twice(merged.graph_module.graph, "up")
    assert accounts(merged)


def test_a_grouping_that_nobody_told_is_found() -> None:
    merged = convolved()
    twice(merged.graph_module.graph, "group")
    assert accounts(merged)


def test_a_restoration_by_another_operator_is_found() -> None:
    assert accounts(convolved({"up": lambda x, assign, *, dim: REAL["up"](x, assign, dim=dim)}))


def test_work_that_nobody_told_is_found() -> None:
    """The merge costs a product that the report knows nothing of."""
    merged = convolved()
    real = merged.forward
    merged.forward = lambda *args: (torch.ones(8, 8) @ torch.ones(8, 8), real(*args))[1]  # type: ignore[method-assign]
    assert accounts(merged)


def test_a_plan_that_costs_more_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Report, "gflops", property(lambda report: (1.0, 1.001)))
    assert list(dearer(convolved())) == ["GFLOPs 1 -> 1.001 (100.1%)"]


def twice(graph: fx.Graph, name: str) -> None:
    """Call an operator once more, where it was called last."""
    call = calls(graph, name)[-1]
    with graph.inserting_after(call):
        graph.node_copy(call)
