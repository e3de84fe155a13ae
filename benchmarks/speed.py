"""Latency and memory of a merged model beside what it competes with, all in one alternating run.

    python -m benchmarks.speed --model umt-b [--write docs/speed.md]
    python -m benchmarks.speed --model umt-b --device cuda --dtype bfloat16 --batch 8
    python -m benchmarks.speed --kept [--write docs/speed.md]      no measurement: one table of all that were kept

Rows: the dense model (SDPA, compiled: what a user would pick instead; and eager), `ours` through the backend, the
`floor` (as many tokens, dropped for free) through the backend and by hand, vid-TLDR and ToMe by hand.
"""

from __future__ import annotations

import argparse
import ast
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

import tldr_compile
from benchmarks import timing
from benchmarks.handwritten import Handwritten, Method
from benchmarks.models import MODELS, Spec
from benchmarks.pages import add_write, write
from benchmarks.timing import Spread
from benchmarks.umt import UMT
from tldr_compile import TokenMerging
from tldr_compile.backend import merged_graph
from tldr_compile.records.tables import grid, spread

MARKER, KEPT = "<!-- speed -->", "<!-- speeds -->"
DENSE, OURS, FLOOR = "dense compiled", "ours", "floor by hand"
THROUGH = "floor"  # through the backend, as every model has it
HEAD = ("row", "latency, ms", "clips/s", "ours ÷ this", "peak memory, MB", "first call, s", "off from the first row")
KEPT_HEAD = (
    *("model", "schedule", "device", "dtype", "clips", "dense, ms", "ours, ms", "dense ÷ ours", "ours ÷ floor"),
    "memory, ours ÷ dense",
)


@dataclass(frozen=True)
class Row:
    """One variant: seconds per call and of the first call (it compiles); bytes held beside the weights."""

    name: str
    first: float
    latency: Spread
    clips_per_second: float
    peak_bytes: int
    ours_over_this: Spread | None
    difference_to_first_row: float


@dataclass(frozen=True)
class Cost:
    """GFLOPs of one call in matrix products, dense and merged; seconds of all passes, and of all else that compiles."""

    gflops_dense: float
    gflops_merged: float
    passes_seconds: float
    other_compile_seconds: float

    def __str__(self) -> str:
        return (
            f"GFLOPs per call: {self.gflops_dense:.0f} dense, {self.gflops_merged:.0f} merged. All passes: "
            f"{self.passes_seconds:.2f} s, beside {self.other_compile_seconds:.1f} s of Dynamo and Inductor "
            f"({self.passes_seconds / self.other_compile_seconds:.1%})."
        )


