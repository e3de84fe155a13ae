"""Attention over packed segments is attention over a batch of them where they have one length; else it says why not."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from tests.passes.capture.packed import FRAMES, PER_FRAME, Tower, rows
from tests.tracing import canonical, number
from tldr_compile import NothingToMerge, apply
from tldr_compile.passes import from_export
from tldr_compile.passes.capture.attention import SDPA, fuse

S, L, HEADS, D = 3, 4, 4, 8
Q, K, V = (number(S * L, HEADS, D, seed=seed).double() for seed in range(3))
operator = torch.ops.torch_attn._varlen_attn.default


def starts(count: int = S, length: int = L) -> Tensor:
    return torch.arange(count + 1, dtype=torch.int32) * length


def packed(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """With the options that this release has: some take fewer heads of keys for granted."""
    known = {name: each for name, each in options.items() if name in signature(varlen_attn).parameters}
    return varlen_attn(q, k, v, starts(), starts(), L, L, **known)


def batched(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The same for segments of one length, as the model could have written it."""
    q, k, v = (each.unflatten(0, (S, L)).transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize(
    ("ours", "theirs", "heads"),
    [
        ({}, {}, HEADS),
        ({"scale": 0.3}, {"scale": 0.3}, HEADS),
        ({"scale": 0.0}, {"scale": 0.0}, HEADS),
        ({"window_size": (-1, 0)}, {"is_causal": True}, HEADS),
        ({"enable_gqa": True}, {"enable_gqa": True}, HEADS // 2),
    ],
    ids=["plain", "scale", "a scale of nothing", "causal", "grouped heads"],
)
def test_segments_of_one_length_are_a_batch(ours: dict[str, Any], theirs: dict[str, Any], heads: int) -> None:
    q, k, v = Q, K[:, :heads].contiguous(), V[:, :heads].contiguous()
    fused, (attention,), misses = fuse(canonical(lambda q, k, v: packed(q, k, v, **ours), q, k, v))
    assert not misses
    assert attention.node.target is SDPA
    assert attention.node.meta["val"].shape == (S, HEADS, L, D)
    assert not fused.graph.graph.find_nodes(op="call_function", target=operator)
    torch.testing.assert_close(fused.graph(q, k, v)[0], batched(q, k, v, **theirs), rtol=1e-12, atol=1e-12)


def test_keys_whose_segments_are_the_same_by_their_sizes() -> None:
    """Other starts, of as many segments of the same length: they can only be the same numbers."""
    found = canonical(lambda q, k, v, s, t: varlen_attn(q, k, v, s, t, L, L), Q, K, V, starts(), starts())
    fused, attentions, _ = fuse(found)
    assert len(attentions) == 1
    torch.testing.assert_close(fused.graph(Q, K, V, starts(), starts())[0], batched(Q, K, V), rtol=1e-12, atol=1e-12)


def test_the_captured_graph_keeps_the_operator() -> None:
    found = canonical(packed, Q, K, V)
    fuse(found)
    assert found.graph.graph.find_nodes(op="call_function", target=operator)


class Packed(nn.Module):
    """`[T, 3 heads d] -> [T, heads, d]` with segments as `segments` has them: their starts, and their length."""

    def __init__(self, segments: Callable[[Tensor], tuple[Tensor, Any]]) -> None:
        super().__init__()
        self.segments = segments

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.unflatten(-1, (3, HEADS, D)).unbind(1)
        at, length = self.segments(x)
        return varlen_attn(q, k, v, at, at, length, length)


def more_frames(x: Tensor) -> tuple[Tensor, Any]:
    return starts(x.shape[0] // L), L


def larger_frames(x: Tensor) -> tuple[Tensor, Any]:
    return torch.arange(S + 1, dtype=torch.int32) * (x.shape[0] // S), x.shape[0] // S


@pytest.mark.parametrize(("segments", "by"), [(more_frames, L), (larger_frames, S)])
def test_sizes_that_are_open_but_known_to_divide(segments: Any, by: int) -> None:
    x, y = torch.randn(S * L, 3 * HEADS * D), torch.randn(S * L * 2, 3 * HEADS * D)
    size = by * Dim("size", min=2, max=64)
    program = torch.export.export(Packed(segments), (x,), dynamic_shapes=({0: size},))
    fused, attentions, misses = fuse(from_export(program))
    assert len(attentions) == 1
    assert not misses
    q, k, v = y.unflatten(-1, (3, HEADS, D)).unbind(1)
    length = 2 * L if by == S else L
    q, k, v = (each.unflatten(0, (-1, length)).transpose(1, 2) for each in (q, k, v))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(fused.graph(y)[0], expected)


def other_keys(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return varlen_attn(q, k[:6], v[:6], starts(), starts(length=2), L, 2)


WHOLE: dict[str, tuple[Callable[..., Any], str]] = {
    "segments of different lengths": (
        lambda q, k, v: varlen_attn(q, k, v, starts(), starts(), 5, 5),
        "its segments have different lengths: 12 tokens in 3 segments of at most 5",
    ),
    "fewer keys": (other_keys, "its keys lie in other segments than its queries"),
    "keys in more segments": (
        lambda q, k, v: varlen_attn(q, k, v, starts(), starts(6, 2), L, 2),
        "its keys lie in other segments than its queries",
    ),
    "a window": (
        lambda q, k, v: packed(q, k, v, window_size=(2, 0)),
        r"a token sees only the window \[2, 0\] of its segment",
    ),
    "keys that are not used": (
        lambda q, k, v: packed(q, k, v, seqused_k=torch.full((S,), 2, dtype=torch.int32)),
        "it is called with seqused_k: its keys are not just those of its segments",
    ),
    "the sums of scores": (
        lambda q, k, v: packed(q, k, v, return_aux=AuxRequest(lse=True)),
        r"something else than its output is read \(getitem_1\)",
    ),
    "the state of random numbers": (
        lambda q, k, v: operator(q, k, v, starts(), starts(), L, L)[2],
        r"something else than its output is read \(getitem_2\)",
    ),
}

if "seqused_k" not in inspect.signature(varlen_attn).parameters:  # torch 2.11 has none
    del WHOLE["keys that are not used"]


@pytest.mark.parametrize(("function", "reason"), WHOLE.values(), ids=list(WHOLE))
def test_anything_else_stays_whole_and_says_why(function: Callable[..., Any], reason: str) -> None:
    fused, attentions, (miss,) = fuse(canonical(function, Q, K, V))
    assert not attentions
    assert miss.node.target is operator
    assert re.fullmatch(reason, miss.reason)
    assert len(fused.graph.graph.find_nodes(op="call_function", target=operator)) == 1


def test_sizes_that_are_not_known_to_divide() -> None:
    x = torch.randn(S * L, 3 * HEADS * D)
    program = torch.export.export(Packed(more_frames), (x,), dynamic_shapes=({0: Dim.AUTO},))
    _, attentions, (miss,) = fuse(from_export(program))
    assert not attentions
    assert re.match("its segments are not known to have one length: .* segments of at most 4", miss.reason)


@torch.no_grad()
def test_a_tower_merges_as_if_its_frames_were_a_batch() -> None:
    clip = rows()
    ours, theirs = (
        apply(Tower(kind), (clip,), clip="rows", schedule=[3, 2], verify=True) for kind in ("varlen", "batched")
    )
    assert [(site["tokens_in"], site["tokens_out"]) for site in ours.report.sites] == [
        (FRAMES * PER_FRAME, FRAMES * (PER_FRAME - 3)),
        (FRAMES * (PER_FRAME - 3), FRAMES * (PER_FRAME - 5)),
    ]
    assert torch.equal(ours(clip), theirs(clip))


def test_a_tower_of_frames_of_different_sizes_is_told_why() -> None:
    reason = f"_varlen_attn.* its segments have different lengths: {FRAMES * PER_FRAME} tokens in {FRAMES} segments"
    with pytest.raises(NothingToMerge, match=reason):
        apply(Tower("varlen of different lengths"), (rows(),), clip="rows", schedule=[3, 2])
