"""What a user gets: whole models beside what they compete with, in bfloat16 on a GPU, in alternation."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import timing
from benchmarks.gpu.driver import Jobs, Row, Setup
from benchmarks.gpu.load import Load, call_of
from benchmarks.speed import OURS, Setting, difference, leading
from benchmarks.timing import Spread

WARM, COLD = 25.0, 120.0  # seconds that a load needs, with its code in the caches and without
ROUNDS = 7


def models(setup: Setup) -> Jobs:
    """The loads whose code is in the caches, then the others."""
    warm = setup.warm
    if warm is None:
        raise ValueError("the part needs processes that compile ahead")
    yield "compiling ahead", lambda: {"first_call_seconds": warm.wait()}
    for load in sorted(setup.loads, key=lambda load: not warm.has(load)):
        if setup.dry or setup.left() > (WARM if warm.has(load) else COLD):
            free(setup.device)
            yield from _load(load, setup)
    free(setup.device)


def _load(load: Load, setup: Setup) -> Jobs:
    """A job for the first call of every row, and one that times those that ran."""
    run = Alternation(load, setup.device)
    for row in load.rows:
        if not setup.dry and setup.left() < WARM / 2:
            break  # what is compiled can still be timed
        yield f"{load.name}: first call of {row}", partial(run.first, row)
    if run.calls:
        yield load.name, partial(run.time, rounds=2 if setup.dry else ROUNDS)


class Alternation:
    """The rows of one load: compiled one by one, timed together."""

    def __init__(self, load: Load, device: torch.device) -> None:
        self.load, self.device = load, device
        self.calls: dict[str, timing.Call] = {}
        self.facts: dict[str, Row] = {}
        self.outputs: dict[str, torch.Tensor] = {}

    @cached_property
    def setting(self) -> Setting:
        return self.load.setting(self.device)

    @cached_property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        return self.load.inputs(self.device)

    def first(self, row: str) -> Row:
        """What the first call takes, what a later one holds, and which operators attend."""
        with self.load.running():
            call = call_of(self.setting, self.inputs, row)
            seconds = timing.seconds(call, self.device)
            attention = attention_calls(call)
            self.outputs[row] = leading(call()).clone()
            peak = timing.peak_bytes(call, self.device)
        self.calls[row] = call
        self.facts[row] = {"first_call": seconds, "peak_bytes": peak, "attention": attention}
        return self.facts[row]

    def time(self, rounds: int) -> Row:
        with self.load.running():
            taken = timing.paired(self.calls, self.device, rounds=rounds)
        weights = sum(value.nbytes for value in self.setting.model.parameters())
        first_row = next(iter(self.outputs.values()))
        return {
            "schedule": self.setting.schedule,
            "inductor": self.setting.inductor,
            "fused_attention_alone": dict(self.load.attention),
            "weight_bytes": weights,
            "rows": [
                {
                    "row": row,
                    **self.facts[row],
                    "latency": Spread.of(seconds),
                    "clips_per_second": self.load.batch / Spread.of(seconds).median,
                    "ours_over_this": timing.ratio(taken[OURS], seconds) if OURS in taken else None,
                    "this_over_ours": timing.ratio(seconds, taken[OURS]) if OURS in taken else None,
                    "difference_to_first_row": difference(self.outputs[row], first_row),
                }
                for row, seconds in taken.items()
            ],
        }


def free(device: torch.device) -> None:
    """Give the memory of what is no longer referred to back, for the next load."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def attention_calls(call: timing.Call) -> dict[str, int]:
    """How often one call asks each operator for attention; none in the replay of a CUDA graph."""
    with profile(activities=[ProfilerActivity.CPU]) as run:
        call()
    return {
        event.key: event.count
        for event in run.key_averages()
        if event.key.startswith(("tldr::attend", "aten::_scaled_dot_product"))
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per row of a load; latencies in ms and ratios are min / median / max."""
    lines = [f"{'load':<20} {'row':<18} {'ms':>24} {'clips/s':>8} {'this ÷ ours':>21} {'MB':>7} attention first"]
    for load in rows:
        if "rows" not in load:
            continue
        fused = next(iter(load["fused_attention_alone"]))
        for row in load["rows"]:
            ratio = row["this_over_ours"]
            lines.append(
                f"{load['name']:<20} {row['row']:<18} {_spread(row['latency'], 1000, 2):>24} "
                f"{row['clips_per_second']:>8.1f} {_spread(ratio, 1, 3) if ratio else '-':>21} "
                f"{row['peak_bytes'] / 1e6:>7.0f} {fused}"
            )
    return "\n".join(lines)


def _spread(spread: Sequence[float], scale: float, digits: int) -> str:
    return " / ".join(f"{scale * value:.{digits}f}" for value in spread)
