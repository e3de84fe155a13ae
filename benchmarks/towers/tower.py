"""The tower alone: dense, as transformers' exporter captures it and as the model is, beside merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

import tldr_compile
from benchmarks import timing
from benchmarks.timing import Spread
from benchmarks.towers.sizes import CPU, Exported, Size
from tldr_compile import MergedModule
from tldr_compile.records.tables import grid, spread

DENSE, EAGER, OURS = "dense, compiled", "dense, eager", "ours"
HEAD = ("row", "latency, s", "dense ÷ this", "GFLOPs", "blocks left", "peak memory, MB")


def rows(size: Size, rounds: int) -> list[dict[str, Any]]:
    """The tower of this size, dense and merged, in one alternating run."""
    torch.manual_seed(0)
    tower = Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(**size.sight)).eval()
    config, grid_thw = tower.config, torch.tensor([size.grid])
    values = config.in_channels * config.temporal_patch_size * config.patch_size**2
    inputs = {"hidden_states": torch.randn(int(grid_thw.prod()), values), "grid_thw": grid_thw}
    ours: dict[str, MergedModule] = {
        OURS: tldr_compile.apply(tower, kwargs=inputs, outputs="merged", schedule=size.schedule),
        "ours, outputs restored": tldr_compile.apply(tower, kwargs=inputs, schedule=size.schedule),
        "ours, default schedule": tldr_compile.apply(tower, kwargs=inputs, outputs="merged"),
    }
    towers: dict[str, Callable[..., Any]] = {DENSE: size.compiled(Exported(tower, inputs)), EAGER: tower}
    towers |= {name: size.compiled(merged) for name, merged in ours.items()}
    calls = {name: partial(each, **inputs) for name, each in towers.items()}
    blocks: dict[str, int] = {}
    peaks: dict[str, int] = {}
    for name, call in track(list(calls.items()), "first calls", transient=True):
        blocks[name] = len(_features(call()))  # and compile
        peaks[name] = timing.peak_bytes(call, CPU)
    taken = timing.in_turn(calls, CPU, rounds, "timing", first=0)
    dense = ours[OURS].report.gflops[0]
    return [
        {
            "name": name,
            "latency": Spread.of(taken[name]),
            "dense_over_this": timing.ratio(taken[DENSE], taken[name]),
            "gflops": ours[name].report.gflops[1] if name in ours else dense,
            "blocks": blocks[name],
            "peak_bytes": peaks[name],
        }
        for name in calls
    ]


def _features(output: Any) -> Tensor:
    """What the language model gets, `[n, C]`."""
    features: Tensor = (output[0] if isinstance(output, tuple) else output).pooler_output
    return features


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table; latencies and ratios are min / median / max."""
    return grid(
        HEAD,
        (
            (
                row["name"],
                spread(row["latency"], 1),
                spread(row["dense_over_this"], 2),
                f"{row['gflops']:.0f}",
                str(row["blocks"]),
                f"{row['peak_bytes'] / 1e6:.0f}",
            )
            for row in rows
        ),
    )