@dataclass(frozen=True)
class Setting:
    """What `variants` needs to make every row."""

    model: nn.Module
    schedule: tuple[int | float, ...]
    inductor: dict[str, Any]

    def dense(self) -> Callable[..., Any]:
        return self.compiled(self.model)

    def compiled(self, model: nn.Module) -> Callable[..., Any]:
        return torch.compile(model, options=dict(self.inductor))

    def merged(self, reduction: str, **more: Any) -> Callable[..., Any]:
        options = {"schedule": list(self.schedule), "reduction": reduction, "inductor": self.inductor, **more}
        return torch.compile(self.model, backend="tldr", options=options)

    def cost(self, inputs: tuple[Tensor, ...], first: float) -> Cost:
        """What merging does to the count of operations, and what part the passes have in `first`, the first call."""
        config = TokenMerging(schedule=self.schedule)
        taken: list[float] = []

        def probe(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
            start = time.perf_counter()
            merged_graph(gm, examples, config)
            taken.append(time.perf_counter() - start)
            return gm.forward

        torch._dynamo.reset()
        torch.compile(self.model, backend=probe)(*inputs)
        told = tldr_compile.explain(self.model, inputs, config=config).to_dict()
        return Cost(told["gflops_before"], told["gflops_after"], sum(taken), first - sum(taken))

    def by_hand(self, method: Method) -> nn.Module:
        if not isinstance(self.model, UMT):
            raise SystemExit("the hand-written rows exist for UMT only: leave them out of --rows")
        return Handwritten(self.model, self.schedule, method)


ROWS: dict[str, Callable[[Setting], Callable[..., Any]]] = {
    DENSE: Setting.dense,
    "dense eager": lambda setting: setting.model,
    OURS: lambda setting: setting.merged("merge"),
    "ours, shift": lambda setting: setting.merged("merge", saliency="shift"),
    THROUGH: lambda setting: setting.merged("slice"),
    FLOOR: lambda setting: setting.compiled(setting.by_hand("slice")),
    "vid-TLDR eager": lambda setting: setting.by_hand("vid-tldr"),
    "vid-TLDR compiled": lambda setting: setting.compiled(setting.by_hand("vid-tldr")),
    "ToMe eager": lambda setting: setting.by_hand("tome"),
    "ToMe compiled": lambda setting: setting.compiled(setting.by_hand("tome")),
}
GENERAL_ROWS = (DENSE, "dense eager", OURS, "ours, shift", THROUGH)


@torch.inference_mode()
def measure(setting: Setting, inputs: tuple[Tensor, ...], rows: Sequence[str], *, clips: int, rounds: int) -> list[Row]:
    """Compile every row, warm it up, and time all of them in alternation."""
    device = inputs[0].device
    calls: dict[str, timing.Call] = {}
    first: dict[str, float] = {}
    outputs: dict[str, Tensor] = {}
    peaks: dict[str, int] = {}
    for name in track(rows, "first calls", transient=True):
        calls[name] = partial(ROWS[name](setting), *inputs)
        first[name] = timing.seconds(calls[name], device)
        outputs[name] = leading(calls[name]())
        peaks[name] = timing.peak_bytes(calls[name], device)
    taken = timing.in_turn(calls, device, rounds, "timing")

    def row(name: str) -> Row:
        latency = Spread.of(taken[name])
        return Row(
            name=name,
            first=first[name],
            latency=latency,
            clips_per_second=clips / latency.median,
            peak_bytes=peaks[name],
            ours_over_this=timing.ratio(taken[OURS], taken[name]) if OURS in taken else None,
            difference_to_first_row=difference(outputs[name], outputs[rows[0]]),
        )

    return [row(name) for name in rows]


def leading(output: object) -> Tensor:
    """The first tensor of a model's output."""
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference as a part of the largest magnitude."""
    return float((actual.float() - expected.float()).abs().max() / expected.float().abs().max())


def markdown(rows: Iterable[Row], weights: int) -> str:
    """The rows as a Markdown table; latencies and ratios are min / median / max."""
    return grid(
        HEAD,
        (
            (
                row.name,
                spread(row.latency, 1, 1000),
                f"{row.clips_per_second:.2f}",
                spread(row.ours_over_this, 3) if row.ours_over_this else "-",
                f"{(weights + row.peak_bytes) / 1e6:.0f}",
                f"{row.first:.1f}",
                f"{row.difference_to_first_row:.2e}",
            )
            for row in rows
        ),
    )


def middles(record: Mapping[str, Any]) -> tuple[str, ...]:
    """One measurement that was kept, as a line."""
    rows = {row["name"]: row for row in record["rows"]}
    dense, ours, floor = rows[DENSE], rows[OURS], rows[THROUGH]
    weights = record["weight_bytes"]
    return (
        MODELS[record["model"]].title,
        f"`{json.dumps(record['schedule'])}`",
        _device(record["machine"]),
        record["dtype"],
        str(record["batch"]),
        f"{1000 * dense['latency'][1]:.0f}",
        f"{1000 * ours['latency'][1]:.0f}",
        f"{1 / dense['ours_over_this'][1]:.2f}",
        f"{floor['ours_over_this'][1]:.2f}",
        f"{(weights + ours['peak_bytes']) / (weights + dense['peak_bytes']):.2f}",
    )


def _device(machine: Mapping[str, Any]) -> str:
    threads = "" if machine.get("cuda") else f", {machine['threads']} thread(s)" if "threads" in machine else ""
    return f"{machine['device']}{threads}"


def kept(folder: Path = timing.RESULTS) -> str:
    """The middles of all measurements that have the three rows, in the order of the models."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("speed-*.json"))]
    records = [each for each in records if {DENSE, OURS, THROUGH} <= {row["name"] for row in each["rows"]}]
    order = list(MODELS)
    records.sort(key=lambda each: (each["machine"]["device"], order.index(each["model"])))
    return grid(KEPT_HEAD, map(middles, records))


def options() -> argparse.Namespace:
    parser = timing.parser(__doc__, rounds=7)
    parser.add_argument("--model", choices=MODELS, default="umt-b")
    parser.add_argument("--batch", type=int, default=1, help="clips per call")
    parser.add_argument("--schedule", type=ast.literal_eval, help="for example [600,200,100]; default: the model's own")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="default: all that the model has")
    parser.add_argument("--inductor", type=ast.literal_eval, default={}, help="Inductor options, the same for all rows")
    parser.add_argument("--cached", action="store_true", help="reuse compiled code of earlier runs (first calls lie)")
    parser.add_argument("--name", help="file name of the JSON in benchmarks/results, without its ending")
    parser.add_argument("--kept", action="store_true", help="measure nothing: a table of all that were kept")
    add_write(parser, MARKER, f"{KEPT} (--kept)")
    return parser.parse_args()


def record(spec: Spec, chosen: argparse.Namespace) -> tuple[Path, str]:
    """Measure, keep the JSON, return its path and the table."""
    model, inputs = spec.on(chosen.device, chosen.dtype, chosen.batch)
    schedule = spec.schedule if chosen.schedule is None else tuple(chosen.schedule)
    names = chosen.rows or (tuple(ROWS) if isinstance(model, UMT) else GENERAL_ROWS)
    setting = Setting(model, schedule, chosen.inductor)
    rows = measure(setting, inputs, names, clips=chosen.batch, rounds=chosen.rounds)
    weights = sum(value.nbytes for value in model.parameters())
    ours = next((row for row in rows if row.name == OURS), None)
    cost = ours and setting.cost(inputs, ours.first - ours.latency.median)
    facts = {
        "model": chosen.model,
        "schedule": schedule,
        "batch": chosen.batch,
        "dtype": chosen.dtype,
        "rounds": chosen.rounds,
        "inductor": chosen.inductor,
        "weight_bytes": weights,
        **(asdict(cost) if cost else {}),
        "machine": timing.machine(inputs[0].device),
        "rows": [asdict(row) for row in rows],
    }
    name = chosen.name or f"speed-{chosen.model}-{chosen.device}-{chosen.dtype}-b{chosen.batch}"
    return timing.write(name, facts), "\n\n".join(map(str, filter(None, (markdown(rows, weights), cost))))


def main() -> None:
    chosen = options()
    if chosen.kept:
        table = kept()
    else:
        torch._inductor.config.force_disable_caches = not chosen.cached
        path, table = record(MODELS[chosen.model], chosen)
        print(f"kept in {path}\n")
    print(table)
    write(chosen.write, table, KEPT if chosen.kept else MARKER)


if __name__ == "__main__":
    main()
