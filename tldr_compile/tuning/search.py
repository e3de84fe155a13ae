"""Successive halving over ways, then over shapes, then steps site by site; all by the distance on the choosing clips.

ways x few clips -> the better half x twice as many -> ... -> the best few x all clips
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from tldr_compile.config import TokenMerging
from tldr_compile.errors import ScheduleError, TldrError
from tldr_compile.tuning import ways
from tldr_compile.tuning.judge import Judge, Met, Way

FIRST_CLIPS: Final = 48
"""On which every way is tried."""
KEPT: Final = 4
"""Ways that see all choosing clips."""
STEPS: Final = (1.5, 0.6)
"""What a site's weight is multiplied by."""
ROUNDS: Final = 2

Tick = Callable[[str], Any]


class Search:
    """One search for one budget; `some` are the calls that may choose, `refused` says what could not be tried."""

    def __init__(self, judge: Judge, budget: float, some: Sequence[int], seed: int, tick: Tick) -> None:
        self.judge, self.budget, self.tick, self.random = judge, budget, tick, random.Random(seed)
        self.some = list(some)
        self.random.shuffle(self.some)
        self.refused: dict[str, str] = {}

    def published(self, base: TokenMerging) -> list[Met]:
        """What others published: ways at the budget, and presets for as many sites that cost no more."""
        found = self.met(ways.built_in(base, self.judge.able))
        for name, config in ways.presets(base, len(self.judge.able)).items():
            try:
                part = self.judge.part(config)
            except ScheduleError as error:
                self.refused[name] = str(error)
                continue
            if part <= self.budget:
                found.append(Met(Way(config, (), name), config, part))
        return found

    def best(self, base: TokenMerging, published: Sequence[Met]) -> Met:
        """The best that was found, judged by all choosing clips; no worse than those that are published.

        Raises ScheduleError for a budget that no way meets.
        """
        found = self.halved([*published, *self.met(ways.all_ways(base, self.judge.able))], "ways")
        if not found:
            raise ScheduleError(next(iter(self.refused.values())))
        best = [each for each in found if each.way.weights][:2]
        shapes = [shape for each in best for shape in ways.shaped(each.way, self.judge.able)]
        found = self.ranked([*self.halved(self.met(shapes), "shapes"), *found])
        first = next((each for each in found if each.way.weights), None)
        return self.ranked([*([self.stepped(first)] if first else []), *found, *published])[0]

    def met(self, some: Iterable[Way]) -> list[Met]:
        """Those ways that meet the budget, at it."""
        found: dict[Way, Met] = {}
        for way in some:
            self.tick("meeting the budget")
            try:
                found[way] = self.judge.meets(way, self.budget)
            except Exception as error:  # noqa: BLE001 - what was registered can raise anything
                self.refused[way.name] = _told(error)
        return list(found.values())

    def halved(self, some: Sequence[Met], what: str) -> list[Met]:
        """The best few, judged by all clips."""
        alive, calls = list(some), self._calls(FIRST_CLIPS)
        while True:
            alive = self.ranked(alive, calls, f"{what}: {len(alive)}")
            if calls == len(self.some) and len(alive) <= KEPT:
                return alive
            alive = alive[: max(KEPT, (len(alive) + 1) // 2)]
            calls = len(self.some) if len(alive) <= KEPT else min(2 * calls, len(self.some))

    def stepped(self, best: Met) -> Met:
        """The best, improved by giving single sites more or less to merge for as long as that helps."""
        sites = [site for site, can in enumerate(self.judge.able) if can]
        for _ in range(ROUNDS if len(sites) > 1 else 0):
            before = best
            for site in self.random.sample(sites, len(sites)):
                tried = self.met(ways.stepped(best.way, site, factor) for factor in STEPS)
                best = self.ranked([best, *tried], what=f"site {site}")[0]
            if best is before:
                break
        return best

    def ranked(self, some: Sequence[Met], calls: int | None = None, what: str = "the best") -> list[Met]:
        """By mean distance, the least first; of equal ones the first; without those that raise or say no number."""
        chosen = self.some[: len(self.some) if calls is None else calls]
        distances = {}
        for met in dict.fromkeys(some):
            self.tick(what)
            try:
                distance = float(self.judge.far(met.config, chosen).distance.mean())
            except Exception as error:  # noqa: BLE001 - what was registered can raise anything
                self.refused[met.way.name] = _told(error)
                continue
            if math.isfinite(distance):
                distances[met] = distance
            else:
                self.refused[met.way.name] = "its answers hold what is no number"
        return sorted(distances, key=distances.__getitem__)

    def _calls(self, clips: int) -> int:
        """How many calls hold so many clips."""
        return min(len(self.some), max(1, -(-clips // self.judge.calls[0].clips)))


def _told(error: Exception) -> str:
    """Errors made on purpose say enough."""
    return str(error) if isinstance(error, TldrError) else f"{type(error).__name__}: {error}"
