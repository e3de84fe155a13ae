"""Where the time of one call goes: kernels, and groups of them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from heapq import nlargest
from operator import itemgetter
from typing import Any, TypeAlias

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks import timing

TOP = 40

Profile: TypeAlias = dict[str, Any]

# By the operator that launches a kernel, the outermost of those around it; then by the kernel's own name.
OPERATORS = {
    "sharpness": re.compile(r"tldr::attend_and_sharpness"),
    "masses": re.compile(r"tldr::attend$"),
    "matching": re.compile(r"tldr::best"),
    "attention": re.compile(r"aten::_?scaled_dot_product"),
    "matrix products": re.compile(r"aten::(mm|addmm|bmm|baddbmm|linear|matmul|mkl.*|_?convolution.*|mkldnn.*)$"),
    "ordering": re.compile(r"aten::(arg)?sort|aten::topk"),
}
KERNELS = {
    "sharpness": re.compile(r"^_share"),
    "attention": re.compile(r"^_attend"),
    "matching": re.compile(r"^_match"),
    "fused with merging": re.compile(r"triton.*(gather|scatter|sort|cumsum|topk)"),
}


def profile_of(call: timing.Call, device: torch.device, *, calls: int) -> Profile:
    """Per call: kernels, and seconds of the device by kernel and by group."""
    for _ in range(3):
        call()
    with profile(activities=[ProfilerActivity.CPU, *_on_device(device)]) as run:
        timing.seconds(partial(timing.repeat, call, calls), device)
    events = list(run.events() or ())
    kernels = kernels_of(events, device)
    counts = Counter(event.name for event in kernels)
    seconds: defaultdict[str, float] = defaultdict(float)
    for event in kernels:
        seconds[event.name] += _seconds(event, device) / calls
    total = sum(seconds.values())
    return {
        "kernels_per_call": len(kernels) / calls,
        "seconds_per_call": total,
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
    """Seconds per call by what they are for."""
    spent: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type == DeviceType.CPU and (group := group_of(event)):
            spent[group] += _seconds(event, device) / calls
    for name, seconds in by_kernel.items():
        for group, kernels in KERNELS.items():
            if kernels.search(name):
                spent[group] += seconds
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


def _on_device(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CUDA] if device.type == "cuda" else []


def _seconds(event: FunctionEvent, device: torch.device) -> float:
    """Of the device, by this event itself and not by what it called."""
    return (event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total) / 1e6
