"""From a budget in GFLOPs to a schedule that meets it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

import tldr_compile
from tldr_compile import MergedModule, TokenMerging, passes
from tldr_compile.api import assemble
from tldr_compile.errors import TldrError
from tldr_compile.passes.plan import cost
from tldr_compile.quality.methods import Method, schedule
from tldr_compile.quality.smaller import Less

MOST = 0.5  # no site loses more
NEAR, MET = 0.005, 0.02  # where the search stops, and what counts as met; parts of the budget
FINEST = 2e-3


class BudgetError(TldrError):
    """A budget that no schedule of this shape meets. `fraction` is the one that comes closest."""

    def __init__(self, text: str, fraction: float) -> None:
        super().__init__(text)
        self.fraction = fraction


@dataclass(frozen=True)
class Curve:
    """What a fraction costs, counted once for each; more is cheaper."""

    cost: Callable[[float], float]
    dense: float
    known: dict[float, float] = field(default_factory=dict)

    def fraction(self, budget: float) -> float:
        """The fraction whose cost is `budget`, a part of the dense cost. Raises BudgetError."""
        target = budget * self.dense
        low, high = 0.0, MOST
        self.known[low] = self.dense
        self._cost(high)
        while True:
            some = [each for each, cost in self.known.items() if cost < self.dense] or [high]
            best = min(some, key=lambda each: abs(self.known[each] - target))
            low = max(each for each, cost in self.known.items() if cost > target or each == 0)
            high = min((each for each, cost in self.known.items() if cost <= target and each), default=low)
            off = abs(self.known[best] / target - 1)
            if off <= NEAR or high - low <= FINEST:
                break
            part = (self.known[low] - target) / (self.known[low] - self.known[high])
            self._cost(low + min(max(part, 0.1), 0.9) * (high - low))
        if off > MET:
            least = self.known[best] / self.dense
            raise BudgetError(f"cannot meet {budget:g} of the dense GFLOPs, {least:.3f} is the closest", best)
        return best

    def _cost(self, fraction: float) -> float:
        if fraction not in self.known:
            self.known[fraction] = self.cost(fraction)
        return self.known[fraction]


class Cell(NamedTuple):
    """One method at one budget."""

    method: str
    budget: float  # part of the dense GFLOPs
    configs: tuple[TokenMerging | Less, ...]
    """Several are told as one. What tokens are merged, or what is given to the model of each clip."""
    gflops: float  # of one clip
    missed: str = ""
    """Why this is not the budget but what comes closest to it."""


class Merger:
    """A model captured and analysed once, for any number of schedules. All GFLOPs are of one clip."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        """`example [B, T, 3, H, W]`. Raises CaptureError."""
        self.batch, self.device = len(example), example.device
        told = tldr_compile.explain(model, (example,), schedule=())
        self.program = torch.export.export(model, (example,))
        self.analysis = passes.analyse(passes.from_export(self.program), TokenMerging())
        self.dense = told.gflops[0] / self.batch
        self._curves: dict[tuple[str, str], Curve] = {}
        self.able = [site["status"] != "refused" for site in told.sites]
        if not any(self.able):
            raise tldr_compile.NothingToMerge(f"no attention of {type(model).__name__} can merge tokens")

    def merged(self, config: TokenMerging) -> MergedModule:
        """What `tldr_compile.apply` makes of the model."""
        return assemble(self.program, self.analysis, config)

    def gflops(self, config: TokenMerging) -> float:
        """By the plan; of a schedule that rounds to no token at all, those of the dense model."""
        try:
            return cost.operations(passes.make_plan(self.analysis, config)) / 1e9 / self.batch
        except tldr_compile.NothingToMerge:
            return self.dense

    def cells(self, name: str, method: Method, shape: str, budgets: Sequence[float]) -> list[Cell]:
        """The method at every budget; where one cannot be met, at what comes closest, and marked."""
        curve = self._curve(name, method, shape)

        def cell(budget: float) -> Cell:
            try:
                fraction, missed = curve.fraction(budget), ""
            except BudgetError as error:
                fraction, missed = error.fraction, str(error)
            return Cell(name, budget, self._configs(method, shape, fraction), curve.known[fraction], missed)

        return [cell(budget) for budget in budgets]

    def _configs(self, method: Method, shape: str, fraction: float) -> tuple[TokenMerging, ...]:
        return method.configs(schedule(method.shape or shape, self.able, fraction))

    def _curve(self, name: str, method: Method, shape: str) -> Curve:
        def cost(fraction: float) -> float:
            return self.gflops(self._configs(method, shape, fraction)[0])

        return self._curves.setdefault((name, shape), Curve(cost, self.dense))
