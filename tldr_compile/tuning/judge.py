"""One model, captured once: what a configuration costs, and how far its answers are from the dense model's."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Final

import torch
from torch import nn

from tldr_compile import passes
from tldr_compile.api import assemble, capture
from tldr_compile.config import TokenMerging
from tldr_compile.errors import NothingToMerge, OptionError
from tldr_compile.module import MergedModule
from tldr_compile.passes.plan import cost, meeting
from tldr_compile.passes.plan.budget import NEAR
from tldr_compile.passes.sites import Site
from tldr_compile.tuning.answers import OBJECTIVES, Far, answer, check_answer
from tldr_compile.tuning.calls import Call
from tldr_compile.tuning.store import Solved, Store

MODULES: Final = 64
"""Merged modules that are kept for the next question; they share the model's weights."""
VARIES: Final = 0.05
"""Parts of an answer by which it may differ from call to call: kernels add up in any order."""


@dataclass(frozen=True)
class Way:
    """Everything of a configuration but how much is merged: options, and how that is shared among the sites.

    A site with weight 1 loses the most; sites that cannot merge have weight 0. A published schedule has no weights: it
    is what it is.
    """

    options: TokenMerging
    weights: tuple[float, ...]
    name: str = field(default="", compare=False)

    def at(self, fraction: float) -> TokenMerging:
        """With at most this fraction of the tokens merged at a site."""
        return replace(self.options, schedule=tuple(round(fraction * weight, 5) for weight in self.weights))


@dataclass(frozen=True)
class Met:
    """A way at a budget, and the part of the dense operations that it costs."""

    way: Way
    config: TokenMerging
    part: float


class Judge:
    """All numbers are remembered: a question that was asked before costs nothing."""

    def __init__(
        self, model: nn.Module, calls: Sequence[Call], base: TokenMerging, objective: str, store: Store
    ) -> None:
        """Raises CaptureError; NothingToMerge where no site can merge; OptionError for answers of no use."""
        self.calls, self.objective, self.store = calls, objective, store
        self.program, self.origin = capture(model, calls[0].args)
        self.analysis = passes.analyse(passes.from_export(self.program), base)
        plan = passes.make_plan(self.analysis, replace(base, schedule=()))
        self.dense = cost.dense(plan)
        self.able = tuple(isinstance(site, Site) for site in self.analysis.sites)
        if not any(self.able):
            raise NothingToMerge(f"no attention of {type(model).__name__} can merge tokens: explain() says why")
        self.merged = lru_cache(MODULES)(self._merged)
        self._fractions: dict[tuple[tuple[float, ...], float], float] = {}
        with torch.inference_mode():
            self._answers = [answer(model(*call.args)) for call in calls]
            again = answer(model(*calls[0].args))
        for number, told in enumerate(self._answers, 1):
            check_answer(objective, told, number)
        first = self._answers[0]
        if not torch.allclose(first, again, rtol=VARIES, atol=VARIES * float(first.abs().max())):
            raise OptionError(
                f"{type(model).__name__} answers the same clips differently when it is called again: what is random in "
                "it, or remembered, has to be off"
            )

    def part(self, config: TokenMerging) -> float:
        """Of the dense operations, as the plan counts them."""
        return cost.operations(passes.make_plan(self.analysis, config)) / self.dense

    def meets(self, way: Way, budget: float) -> Met:
        """The way at the budget. Raises ScheduleError where it cannot be met."""
        asked = way.options, way.weights, budget
        solved = self.store.solved(*asked)
        if solved is None:
            solved = self._solved(way, budget)
            self.store.put_solved(*asked, solved)
        fraction, part = solved
        self._fractions[way.weights, budget] = fraction
        return Met(way, way.at(fraction), part)

    def _solved(self, way: Way, budget: float) -> Solved:
        known = self._fractions.get((way.weights, budget))
        if known is not None and NEAR * budget <= (part := self.part(way.at(known))) <= budget:
            return known, part  # how much is merged decides; how it is matched hardly costs
        solved = meeting(budget, lambda fraction: passes.make_plan(self.analysis, way.at(fraction))).solved
        assert solved is not None
        return solved.fraction, solved.part

    def _merged(self, config: TokenMerging) -> MergedModule:
        """What `apply` makes of the model, without its warnings: many are made, few are chosen."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return assemble(self.program, self.analysis, config, self.origin)

    def far(self, config: TokenMerging, some: Sequence[int]) -> Far:
        """How far the configuration's answers are, over the clips of these calls, one behind the other."""
        missing = [index for index in some if not self.store.has(config, index)]
        if missing:
            module = self.merged(config)
            for index in missing:
                self.store.put(config, index, self._measured(module, index))
        parts = [self.store.get(config, index) for index in some]
        return Far(*(torch.cat(values) for values in zip(*parts, strict=True)))

    @torch.inference_mode()
    def _measured(self, module: MergedModule, index: int) -> Far:
        call = self.calls[index]
        told = OBJECTIVES[self.objective](self._answers[index], answer(module(*call.args)))
        return Far(*(values[: call.clips].cpu() for values in told))
