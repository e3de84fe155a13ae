"""Where the numbers came from, and where they are kept. The measures are those of the command line."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from tldr_compile.cli.measure import Call, Spread, alternate, peak_bytes, ratio, seconds

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


def in_turn(
    calls: Mapping[Any, Call], device: torch.device, rounds: int, title: str, *, first: int = 1
) -> dict[Any, list[float]]:
    """Seconds of every call in each of `rounds`, all in alternation; `first` calls of each, to compile, go before."""
    with Progress(transient=True) as progress:
        task = progress.add_task(title, total=len(calls) * (first + rounds))
        for call in calls.values():
            for _ in range(first):
                call()
                progress.advance(task)
        return alternate(calls, device, rounds=rounds, tick=lambda: progress.advance(task))


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options of every measurement: where it runs, in which dtype, how often."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    made.add_argument("--rounds", type=int, default=rounds, help=f"measurements of each row (default {rounds})")
    return made


def write(name: str, record: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Keep a record as `name.json`; of paths what does not belong to this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = json.dumps(record, indent=1) + "\n"
    for place in sorted((str(Path(each).resolve()) for each in sys.path if each), key=len, reverse=True):
        text = text.replace(f"{place}/", "")
    path.write_text(text)
    return path


def repeat(call: Call, count: int) -> None:
    """Call so often."""
    for _ in range(count):
        call()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
