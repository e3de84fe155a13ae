"""From a part of the dense model's latency to the part of its operations that has it, by measurement.

latency, compiled, of the dense model's
1 |               .
  |          .'         each point is a compiled graph, timed in turn with the dense one
t |-----.'
  |  .'  |
  +------p-----------1  part of the dense operations
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from tldr_compile.config import TokenMerging
from tldr_compile.errors import CaptureError, ScheduleError
from tldr_compile.records import measure
from tldr_compile.tuning.judge import Judge, Way

ROUNDS: Final = 11
NEAR: Final = 0.02
"""A latency is met within this part of it: measurements scatter more."""
TRIES: Final = 5


def part_with(judge: Judge, model: nn.Module, way: Way, latency: float, tick: Callable[[str], Any]) -> float:
    """The part of the dense operations at which the way, compiled, takes `latency` of the dense model's time.

    Raises ScheduleError where the cheapest graph that the sites allow takes longer.
    """
    least = judge.part(way.at(0.5))
    known = {1.0: 1.0}  # the dense model itself
    tried = max(latency, least)
    for _ in range(TRIES):
        tick(f"timing a graph of {tried:.2f} of the operations")
        known[tried] = ratio(judge, model, judge.meets(way, max(tried, least)).config)
        if abs(known[tried] / latency - 1) <= NEAR:
            return tried
        tried = min(max(_between(known, latency), least), 0.99)
        if tried in known:
            break
    enough = [part for part in known if part < 1 and known[part] <= (1 + NEAR) * latency]
    if not enough:
        raise ScheduleError(
            f"latency={latency:g}: the fastest graph that was measured takes {min(known.values()):.2f} of the dense "
            "model's time, compiled, with the most tokens merged that the sites allow: give as much or more"
        )
    return max(enough)


@torch.inference_mode()
def ratio(judge: Judge, model: nn.Module, config: TokenMerging) -> float:
    """Time of the merged model by that of the dense one, both compiled and called in turn, the middle of several.

    Raises CaptureError where one of them cannot be compiled.
    """
    torch.compiler.reset()
    args = judge.calls[0].args
    device = next((each.device for each in args if isinstance(each, torch.Tensor)), torch.device("cpu"))
    modules = {"dense": torch.compile(model), "merged": torch.compile(judge.merged(config))}
    calls = {name: partial(each, *args) for name, each in modules.items()}
    for name, call in calls.items():
        try:
            call()
            call()
        except TorchDynamoException as error:
            raise CaptureError(
                f"latency= is measured, and torch.compile cannot compile the {name} model here; budget= needs no "
                f"compiler: {error}"
            ) from error
    taken = measure.alternate(calls, device, rounds=ROUNDS, tick=lambda: None)
    return measure.ratio(taken["merged"], taken["dense"]).median


def _between(known: dict[float, float], latency: float) -> float:
    """Where the line through the nearest measurements on both sides, or the lowest two, has this latency."""
    below = [part for part in known if known[part] <= latency]
    above = [part for part in known if known[part] > latency]
    low, high = (max(below), min(above)) if below else sorted(known)[:2]
    slope = (known[high] - known[low]) / (high - low)
    return low + (latency - known[low]) / slope if slope > 0 else low / 2
