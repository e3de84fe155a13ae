"""Where the time of a merged model goes: kernels and their groups, of ours and of the floor, which merges for free."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from heapq import nlargest
from operator import itemgetter
from typing import Any

import torch
from torch._inductor import metrics
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks import timing
from benchmarks.gpu.driver import Jobs, Row, Setup
from benchmarks.gpu.load import Load, call_of
from benchmarks.gpu.models import free
from benchmarks.speed import FLOOR, OURS

CALLS = 5
TOP = 25

# Of what runs inside several of these operators, the outermost says what it is for.
OPERATORS = {
    "sharpness": re.compile(r"tldr::attend_and_sharpness"),
    "masses": re.compile(r"tldr::attend$"),
    "matching": re.compile(r"tldr::best"),
    "attention": re.compile(r"aten::_?scaled_dot_product"),
    "matrix products": re.compile(r"aten::(mm|addmm|bmm|baddbmm|linear|matmul|mkl.*|_?convolution.*|mkldnn.*)$"),
    "ordering": re.compile(r"aten::(arg)?sort|aten::topk"),
}
# Inductor names its kernels for the operators in them.
FUSED_MERGE = re.compile(r"gather|scatter|sort|cumsum|topk")


def merging(setup: Setup) -> Jobs:
    """On the first load: the profile of ours, of the floor, and what is between them."""
    load, device = setup.loads[0], setup.device
    profiles: dict[str, Row] = {}

    def profiled(row: str) -> Row:
        profiles[row] = profile_of(load, row, device, calls=1 if setup.dry else CALLS)
        return profiles[row]

    for row in (OURS, FLOOR):
        free(device)
        yield f"{load.name}: {row}", partial(profiled, row)
    free(device)
    yield f"{load.name}: a merge", lambda: per_merge(profiles[OURS], profiles[FLOOR])


def profile_of(load: Load, row: str, device: torch.device, *, calls: int) -> Row:
    """Per call: kernels, seconds of the device by kernel and by group; and how many kernels Inductor wrote."""
    metrics.reset()
    with load.running():
        setting = load.setting(device)
        call = call_of(setting, load.inputs(device), row)
        for _ in range(3):
            call()
        with profile(activities=[ProfilerActivity.CPU, *_on_device(device)]) as run:
            timing.seconds(partial(_repeat, call, calls), device)
    events = list(run.events() or ())
    kernels = kernels_of(events, device)
    counts = Counter(event.name for event in kernels)
    seconds: defaultdict[str, float] = defaultdict(float)
    for event in kernels:
        seconds[event.name] += _seconds(event, device) / calls
    total = sum(seconds.values())
    return {
        "merges": len(setting.schedule),
        "kernels_per_call": len(kernels) / calls,
        "seconds_per_call": total,
        "generated_kernels": metrics.generated_kernel_count,
        "groups": groups(events, seconds, calls, device),
        "top": [
            {"kernel": name, "per_call": counts[name] / calls, "seconds": spent}
            for name, spent in nlargest(TOP, seconds.items(), key=itemgetter(1))
        ],
    }


def kernels_of(events: Iterable[FunctionEvent], device: torch.device) -> list[FunctionEvent]:
    """What ran on the device; on a CPU, all operators."""
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    return [event for event in events if event.device_type == kind and not event.is_user_annotation]


def groups(
    events: Iterable[FunctionEvent], by_kernel: Mapping[str, float], calls: int, device: torch.device
) -> dict[str, float]:
    """Seconds per call by what they are for: by the operator that launched a kernel, otherwise by the kernel's name."""
    spent: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type == DeviceType.CPU and (group := group_of(event)):
            spent[group] += _seconds(event, device) / calls
    spent["fused with merging"] = sum(
        s for name, s in by_kernel.items() if "triton" in name and FUSED_MERGE.search(name)
    )
    spent["the rest"] = sum(by_kernel.values()) - sum(spent.values())
    return dict(spent)


def group_of(event: FunctionEvent) -> str | None:
    """The group of the outermost operator around an event that has one."""
    found = None
    around: FunctionEvent | None = event
    while around is not None:
        name = around.name
        found = next((group for group, operators in OPERATORS.items() if operators.match(name)), found)
        around = around.cpu_parent
    return found


def per_merge(ours: Row, floor: Row) -> Row:
    """What ours takes beyond the floor, which keeps as many tokens, by merge."""
    merges = ours["merges"]
    beyond = ours["seconds_per_call"] - floor["seconds_per_call"]
    names = dict.fromkeys((*ours["groups"], *floor["groups"]))
    return {
        "kernels_per_merge": (ours["kernels_per_call"] - floor["kernels_per_call"]) / merges,
        "generated_kernels_per_merge": (ours["generated_kernels"] - floor["generated_kernels"]) / merges,
        "seconds_per_merge": beyond / merges,
        "share": beyond / ours["seconds_per_call"],
        "share_of_merging_alone": ours["groups"]["fused with merging"] / ours["seconds_per_call"],
        "groups_beyond_floor": {name: ours["groups"].get(name, 0) - floor["groups"].get(name, 0) for name in names},
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Kernels and groups of every profile, in microseconds per call."""
    lines: list[str] = []
    for row in rows:
        parts = row.get("groups") or row.get("groups_beyond_floor") or {}
        lines.append(
            f"{row['name']}: " + ", ".join(f"{name} {1e6 * seconds:.0f} us" for name, seconds in parts.items())
        )
        lines += [
            f"  {1e6 * top['seconds']:9.1f} us {top['per_call']:6.1f} x {top['kernel'][:90]}"
            for top in row.get("top", ())
        ]
    return "\n".join(lines)


def _on_device(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CUDA] if device.type == "cuda" else []


def _seconds(event: FunctionEvent, device: torch.device) -> float:
    """Of the device, by this event itself and not by what it called."""
    return (event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total) / 1e6


def _repeat(call: timing.Call, count: int) -> None:
    for _ in range(count):
        call()
