"""What the report tells is what the graph does: law 11."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram, export

import tldr_compile
from tests.generated.model import build
from tests.generated.recipe import Recipe
from tests.laws import frames, spellings, streams
from tests.laws.accounting import Counting, calls, dearer, gflops, miscounted, restorations, unaccounted
from tests.laws.frames import folded, joint, spatial, temporal
from tests.laws.spellings import Encoder
from tests.laws.streams import Streams
from tldr_compile import ops
from tldr_compile.errors import NothingToMerge
from tldr_compile.passes.plan import cost


class Mixing(nn.Module):
    """Blocks with an operator that needs the full length between two attentions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem = nn.Conv2d(3, frames.WIDTH, 4, 4)
        weights = (frames.drawn(3 * frames.WIDTH, frames.WIDTH, seed=2 + number) for number in range(3))
        self.weights = nn.ParameterList(weights)
        self.over_places = nn.Conv2d(frames.WIDTH, frames.WIDTH, 3, padding=1)
        self.over_tokens = nn.Linear(36, 36)

    def forward(self, picture: Tensor) -> Tensor:
        x = self.stem(picture).flatten(2).transpose(1, 2)
        for weight in self.weights:
            x = x + frames.attended(x, weight)
            x = x + self.mixed(x)
        return x.mean(1)

    def mixed(self, x: Tensor) -> Tensor:
        if self.kind == "convolution":
            return self.over_places(x.transpose(1, 2).unflatten(2, (6, 6))).flatten(2).transpose(1, 2)
        return self.over_tokens(x.transpose(1, 2)).transpose(1, 2)


