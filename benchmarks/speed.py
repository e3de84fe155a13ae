"""Latency and memory of a merged model beside what it competes with, all in one alternating run.

    python benchmarks/speed.py --model umt-b [--write docs/speed.md]
    python benchmarks/speed.py --model umt-b --device cuda --dtype bfloat16 --batch 8

Rows: the dense model (SDPA, compiled: what a user would pick instead; and eager), `ours` through the backend, the
`floor` (as many tokens, dropped for free) through the backend and by hand, vid-TLDR and ToMe by hand.
"""

from __future__ import annotations

import argparse
import ast
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from rich.progress import Progress
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

import tldr_compile
from benchmarks import timing
from benchmarks.handwritten import Handwritten, Method
from benchmarks.models import MODELS, Spec
from benchmarks.table import replaced
from benchmarks.timing import Spread
from benchmarks.umt import UMT
from tldr_compile import TokenMerging
from tldr_compile.backend import merged_graph

MARKER = "<!-- speed -->"
DENSE, OURS, FLOOR = "dense compiled", "ours", "floor by hand"


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
    "floor": lambda setting: setting.merged("slice"),
    FLOOR: lambda setting: setting.compiled(setting.by_hand("slice")),
    "vid-TLDR eager": lambda setting: setting.by_hand("vid-tldr"),
    "vid-TLDR compiled": lambda setting: setting.compiled(setting.by_hand("vid-tldr")),
    "ToMe eager": lambda setting: setting.by_hand("tome"),
    "ToMe compiled": lambda setting: setting.compiled(setting.by_hand("tome")),
}
GENERAL_ROWS = (DENSE, "dense eager", OURS, "ours, shift", "floor")


@torch.inference_mode()
def measure(setting: Setting, inputs: tuple[Tensor, ...], rows: Sequence[str], *, clips: int, rounds: int) -> list[Row]:
    """Compile every row, warm it up, and time all of them in alternation."""
    device = inputs[0].device
    calls: dict[str, timing.Call] = {}
    first: dict[str, float] = {}
    outputs: dict[str, Tensor] = {}
    peaks: dict[str, int] = {}
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(rows) * (1 + rounds))
        for name in rows:
            progress.update(task, description=f"first call: {name}")
            run = ROWS[name](setting)
            calls[name] = partial(run, *inputs)
            first[name] = timing.seconds(calls[name], device)
            outputs[name] = leading(calls[name]())
            peaks[name] = timing.peak_bytes(calls[name], device)
            progress.advance(task)
        progress.update(task, description="timing")
        taken = timing.alternate(calls, device, rounds=rounds, tick=lambda: progress.advance(task))

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
    lines = [
        "| row | latency, ms | clips/s | ours ÷ this | peak memory, MB | first call, s | off from the first row |",
        "| --- " * 7 + "|",
    ]
    for row in rows:
        latency = " / ".join(f"{1000 * value:.1f}" for value in row.latency)
        ratio = " / ".join(f"{value:.3f}" for value in row.ours_over_this) if row.ours_over_this else "-"
        lines.append(
            f"| {row.name} | {latency} | {row.clips_per_second:.2f} | {ratio} "
            f"| {(weights + row.peak_bytes) / 1e6:.0f} | {row.first:.1f} | {row.difference_to_first_row:.2e} |"
        )
    return "\n".join(lines)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="umt-b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=1, help="clips per call")
    parser.add_argument("--schedule", type=ast.literal_eval, help="for example [600,200,100]; default: the model's own")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="default: all that the model has")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each row")
    parser.add_argument("--inductor", type=ast.literal_eval, default={}, help="Inductor options, the same for all rows")
    parser.add_argument("--cached", action="store_true", help="reuse compiled code of earlier runs (first calls lie)")
    parser.add_argument("--write", type=Path, help=f"file with two lines {MARKER} to put the table between")
    parser.add_argument("--name", help="file name of the JSON in benchmarks/results, without its ending")
    return parser.parse_args()


def record(spec: Spec, chosen: argparse.Namespace) -> tuple[Path, str]:
    """Measure, keep the JSON, return its path and the table."""
    device, dtype = torch.device(chosen.device), getattr(torch, chosen.dtype)
    model = spec.build().to(device, dtype)
    schedule = spec.schedule if chosen.schedule is None else tuple(chosen.schedule)
    inputs = tuple(value.to(device, dtype) for value in spec.inputs(chosen.batch))
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
        "machine": timing.machine(device),
        "rows": [asdict(row) for row in rows],
    }
    name = chosen.name or f"speed-{chosen.model}-{chosen.device}-{chosen.dtype}-b{chosen.batch}"
    return timing.write(name, facts), "\n\n".join(map(str, filter(None, (markdown(rows, weights), cost))))


def main() -> None:
    chosen = options()
    torch._inductor.config.force_disable_caches = not chosen.cached
    path, table = record(MODELS[chosen.model], chosen)
    print(table)
    print(f"\nkept in {path}")
    if chosen.write is not None:
        chosen.write.write_text(replaced(chosen.write.read_text(), table, MARKER))


if __name__ == "__main__":
    main()
