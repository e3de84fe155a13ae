"""The numbers of the method's authors, step by step (tests/golden/meta.json says what was run)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tldr_compile import ops
from tldr_compile.ops import reference

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
