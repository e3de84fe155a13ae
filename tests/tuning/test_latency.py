"""From latency to operations, with a clock that is made here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny import Tiny, clip
from tldr_compile import CaptureError, OptionError, ScheduleError, TokenMerging
from tldr_compile.tuning import latency, search, tune, tuner, ways
from tldr_compile.tuning.calls import calls_of
from tldr_compile.tuning.judge import Judge, Met, Way
from tldr_compile.tuning.store import Store


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(Tiny(2).eval(), calls_of(clip(4), 2), TokenMerging(), "logits", Store(None, {}))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[float], float]], list[float]]:
    def times(taken: Callable[[float], float]) -> list[float]:
        asked: list[float] = []

        def ratio(judge: Judge, model: nn.Module, config: TokenMerging) -> float:
            asked.append(judge.part(config))
            return taken(asked[-1])

        monkeypatch.setattr(latency, "ratio", ratio)
        return asked

    return times


def plain(judge: Judge) -> Way:
    return next(way for way in ways.built_in(TokenMerging(), judge.able) if way.name == ways.PLAIN)


def test_a_part_with_the_latency_is_found(judge: Judge, clock: Any) -> None:
    asked = clock(lambda part: 0.3 + 0.7 * part)
    part = latency.part_with(judge, nn.Identity(), plain(judge), 0.85, lambda what: None)
    assert 0.3 + 0.7 * part == pytest.approx(0.85, abs=0.03)
    assert len(asked) <= latency.TRIES


def test_a_latency_out_of_reach_is_refused(judge: Judge, clock: Any) -> None:
    clock(lambda part: 0.9 + 0.1 * part)
    with pytest.raises(ScheduleError, match=r"latency=0.5: the fastest graph that was measured takes 0\.9\d"):
        latency.part_with(judge, nn.Identity(), plain(judge), 0.5, lambda what: None)


def test_what_is_found_takes_no_longer_than_was_asked(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where energy keeps more, and is slower than its operations say."""
    monkeypatch.setattr(ways, "SHAPES", {"every site": ways.SHAPES["every site"]})
    monkeypatch.setattr(ways, "all_ways", lambda base, able: [])
    monkeypatch.setattr(search, "ROUNDS", 0)

    def ranked(self: search.Search, some: Sequence[Met], *how: object, **told: object) -> list[Met]:
        return sorted(dict.fromkeys(some), key=lambda met: met.config.reduction != "energy")

    monkeypatch.setattr(search.Search, "ranked", ranked)

    def ratio(judge: Judge, model: nn.Module, config: TokenMerging) -> float:
        return judge.part(config) * (1.1 if config.reduction == "energy" else 1.0)

    for module in (latency, tuner):
        monkeypatch.setattr(module, "ratio", ratio)
    torch.manual_seed(0)
    found = tune(Tiny(2).eval(), clip(4), latency=0.85, batch=2)
    assert found.config.reduction == "energy"
    assert found.latency is not None
    assert found.latency <= 0.85 * (1 + latency.NEAR)


def test_compiled_models_are_timed_in_turn(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    assert 0.05 < latency.ratio(judge, Tiny(2).eval(), TokenMerging(schedule=[9, 4])) < 20


def test_models_that_cannot_be_compiled(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    with pytest.raises(CaptureError, match=r"(?s)cannot compile the dense model here; .*no compiler here"):
        latency.ratio(judge, Tiny(2).eval(), TokenMerging(schedule=[9, 4]))


@pytest.mark.parametrize(
    ("limits", "message"),
    [({}, "give one"), ({"budget": 0.5, "latency": 0.5}, "give one"), ({"latency": 1.5}, "between 0 and 1")],
)
def test_limits_of_no_use(limits: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        tune(Tiny(1).eval(), clip(4), **limits)  # type: ignore[arg-type]
