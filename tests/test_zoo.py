"""The zoo itself: every case runs, traces, and is worth merging."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.zoo import CASES, FAMILIES, Case, case


def run(case: Case, batch: int = 2) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(case.build()(*case.inputs(batch))) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_are_finite_and_differ_between_samples(case: Case) -> None:
    for output in run(case):
        assert output.isfinite().all()
        assert (output[0] - output[1]).abs().max() > 1e-2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_builds_the_same_model_twice(case: Case) -> None:
    for first, second in zip(run(case), run(case), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exports(case: Case) -> None:
    exported = torch.export.export(case.build(), case.inputs()).module()
    with torch.no_grad():
        outputs = [leaf for leaf in tree_leaves(exported(*case.inputs())) if isinstance(leaf, Tensor)]
    for actual, expected in zip(outputs, run(case), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if len(family.attns) == 2])
def test_sdpa_and_eager_agree(name: str) -> None:
    for sdpa, eager in zip(run(case(name, "sdpa")), run(case(name, "eager")), strict=True):
        torch.testing.assert_close(sdpa, eager, rtol=1e-5, atol=1e-5)


class SelfAttentionMaps(TorchDispatchMode):
    """Keeps every square softmax output of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._softmax.default and out.shape[-1] == out.shape[-2]:
            self.maps.append(out)
        return out


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_is_neither_even_nor_one_hot(name: str) -> None:
    """Saliency of degenerate attention would be rounding noise: the laws would compare nothing."""
    with SelfAttentionMaps() as seen:
        run(case(name, "eager"))
    assert len(seen.maps) >= 3
    for attended in seen.maps:
        evenness = torch.special.entr(attended).sum(-1) / math.log(attended.shape[-1])
        assert 0.2 < evenness.mean() < 0.99
        assert evenness.std() > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_other_sizes_can_be_made(name: str) -> None:
    attn = FAMILIES[name].attns[0]
    assert run(case(name, attn, image=16, frames=4), batch=3)[0].shape[0] == 3