def maps(s: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    return (h @ h.transpose(1, 2)).softmax(-1), h


def pooled(s: Any, h: Tensor) -> Tensor:
    return h.mean(1)


def variance(s: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    return h.var(1), h[:, 0]


Model = tuple[Callable[[], nn.Module], tuple[Tensor, ...]]
MODELS: dict[str, Model] = {
    "pooled": (partial(Encoder, pooled), (spellings.video(),)),
    "class token": (partial(Encoder, variance, 1), (spellings.video(),)),
    "written out": (partial(Encoder, pooled, 0, spellings.written_out), (spellings.video(),)),
    "maps": (partial(Encoder, maps), (spellings.video(),)),
    "space, time": (partial(folded, spatial, temporal), (frames.frames(),)),
    "space, joint": (partial(folded, spatial, joint, tail=frames.early), (frames.frames(),)),
    "two views": (partial(Streams, streams.compared_views), (streams.rows(), streams.rows(seed=2))),
    "branches that meet": (partial(Streams, streams.branches_that_meet), (streams.rows(),)),
    "two branches": (partial(Streams, streams.two_branches), (streams.rows(),)),
    "convolution": (partial(Mixing, "convolution"), (frames.drawn(2, 3, 24, 24),)),
    "mixer": (partial(Mixing, "mixer"), (frames.drawn(2, 3, 24, 24),)),
}
THREE = ("branches that meet", "two branches", "convolution", "mixer")
SITES: dict[str, tuple[float, ...]] = dict.fromkeys(THREE, (0.3, 0.3, 0.3))
SITES["space, time"] = (0.3, 0, 0)
"""A fraction for each site of those that have three; attention over time alone has none."""

every_model = pytest.mark.parametrize("name", MODELS)


@cache
def program(name: str) -> ExportedProgram:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    return export(make().eval(), inputs)


@cache
def merged(name: str, schedule: Any = 0.3) -> tldr_compile.MergedModule | None:
    try:
        return tldr_compile.apply(program(name), schedule=schedule)
    except NothingToMerge:
        return None


def written(name: str) -> tldr_compile.MergedModule:
    """What a user wrote down is made, whether it pays or not: a fraction for each site."""
    found = merged(name, SITES.get(name, (0.3, 0.3)))
    assert found is not None
    return found


@every_model
def test_the_report_is_what_the_graph_does(name: str) -> None:
    assert unaccounted(written(name)) == []
    assert (found := merged(name)) is None or unaccounted(found) == []


@every_model
def test_operations_are_those_that_run(name: str) -> None:
    assert miscounted(program(name).module(), written(name), MODELS[name][1]) == []


@pytest.mark.parametrize("name", ["class token", "space, time", "branches that meet"])
def test_operations_of_what_saliency_reads_are_counted(name: str) -> None:
    """The scores once more: where they run, in the report, and in what the plan weighs."""
    schedule = SITES.get(name, (0.3, 0.3))
    found = tldr_compile.apply(program(name), schedule=schedule, saliency="received")
    assert miscounted(program(name).module(), found, MODELS[name][1]) == []
    more = (found.report.gflops[1] - written(name).report.gflops[1]) * 1e9
    planned = [cost.operations(each._merged.plan) for each in (found, written(name))]
    assert 0 < more == pytest.approx(planned[0] - planned[1])


def test_probabilities_at_hand_are_read_for_nothing() -> None:
    """Where heads are mixed after the softmax, the graph holds them."""
    recipe = Recipe(attention="talking")
    model, inputs = build(recipe).eval(), recipe.inputs()
    found = [tldr_compile.apply(model, inputs, schedule=[4], saliency=name) for name in ("received", "attention")]
    assert found[0].report.gflops == found[1].report.gflops
    assert len({cost.operations(each._merged.plan) for each in found}) == 1
    assert miscounted(model, found[0], inputs) == []


@pytest.mark.parametrize(
    "options",
    [
        *({"reduction": name} for name in ops.REDUCTIONS),
        *({"saliency": name} for name in ops.SIGNALS),
        *({"metric": name} for name in ops.METRICS),
    ],
    ids=lambda options: str(*options.values()),
)
def test_a_plan_costs_what_runs(options: dict[str, str]) -> None:
    """The whole of it, merges included: what a reduction compares, and what a signal reads."""
    assert_priced(program("pooled"), **options)


def test_sharpness_beside_dropout_is_a_pass_of_its_own() -> None:
    model = Encoder(pooled, 0, partial(F.scaled_dot_product_attention, dropout_p=0.1)).eval()
    with_dropout = export(model, (spellings.video(),))
    passes = [assert_priced(with_dropout, saliency=name) for name in ("attention", "received", "uniform")]
    assert passes[0] == passes[1] > passes[2]


def assert_priced(model: ExportedProgram, **options: str) -> float:
    found = tldr_compile.apply(model, schedule=[5, 3], **options)
    planned = cost.operations(found.report.plan)
    assert planned == pytest.approx(1e9 * gflops(found, (spellings.video(),)), rel=1e-9)
    assert planned == pytest.approx(1e9 * found.report.gflops[1], rel=1e-9)
    return planned


@every_model
def test_what_nobody_wrote_down_pays(name: str) -> None:
    for schedule in (None, 0.3):
        if (found := merged(name, schedule)) is not None:
            assert list(dearer(found)) == [], f"schedule {schedule}"


@pytest.mark.parametrize("name", ["pooled", "space, time"])
def test_a_little_that_does_not_pay_is_told(name: str) -> None:
    """Nothing is restored, and so little follows the merges that matching costs more."""
    if (found := merged(name, 0.06)) is not None and list(dearer(found)):
        assert not [each for each in found.report.restorations if each["operator"] != "output"]
        assert any("of the dense one" in note for note in found.report.notes)


# --- the counters can fail ---


def test_operations_are_counted() -> None:
    x = frames.drawn(2, 5, 8)
    for model, expected in (
        (lambda x: x @ x.mT, 2 * 2 * 5 * 5 * 8),
        (lambda x: F.linear(x, x[0], x[0, :, 0]), 2 * 2 * 5 * 8 * 5),
        (lambda x: F.conv1d(x, x[:, :, :3]), 2 * 2 * 2 * 6 * 5 * 3),
        (lambda x: F.scaled_dot_product_attention(*[x[:, None]] * 3), 2 * 2 * 5 * 5 * 16),
        (lambda x: torch.einsum("bnc,bmc->bnm", x, x), 2 * 2 * 5 * 5 * 8),
    ):
        assert gflops(model, (x,)) == expected / 1e9


def test_restorations_are_found() -> None:
    graph = written("convolution").graph_module.graph
    assert len(restorations(graph)) >= 2
    assert len(calls(graph, "group")) == 3
    with Counting() as counting:
        torch.ones(2)
    assert counting.total == 0
