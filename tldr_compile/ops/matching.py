"""Matching without the matrix of all similarities: block of sources by block of sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import tiled
from .blocked import block_bytes, spans
from .providers import Provider, Providers, everything
from .reference import empty_match, unit
from .transforms import folded


def match(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Step 5, bipartite matching: the similarity and the index of the best destination of every source.

    ToMe's bipartite soft matching (arXiv 2210.09461, section 3), which vid-TLDR keeps: tokens at even positions are
    sources, those at odd ones destinations. `reference.match` is the specification; this has no gradients.

    `metric [B, N, C]`, float, `N >= 2`, to similarity (float32, float64 of float64) and destination (int64), both
    `[B, ceil(N/2)]`. Raises IndexError for one token, which has no other.

    >>> similarity, destination = ops.match(torch.randn(2, 1568, 768))
    >>> similarity.shape, destination.shape
    (torch.Size([2, 784]), torch.Size([2, 784]))
    """
    similarity, destination = MATCH(metric.detach())
    return similarity, destination


@torch.library.custom_op("tldr::match", mutates_args=())
def _match(metric: Tensor) -> tuple[Tensor, Tensor]:
    return MATCH.run(metric)


@_match.register_fake
def _match_fake(metric: Tensor) -> tuple[Tensor, Tensor]:
    return empty_match(metric)


@torch.library.custom_op("tldr::best", mutates_args=())
def _best(sources: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    """For `sources [B, S, C]` the largest product with one of `destinations [B, D, C]`, and the first that has it."""
    products, index = _best_fake(sources, destinations)
    row_bytes = sources.shape[0] * destinations.shape[1] * sources.element_size()
    height = max(1, block_bytes(sources.device) // max(1, row_bytes))
    for first in range(0, sources.shape[1], height):
        rows = slice(first, first + height)
        torch.max(sources[:, rows] @ destinations.mT, -1, out=(products[:, rows], index[:, rows]))
    return products, index


@torch.library.triton_op("tldr::tiled_match", mutates_args=())
def _tiled_match(metric: Tensor) -> tuple[Tensor, Tensor]:
    """A compiler sees the kernel in it, and needs no Python to call it."""
    return tiled.match(metric)


def _blocked(metric: Tensor) -> tuple[Tensor, Tensor]:
    """A compiler sees the norms, which it makes one with what comes before."""
    tokens = unit(metric)
    similarity, destination = torch.ops.tldr.best(tokens[:, ::2], tokens[:, 1::2])
    return similarity, destination


def _decomposition(metric: Tensor) -> tuple[Tensor, Tensor]:
    tokens = unit(metric)
    sources, destinations = tokens[:, ::2], tokens[:, 1::2].mT
    row_bytes = destinations.shape[0] * destinations.shape[2] * tokens.element_size()
    parts = [(sources[:, rows] @ destinations).max(-1) for rows in spans(sources.shape[1], row_bytes)]
    products, index = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    return products, index


@_best.register_fake
def _best_fake(sources: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    return sources.new_empty(sources.shape[:2]), sources.new_empty(sources.shape[:2], dtype=torch.int64)


for _each in ("match", "best", "tiled_match"):
    torch.library.register_vmap(f"tldr::{_each}", folded(getattr(torch.ops.tldr, _each)))


@register_flop_formula(torch.ops.tldr.best)
def _best_flop(sources: Sequence[int], destinations: Sequence[int], *args: Any, **kwargs: Any) -> int:
    batch, rows, channels = sources
    return 2 * batch * rows * destinations[1] * channels


@register_flop_formula([torch.ops.tldr.match, torch.ops.tldr.tiled_match])
def _match_flop(metric: Sequence[int], *args: Any, **kwargs: Any) -> int:
    batch, tokens, channels = metric
    return 2 * batch * ((tokens + 1) // 2) * (tokens // 2) * channels


MATCH: Providers[..., tuple[Tensor, Tensor]] = Providers(
    "match",
    torch.ops.tldr.match,
    _match_fake,
    [
        Provider("tiled", tiled.serves_match, torch.ops.tldr.tiled_match, visible=True),
        Provider("blocked", everything, _blocked, visible=True),
    ],
    _decomposition,
)
