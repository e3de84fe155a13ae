"""The numbers of the method's authors, step by step (tests/golden/meta.json says what was run)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.golden import ENCODERS, golden_encoder
from tldr_compile import ops
from tldr_compile.ops import blocked, native, reference

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = json.loads((GOLDEN / "meta.json").read_text())["ops"]
TOLERANCE = 1e-5


@pytest.fixture(params=CASES, ids=lambda case: case["case"])
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    meta: dict[str, Any] = request.param
    prefix = meta["case"] + "/"
    with np.load(GOLDEN / "ops.npz") as file:
        arrays = {name.removeprefix(prefix): torch.from_numpy(file[name]) for name in file if name.startswith(prefix)}
    return {name: value for name, value in meta.items() if name != "mass_in"} | arrays


def assert_near(found: Tensor, golden: Tensor) -> None:
    assert found.shape == golden.shape
    assert (found - golden).abs().max() <= TOLERANCE * golden.abs().max()


def saliency_of(logits: Tensor) -> Tensor:
    """Keys that are the unit vectors make the queries the logits."""
    unit = torch.eye(logits.shape[-1]).expand_as(logits)
    return ops.saliency(ops.sharpness(logits, unit, scale=1.0))


def test_saliency(case: dict[str, Any]) -> None:
    assert_near(saliency_of(case["logits"]), case["saliency"])
    materialised = reference.row_sharpness(reference.safe_softmax(case["logits"]).mean(1))
    assert_near(ops.saliency(materialised), case["saliency"])


def test_merge(case: dict[str, Any]) -> None:
    x, tokens, r = case["x"], case["N"], case["r"]
    r = min(int(r * tokens) if isinstance(r, float) else r, tokens // 2)
    ones = torch.ones(x.shape[:2])
    mass = case["mass_in"].squeeze(-1) if "mass_in" in case else ones
    found = ops.group(x, saliency_of(case["logits"]), mass, ones, r)
    laid = [part.unsqueeze(-1) for part in found[:5]]
    assert_near(ops.down(x, *laid, dim=1), case["x_out"])
    assert_near(found.mass.unsqueeze(-1), case["mass_out"])
    assert found.kept.shape[1] == case["tokens_out"]


def bounds_of_half(
    q: Tensor, k: Tensor, v: Tensor, scale: float, log_mass: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """How far rounding to `dtype` may move output and sharpness, first order and all higher ones.

    With unit roundoff `u`, a score moves by at most `e = (2u + u^2) scale sum |q k|`, so a probability by at most a
    factor `1 + h = exp(2 max e)`. The output `sum A v` has two roundings more, of `v` and of itself:
    `((1 + h) (1 + u)^2 - 1) sum A |v|`. A mean over heads `A (1 + x)`, `|x| <= h`, changes `sum A log A` by
    `sum x A log A + sum A (1 + x) log(1 + x)`: at most `h |s| + (1 + h) log(1 + h)`.
    """
    u = torch.finfo(dtype).eps / 2
    moved = (2 * u + u * u) * scale * (q.abs() @ k.abs().mT)
    h = (2 * moved.amax(-1, keepdim=True)).expm1()
    size, _ = reference.attention_with_sharpness(q, k, v.abs(), scale=scale, log_mass=log_mass)
    _, sharpness = reference.attention_with_sharpness(q, k, v, scale=scale)
    most = h.amax(1).squeeze(-1)
    return ((1 + h) * (1 + u) ** 2 - 1) * size, most * sharpness.abs() + (1 + most) * most.log1p()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("provider", [native, blocked], ids=lambda each: each.__name__.rpartition(".")[2])
@pytest.mark.parametrize("name", ENCODERS)
def test_half_precision_stays_within_its_bound(name: str, provider: Any, dtype: torch.dtype) -> None:
    """On queries, keys and values of the authors' first layer."""
    golden = golden_encoder(name)
    block = golden.model.blocks[0]
    q, k, v = block.attn.heads_of(block.norm1(golden.model.embed(golden.video)))
    log_mass = torch.rand(q.shape[0], 1, 1, k.shape[2])
    scale = q.shape[-1] ** -0.5
    found = provider.forward(q.to(dtype), k.to(dtype), v.to(dtype), scale, None, log_mass)
    exact = reference.attention_with_sharpness(q.double(), k.double(), v.double(), scale=scale, log_mass=log_mass)
    bounds = bounds_of_half(q.double(), k.double(), v.double(), scale, log_mass, dtype)
    for one, other, bound in zip(found, exact, bounds, strict=True):
        assert ((one - other).abs() <= bound + TOLERANCE * other.abs().max()).all()
        assert bound.max() < other.abs().max() / 2, "a bound that says nothing"
