"""Where the numbers came from, and where they are kept. The measures are those of the command line."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tldr_compile.records import kept
from tldr_compile.records.kept import machine
from tldr_compile.records.measure import Call, Spread, alternate, in_turn, peak_bytes, ratio, seconds

__all__ = [
    "RESULTS",
    "Call",
    "Spread",
    "alternate",
    "device_seconds",
    "in_turn",
    "machine",
    "paired",
    "parser",
    "peak_bytes",
    "ratio",
    "repeat",
    "seconds",
    "write",
]

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler reports every start and stop on stderr
RESULTS = Path(__file__).parent / "results"


def device_seconds(call: Call, device: torch.device) -> float:
    """Seconds from the first to the last work of one call on its device; on a CPU, wall-clock."""
    if device.type != "cuda":
        return seconds(call, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def paired(
    calls: Mapping[str, Call], device: torch.device, *, rounds: int, least: float = 0.02
) -> dict[str, list[float]]:
    """Seconds per call on the device in each of `rounds`, all calls in alternation, after one call of each.

    A round repeats a short call until it fills `least` seconds, so that the launch of the first kernel hardly counts.
    """
    for call in calls.values():
        call()
    counts = {name: math.ceil(least / device_seconds(call, device)) for name, call in calls.items()}
    repeats = {name: partial(repeat, call, counts[name]) for name, call in calls.items()}
    taken = alternate(repeats, device, rounds=rounds, tick=lambda: None, clock=device_seconds)
    return {name: [value / counts[name] for value in values] for name, values in taken.items()}


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options of every measurement: where it runs, in which dtype, how often."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    made.add_argument("--rounds", type=int, default=rounds, help=f"measurements of each row (default {rounds})")
    return made


def write(name: str, record: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Keep a record as `name.json`, with those of the other benchmarks."""
    return kept.write(name, record, folder)


def repeat(call: Call, count: int) -> None:
    """Call so often."""
    for _ in range(count):
        call()
