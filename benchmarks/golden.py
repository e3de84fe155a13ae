"""The UMT encoder with the authors' weights, video and numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.umt import UMT, UMTConfig
from tldr_compile import Decision

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
ENCODERS = ("encoder0", "encoder1")


@dataclass(frozen=True)
class GoldenEncoder:
    """`model(video)` returns `(out, block0, block1, ...)`; so do `base` and `merged`; `mass` is `[B, N', 1]`."""

    model: UMT
    video: Tensor
    schedule: tuple[int | float, ...]
    tokens: tuple[int, ...]
    base: tuple[Tensor, ...]
    merged: tuple[Tensor, ...]
    mass: Tensor


def golden_encoder(name: str, attn: Literal["sdpa", "eager"] = "sdpa") -> GoldenEncoder:
    """One of `ENCODERS`, in eval mode."""
    facts, arrays = _meta()["encoders"][f"{name}.npz"], _arrays(name)
    sizes = {key: facts[key] for key in ("image", "frames", "patch", "tubelet", "dim", "depth", "heads", "mlp_ratio")}
    model = UMT(UMTConfig(**sizes, norm_eps=facts["norm_eps"], attn=attn, hidden_states=True))
    weights = {key.removeprefix("weight/"): value for key, value in arrays.items() if key.startswith("weight/")}
    model.load_state_dict({**weights, "pos_embed": arrays["pos_embed"]})

    def outputs(kind: str) -> tuple[Tensor, ...]:
        return arrays[f"{kind}/out"], *(arrays[f"{kind}/block{i}"] for i in range(facts["depth"]))

    return GoldenEncoder(
        model=model.eval(),
        video=arrays["video"],
        schedule=tuple(facts["schedule"]),
        tokens=tuple(facts["tokens"]),
        base=outputs("base"),
        merged=outputs("merged"),
        mass=arrays["merged/mass"],
    )


def at_full_length(golden: GoldenEncoder, decisions: Sequence[Decision]) -> tuple[Tensor, ...]:
    """What the merged encoder returns if every token has its group's value: out and blocks, `[B, N, C]`."""
    last = max(each.site for each in decisions)
    blocks = (last, *range(len(golden.merged) - 1))
    assigned = ([each.assign for each in decisions if each.site <= block][-1] for block in blocks)
    return tuple(
        short.gather(1, assign.unsqueeze(-1).expand(-1, -1, short.shape[-1]))
        for short, assign in zip(golden.merged, assigned, strict=True)
    )


def assert_golden(actual: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    """Equal to `bound` of the largest magnitude."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= bound, f"off by {error:.2e} of the largest magnitude"


@cache
def _meta() -> dict[str, Any]:
    return json.loads((GOLDEN / "meta.json").read_text())


@cache
def _arrays(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}
