"""Paired latency, peak memory, and the distance of two outputs: what the command line and the benchmarks measure."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]


class Spread(NamedTuple):
    """Smallest, middle and largest of several measurements."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(min(values), statistics.median(values), max(values))


class Distance(NamedTuple):
    """How far one output is from another of the same shape [B, K]."""

    largest: float  # absolute difference
    relative: float  # norm of the difference by norm of the reference
    cosine: float
    same_top: bool  # the same largest entry along K in every sample


def ratio(slower: Sequence[float], faster: Sequence[float]) -> Spread:
    """Spread of `slower / faster` over pairs that were measured in the same round."""
    return Spread.of([a / b for a, b in zip(slower, faster, strict=True)])


def seconds(call: Call, device: torch.device) -> float:
    """Wall-clock seconds of one call, its work on the device included."""
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def alternate(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int,
    tick: Callable[[], object],
    clock: Callable[[Call, torch.device], float] = seconds,
) -> dict[str, list[float]]:
    """Seconds of every call in each of `rounds`, by `clock`; `tick` is called after each measurement.

    All calls take their turn within one round, so that a machine that slows down slows all of them, and every other
    round runs backwards, so that no call always follows the same one.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(rounds):
        for name in order:
            taken[name].append(clock(calls[name], device))
            tick()
        order.reverse()
    return taken


def in_turn(
    calls: Mapping[Any, Call], device: torch.device, rounds: int, title: str, *, first: int = 1
) -> dict[Any, list[float]]:
    """Seconds of every call in each of `rounds`, all in alternation; `first` calls of each, to compile, go before."""
    from rich.progress import Progress  # noqa: PLC0415 - the rest of this module needs torch alone

    with Progress(transient=True) as progress:
        task = progress.add_task(title, total=len(calls) * (first + rounds))
        for call in calls.values():
            for _ in range(first):
                call()
                progress.advance(task)
        return alternate(calls, device, rounds=rounds, tick=lambda: progress.advance(task))


def peak_bytes(call: Call, device: torch.device) -> int:
    """Largest number of bytes that tensors made by one call hold at a time, the model's weights not counted.

    Counted by the allocator, not by the operating system: what earlier calls left in its caches does not blur it, and
    what libraries allocate past it is not seen.
    """
    if device.type == "cuda":
        _synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        call()
    results = run.profiler.kineto_results if run.profiler is not None else None
    if results is None:
        raise RuntimeError("this build of torch cannot profile memory on the CPU (no Kineto)")
    changes = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def distance(reference: torch.Tensor, other: torch.Tensor) -> Distance:
    a, b = reference.double().flatten(), other.double().flatten()
    return Distance(
        largest=(a - b).abs().max().item(),
        relative=((a - b).norm() / a.norm()).item(),
        cosine=torch.nn.functional.cosine_similarity(a, b, dim=0).item(),
        same_top=bool(torch.equal(reference.argmax(-1), other.argmax(-1))),
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
