"""What the passes add to the time of `torch.compile(model, backend="tldr")`, phase by phase.

    python -m benchmarks.passes [--models vjepa2-l umt-l] [--compile]

Seconds are of the processor, of this process and the compilers that it started and waited for: what else runs on the
machine does not count. Without `--compile` Inductor is left out, and so is the share.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import fx, nn

from benchmarks import timing
from benchmarks.models import MODELS, Spec
from tldr_compile import TokenMerging, backend, passes

# Phases in their order, by where they are called. What is left of the backend's own time is `other`.
PHASES = {
    "retrace": (backend, "from_dynamo"),
    "fuse": (passes, "fuse"),
    "infer": (passes, "infer"),
    "sites": (passes, "sites"),
    "plan": (passes, "_make_plan"),
    "rewrite": (passes, "rewrite"),
    "check_shapes": (passes, "check_shapes"),
}
ALL = (backend, "_merged")


def seconds() -> float:
    """Of the processor, so far."""
    return sum(os.times()[:4])


@contextmanager
def timed(phases: Mapping[str, tuple[Any, str]], taken: dict[str, float]) -> Iterator[None]:
    """Add to `taken` the seconds of every phase that is called inside."""

    def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = seconds()
            try:
                return function(*args, **kwargs)
            finally:
                taken[name] = taken.get(name, 0.0) + seconds() - start

        return call

    with ExitStack() as patches:
        for name, (module, attribute) in phases.items():
            patches.enter_context(patch.object(module, attribute, clocked(name, getattr(module, attribute))))
        yield


def unfilled(spec: Spec) -> nn.Module:
    """The model with whatever numbers its memory holds: compiling reads none, and drawing them takes minutes."""
    with torch.device("meta"):
        model = spec.make().eval()
    return model.to_empty(device="cpu")


@torch.inference_mode()
def measure(model: nn.Module, inputs: Sequence[torch.Tensor], config: TokenMerging, compiled: bool) -> dict[str, float]:
    """Seconds of each phase and all passes; if `compiled`, of `compile`: a first call without what a second takes."""

    def ours(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        backend.merged_graph(gm, examples, config)
        return lambda *_: (torch.zeros(()),) * len(gm.graph.output_node().args[0])  # type: ignore[arg-type]

    taken: dict[str, float] = {}
    torch._dynamo.reset()
    with timed({**PHASES, "all passes": ALL}, taken):
        if not compiled:
            torch.compile(model, backend=ours)(*inputs)
        else:
            run = torch.compile(model, backend=lambda *args: backend.tldr(*args, options={"schedule": config.schedule}))
            start = seconds()
            run(*inputs)
            first = seconds() - start
            run(*inputs)
            taken["compile"] = 2 * first - (seconds() - start)
    taken["other"] = taken["all passes"] - sum(taken.get(name, 0.0) for name in PHASES)
    return taken


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A line for each phase and a column for each model, with the phase's part of compiling where that was measured."""

    def cell(taken: Mapping[str, float], name: str) -> str:
        if name not in taken:
            return "-"
        return f"{taken[name]:.2f}" + (f" ({taken[name] / taken['compile']:.1%})" if "compile" in taken else "")

    names = (*PHASES, "other", "all passes", "compile")
    lines = [f"| seconds of the processor | {' | '.join(rows)} |", "| --- " * (1 + len(rows)) + "|"]
    lines += [f"| {name} | {' | '.join(cell(taken, name) for taken in rows.values())} |" for name in names]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=("vjepa2-l", "umt-l"))
    parser.add_argument("--compile", action="store_true", help="compile, which takes minutes and the memory of a run")
    parser.add_argument("--out", type=Path, default=timing.RESULTS, help="folder of passes.json")
    chosen = parser.parse_args()
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.compile_threads = 1  # compilers that are waited for, whose seconds count
    rows = {}
    for name in chosen.models:
        spec = MODELS[name]
        config = TokenMerging(schedule=spec.schedule)
        rows[spec.title] = measure(unfilled(spec), spec.inputs(), config, chosen.compile)
    print(table(rows))
    machine = timing.machine(torch.device("cpu"))
    timing.write("passes", {"machine": machine, "seconds_of_the_processor": rows}, chosen.out)


if __name__ == "__main__":
    main()
