"""Matching in a Triton kernel that keeps the similarities on the chip."""

# mypy: disable-error-code=no-untyped-def
# Kernels are written in Triton's language: what they take is said where they are launched.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_parts as parts
from .triton_parts import TINY, _places, _plane, _product

# Destinations among which one program looks for the best: so few that the sources of a single clip still fill a GPU.
SPAN = 256


def match(metric: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.match` of a metric in float32 or less; lengths divide the products, so that nothing is laid anew."""
    batch, tokens, channels = metric.shape
    inverse_norm = 1 / metric.float().norm(dim=-1).clamp_min(TINY.value)
    sources, spans = (tokens + 1) // 2, triton.cdiv(tokens // 2, SPAN)
    tile = parts.match_tile(metric.element_size())
    products = metric.new_empty(batch, spans, sources, dtype=torch.float32)
    places = metric.new_empty(batch, spans, sources, dtype=torch.int32)
    parts.wrapped(_match)[(triton.cdiv(sources, tile.rows) * spans * batch,)](
        metric,
        inverse_norm,
        products,
        places,
        *metric.stride(),
        tokens,
        channels,
        SPAN=SPAN,
        **{**parts.common(metric, tile), "BLOCK_C": 64 if metric.element_size() == 2 else 32},
    )
    best = products.amax(1)
    # Between equals the first wins; what is no number is equal to nothing, and joins a token all the same.
    place = places.masked_fill(products != best.unsqueeze(1), tokens // 2 - 1).amin(1)
    return best, place.to(torch.int64)


@triton.jit
def _match(
    metric,
    inverse_norm,
    best_products,
    best_places,
    metric_batch,
    metric_row,
    metric_channel,
    tokens,
    channels,
    EXACT: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The best of one span of destinations for a block of sources; what is half precision is multiplied exactly."""
    sources, destinations = (tokens + 1) // 2, tokens // 2
    row_blocks = tl.cdiv(sources, BLOCK_M)
    row = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    plane = tl.program_id(0) // row_blocks
    spans = tl.cdiv(destinations, SPAN)
    batch, span = plane // spans, plane % spans
    channel = tl.arange(0, BLOCK_C)
    metric = _plane(metric, metric_batch, 0, batch, 0)
    inverse_norm = inverse_norm + tl.cast(batch, tl.int64) * tokens
    even = 2 * tl.minimum(row, sources - 1)
    source_places = _places(metric, even, metric_row, channel, metric_channel)

    best = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    place = tl.zeros((BLOCK_M,), tl.int32)
    for first in range(span * SPAN, tl.minimum(span * SPAN + SPAN, destinations), BLOCK_N):
        destination = first + tl.arange(0, BLOCK_N)
        odd = 2 * tl.minimum(destination, destinations - 1) + 1
        odd_places = _places(metric, odd, metric_row, channel, metric_channel)
        products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for some in range(0, channels, BLOCK_C):
            offset = tl.cast(some, tl.int64) * metric_channel
            inside = (channel < channels - some)[None, :]
            left = tl.load(source_places + offset, mask=inside, other=0)
            right = tl.load(odd_places + offset, mask=inside, other=0)
            products = _product(left, tl.trans(right), products, EXACT)
        products *= tl.load(inverse_norm + odd)[None, :]
        products = tl.where((destination < destinations)[None, :], products, -float("inf"))
        highest, which = tl.max(products, 1, return_indices=True)
        place = tl.where(highest > best, first + which, place)
        best = tl.maximum(best, highest)
    to = plane.to(tl.int64) * sources + row
    tl.store(best_products + to, best * tl.load(inverse_norm + even), mask=row < sources)
    tl.store(best_places + to, place, mask=row < sources)
