"""Paired timing, peak memory, and where the numbers came from."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).parent / "results"

Call = Callable[[], object]


class Spread(NamedTuple):
    """Smallest, middle and largest of several measurements."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(min(values), statistics.median(values), max(values))


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
    calls: Mapping[str, Call], device: torch.device, *, rounds: int, tick: Callable[[], object]
) -> dict[str, list[float]]:
    """Seconds of every call in each of `rounds`; `tick` is called after each measurement.

    All calls take their turn within one round, so that a machine that slows down slows all of them, and every other
    round runs backwards, so that no call always follows the same one.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(rounds):
        for name in order:
            taken[name].append(seconds(calls[name], device))
            tick()
        order.reverse()
    return taken


def peak_bytes(call: Call, device: torch.device) -> int:
    """Largest number of bytes that tensors made by one call hold at a time, the model's weights not counted.

    Counted by the allocator, not by the operating system: what earlier calls left in its caches does not blur it.
    """
    if device.type == "cuda":
        _synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it reports every start and stop on stderr
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


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge or repeat a measurement."""
    cuda = device.type == "cuda"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "transformers": version("transformers"),
    }


def write(name: str, record: Mapping[str, Any]) -> Path:
    """Keep a record as `results/name.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
