"""A budget becomes one fraction: what merging costs by the plan is what is counted on the merged graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from tests.tiny import Tiny, clip
from tldr_compile import Report, TokenMerging, ops, passes
from tldr_compile.passes.errors import NothingToMerge, ScheduleError
from tldr_compile.passes.plan import Plan, Solved, budget, cost


def planned(part: Callable[[float], float], tried: list[float] | None = None) -> Callable[[float], Plan]:
    """Plans that are nothing but what they cost, by fraction."""

    def plan(fraction: float) -> Plan:
        if tried is not None:
            tried.append(fraction)
        return Plan(SimpleNamespace(), (), (), (fraction,), (), {"cost": 8 * part(fraction)})  # type: ignore[arg-type, dict-item]

    return plan


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "operations", lambda plan: plan.steps["cost"])
    monkeypatch.setattr(cost, "dense", lambda plan: 8.0)
    monkeypatch.setattr(budget, "_sizes", lambda typed: {"video": (2, 3)})
    monkeypatch.setattr(budget, "_refuse_open", lambda budget, typed: None)


def solved(part: float, planned: Callable[[float], Plan]) -> Solved:
    plan = budget.meeting(part, planned)
    assert plan.solved is not None
    assert plan.schedule == (plan.solved.fraction,)
    return plan.solved


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("part", [0.95, 0.7, 0.3])
def test_a_budget_is_met_from_below_in_few_steps(part: float) -> None:
    tried: list[float] = []
    found = solved(part, planned(lambda fraction: (1 - fraction) ** 2, tried))
    assert 0.995 * part <= found.part <= part
    assert found.part == pytest.approx((1 - found.fraction) ** 2)
    assert len(tried) < 12


@pytest.mark.usefixtures("told")
def test_where_counts_are_coarse_the_closest_below_is_taken() -> None:
    tried: list[float] = []
    found = solved(0.7, planned(lambda fraction: 1.0 if fraction < 0.25 else 0.6 if fraction < 0.4 else 0.5, tried))
    assert found.part == 0.6
    assert 0.25 <= found.fraction < 0.4
    assert len(tried) < 20


@pytest.mark.usefixtures("told")
def test_rounding_that_goes_up_once_misleads_nobody() -> None:
    """A larger fraction may cost a little more: whatever is found is within the budget, and the best of those tried."""
    tried: list[float] = []
    part = planned(lambda fraction: 1 - fraction + 0.02 * (int(fraction * 64) % 2), tried)
    found = solved(0.8, part)
    parts = [part(each).steps["cost"] / 8 for each in list(tried)]  # type: ignore[index, operator]
    assert found.part == max(each for each in parts if each <= 0.8)


@pytest.mark.usefixtures("told")
def test_fractions_that_remove_nothing_cost_all() -> None:
    def plan(fraction: float) -> Plan:
        if fraction < 0.01:
            raise NothingToMerge("rounds down to 0")
        return planned(lambda fraction: 1 - fraction)(fraction)

    assert solved(0.999, plan).fraction == pytest.approx(0.01)


@pytest.mark.usefixtures("told")
def test_below_what_the_sites_allow_the_least_is_told() -> None:
    with pytest.raises(ScheduleError, match=r"budget=0.3: .* still costs 0.500 of the dense .* give 0.501 or more"):
        solved(0.3, planned(lambda fraction: 1 - 0.9999 * fraction))
    with pytest.raises(ScheduleError, match="no budget can be met"):
        solved(0.3, planned(lambda fraction: 1 + fraction))
    with pytest.raises(NothingToMerge, match="no merge pays"):
        solved(0.3, mock.Mock(side_effect=NothingToMerge("no merge pays")))


class Registers(Tiny):
    def __init__(self) -> None:
        super().__init__(depth=3)
        self.first = torch.nn.Parameter(torch.randn(1, 4, 16))

    def embed(self, video: torch.Tensor) -> torch.Tensor:
        x = super().embed(video)
        return torch.cat([self.first.expand(len(x), -1, -1), x], 1)


@cache
def analysis() -> passes.Analysis:
    program = torch.export.export(Registers().eval(), (clip(),))
    return passes.analyse(passes.from_export(program), TokenMerging())


def test_what_a_plan_costs_is_what_the_report_counts() -> None:
    """Matching included, in which tokens that no pixel made take no part."""
    merged = passes.merge(analysis(), TokenMerging(budget=0.7), ops)
    found = merged.plan.solved
    assert found is not None
    before, after = Report(merged).gflops
    assert found.part == pytest.approx(after / before, rel=1e-9)
    assert 0.63 < found.part <= 0.7
    assert found.sizes == {"video": (2, 3, 4, 12, 12)}
    assert merged.plan.schedule == (found.fraction,) * 3


def test_what_was_solved_for_other_sizes_holds() -> None:
    before = Solved(0.9, 0.4, 0.89, {"video": (1, 3, 2, 4, 4)})
    plan = passes.make_plan(analysis(), TokenMerging(budget=0.9), before)
    assert plan.solved is before
    assert plan.schedule == (0.4,) * 3


@pytest.mark.parametrize("options", [{"schedule": [5]}, {"schedule": 0.2}, {"budget": 0.9}, {"schedule": ()}])
def test_options_for_another_depth_are_refused_with_both_numbers(options: dict[str, object]) -> None:
    passes.make_plan(analysis(), TokenMerging(**options, made_for={"sites": 3}))  # type: ignore[arg-type]
    config = TokenMerging(**options, made_for={"sites": 12, "model": "UMT-B"})  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match=r"with 12 attention sites .*\(model UMT-B\), and this graph has 3"):
        passes.make_plan(analysis(), config)
