"""`flex_attention` is attention like any other: found through its modification, merged, or refused for its mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import tldr_compile
from tests.laws.support import compiled
from tldr_compile.errors import CaptureError, NothingToMerge
from tldr_compile.passes.capture.attention import SDPA

B, N, C, HEADS = 2, 18, 16, 4


class Flexible(nn.Module):
    """A block whose scores are modified in one of the ways of the operator's own documentation."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.heads, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.bias = nn.Parameter(torch.randn(HEADS, N, N))
        self.slope = nn.Parameter(torch.rand(HEADS))
        self.eval().requires_grad_(False)  # the operator has no backward on a CPU

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        few = 2 if self.kind == "grouped" else HEADS
        q, k, v = self.heads(x).view(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mask = None
        if self.kind == "causal":
            mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device="cpu")
        y = flex_attention(q, k[:, :few], v[:, :few], self.modification(), mask, enable_gqa=few != HEADS)
        return x + self.out(y.transpose(1, 2).reshape(x.shape))

    def modification(self) -> Any:
        bias, slope = self.bias, self.slope
        return {
            "bias": lambda score, b, h, i, j: score + bias[h, i, j],
            "alibi": lambda score, b, h, i, j: score + (j - i) * slope[h],
            "capped": lambda score, b, h, i, j: 5 * torch.tanh(score / 5),
            "summed": lambda score, b, h, i, j: score + bias[h].sum(0),
        }.get(self.kind)


def clip() -> Tensor:
    return torch.randn(B, N, C, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "fused"), [("plain", True), ("grouped", True), ("bias", True), ("alibi", True), ("capped", False)]
)
@torch.no_grad()
def test_is_merged_on_both_roads(kind: str, fused: bool) -> None:
    model, x = Flexible(kind), clip()
    merged = tldr_compile.apply(model, (x,), schedule=[4], verify=True)
    graph = merged._merged.plan.typed.captured.graph
    assert bool(graph.graph.find_nodes(op="call_function", target=SDPA)) == fused
    torch.testing.assert_close(tldr_compile.apply(model, (x,), schedule=[0])(x), model(x))
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(model, schedule=[4])(x), merged(x), rtol=1e-4, atol=1e-4)


def test_a_mask_that_hides_tokens_is_refused() -> None:
    with pytest.raises(NothingToMerge, match="hides some of its tokens from others"):
        tldr_compile.apply(Flexible("causal"), (clip(),), schedule=[4])


def test_a_modification_that_is_not_one_of_entries_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"score_mod of flex_attention gives .* entry by entry"):
        tldr_compile.apply(Flexible("summed"), (clip(),), schedule=[4])


@torch.no_grad()
def test_a_row_that_sees_nothing_gives_zeros() -> None:
    class Blind(Flexible):
        def modification(self) -> Any:
            return lambda score, b, h, i, j: torch.where(i == 3, -torch.inf, 5 * torch.tanh(score / 5))

    model, x = Blind("plain"), clip()
    expected = model(x)
    assert expected.isfinite().all()
    torch.testing.assert_close(tldr_compile.apply(model, (x,), schedule=[0])(x), expected)
