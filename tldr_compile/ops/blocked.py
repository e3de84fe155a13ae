"""The provider that never holds a matrix of all pairs: row block by row block, one exponential for both softmaxes.

With `A = softmax(scores)`, the proportional output is `A (m * v) / (A m)`: the masses need no second softmax.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .reference import Gradients, empty_received, empty_results, masked, row_sharpness, wide

# Bytes of one block of scores: small enough for the cache of a CPU, large enough to fill a GPU.
BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 128 << 20}

# As much where every block is spelled out, so that a graph has not too many.
DECOMPOSED_BYTES = 64 << 20

Block = tuple[slice, slice, slice]
"""Samples, all heads, rows: an index into what is laid like the scores `[B, H, Nq, Nk]`."""


def block_bytes(device: torch.device) -> int:
    """What one block of scores on this device may take."""
    return BLOCK_BYTES.get(device.type, BLOCK_BYTES["cuda"])


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, log_mass: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`reference.attention_with_sharpness` for `q [B, H, Nq, d]`, `k [B, H, Nk, d]`, `v [B, H, Nk, c]`."""
    out, sharpness = empty_results(q, v)
    with torch.autocast(q.device.type, enabled=False):
        (queries, keys), values = _widened(q, k, scale), v.to(wide(q.dtype))
        mass = relative_mass(log_mass, queries.dtype)
        for block in _blocks(queries, keys):
            samples, _, rows = block
            attention = _probabilities(queries, keys, mask, block)
            sharpness[samples, rows] = row_sharpness(attention.mean(1))
            out[block] = _proportional(attention, mass, block) @ values[samples]
    return out, sharpness


def backward(
    results: Gradients,
    grad_out: Tensor,
    grad_sharpness: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    log_mass: Tensor | None,
) -> None:
    """Fill `results`, computing each block of scores anew; a bias whose result is empty gets none."""
    with torch.autocast(q.device.type, enabled=False):
        (queries, keys), values = _widened(q, k, scale), v.to(wide(q.dtype))
        mass = relative_mass(log_mass, queries.dtype)
        d_queries, d_keys, d_values, d_mask, d_log_mass = (torch.zeros_like(r, dtype=queries.dtype) for r in results)
        for block in _blocks(queries, keys):
            samples, _, rows = block
            attention = _probabilities(queries, keys, mask, block)
            proportional = _proportional(attention, mass, block)
            d_out = grad_out[block].to(queries.dtype)
            d_values[samples] += proportional.mT @ d_out
            d_scores = _softmax_backward(proportional, d_out @ values[samples].mT)
            _accumulate(d_log_mass, block, d_scores)
            mean = attention.mean(1, keepdim=True)
            d_mean = grad_sharpness[samples, None, rows, None] * _row_sharpness_slope(mean)
            d_scores += _softmax_backward(attention, d_mean / attention.shape[1])
            _accumulate(d_mask, block, d_scores)
            d_queries[block] = d_scores @ keys[samples] * scale
            d_keys[samples] += d_scores.mT @ queries[block]
    for result, gradient in zip(results, (d_queries, d_keys, d_values, d_mask, d_log_mass), strict=True):
        result.copy_(gradient)


def decomposition(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, log_mass: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`forward` as a graph of torch's own operators; its blocks are rows of all samples."""
    (queries, keys), values = _widened(q, k, scale), v.to(wide(q.dtype))
    mass = relative_mass(log_mass, queries.dtype)
    outs, sharpness, whole = [], [], slice(None)
    for rows in _whole_rows(queries, keys):
        block = (whole, whole, rows)
        attention = _probabilities(queries, keys, mask, block)
        sharpness.append(row_sharpness(attention.mean(1)))
        outs.append(_proportional(attention, mass, block) @ values)
    return torch.cat(outs, 2).to(q.dtype), torch.cat(sharpness, 1)


def received(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """`reference.received` for `q [B, H, Nq, d]`, `k [B, H, Nk, d]`."""
    result = empty_received(q, k).zero_()
    with torch.autocast(q.device.type, enabled=False):
        queries, keys = _widened(q, k, scale)
        for block in _blocks(queries, keys):
            result[block[0]] += _probabilities(queries, keys, mask, block).mean(1).sum(1)
    return result.div_(queries.shape[2])


def received_backward(
    results: Sequence[Tensor], grad_received: Tensor, q: Tensor, k: Tensor, scale: float, mask: Tensor | None
) -> None:
    """Fill `results`, the gradients of q, k and mask, as `backward` does."""
    with torch.autocast(q.device.type, enabled=False):
        queries, keys = _widened(q, k, scale)
        d_queries, d_keys, d_mask = (torch.zeros_like(r, dtype=queries.dtype) for r in results)
        d_attention = grad_received[:, None, None] / (queries.shape[1] * queries.shape[2])
        for block in _blocks(queries, keys):
            samples, *_ = block
            d_scores = _softmax_backward(_probabilities(queries, keys, mask, block), d_attention[samples])
            _accumulate(d_mask, block, d_scores)
            d_queries[block] = d_scores @ keys[samples] * scale
            d_keys[samples] += d_scores.mT @ queries[block]
    for result, gradient in zip(results, (d_queries, d_keys, d_mask), strict=True):
        result.copy_(gradient)


def received_decomposition(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """`received` as a graph of torch's own operators."""
    queries, keys = _widened(q, k, scale)
    whole = slice(None)
    parts = [
        _probabilities(queries, keys, mask, (whole, whole, rows)).mean(1).sum(1) for rows in _whole_rows(queries, keys)
    ]
    return torch.stack(parts).sum(0) / queries.shape[2]


def _whole_rows(queries: Tensor, keys: Tensor) -> list[slice]:
    """Rows of all samples, a block at a time."""
    row_bytes = queries.shape[0] * queries.shape[1] * keys.shape[2] * queries.element_size()
    return spans(queries.shape[2], row_bytes)


def spans(rows: int | torch.SymInt, row_bytes: int | torch.SymInt) -> list[slice]:
    """Rows cut into parts that a block of `DECOMPOSED_BYTES` holds at the sizes that a graph is made with."""
    parts = min(_hint(rows), -(-_hint(rows) * _hint(row_bytes) // DECOMPOSED_BYTES))
    count = max(1, parts)  # of an empty batch one, that is empty too
    bounds = [rows * k // count for k in range(count + 1)]
    return [slice(first, last) for first, last in itertools.pairwise(bounds)]


def _hint(size: int | torch.SymInt) -> int:
    return int(size.node.hint or 1) if isinstance(size, torch.SymInt) else size


def _blocks(queries: Tensor, keys: Tensor) -> Iterator[Block]:
    """Some rows of one sample where its scores exceed a block, otherwise as many whole samples as fit."""
    batch, heads, rows, _ = queries.shape
    budget = block_bytes(queries.device)
    row_bytes = max(1, heads * keys.shape[-2] * queries.element_size())
    height = max(1, min(rows, budget // row_bytes))
    depth = max(1, budget // (row_bytes * height)) if height == rows else 1
    for first in range(0, batch, depth):
        for top in range(0, rows, height):
            yield slice(first, first + depth), slice(None), slice(top, top + height)


def _cut(bias: Tensor, block: Block) -> Tensor:
    """The part (a view) of what broadcasts to the scores that broadcasts to this block of them."""
    whole = slice(None)
    parts = zip(bias.shape, block, strict=False)
    return bias[tuple(whole if part == whole or length == 1 else part for length, part in parts)]


def _accumulate(gradient: Tensor, block: Block, d_scores: Tensor) -> None:
    if gradient.numel() > 0:
        part = _cut(gradient, block)
        part += d_scores.sum_to_size(part.shape)


def _widened(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    dtype = wide(q.dtype)
    return q.to(dtype) * scale, k.to(dtype)


def _probabilities(queries: Tensor, keys: Tensor, mask: Tensor | None, block: Block) -> Tensor:
    """`reference.safe_softmax` of the masked scores, with as few passes over memory as no gradients allow."""
    scores = queries[block] @ keys[block[0]].mT
    if mask is None:
        return scores.softmax(-1)
    scores = masked(scores, _cut(mask, block))
    dead = scores.amax(-1, keepdim=True) == -torch.inf
    return scores.softmax(-1).masked_fill_(dead, 0)


def relative_mass(log_mass: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Masses up to one factor per row, which cancels: the largest is 1, so that none overflows."""
    if log_mass is None:
        return None
    log_mass = log_mass.to(dtype)
    return (log_mass - log_mass.amax(-1, keepdim=True).clamp_min(torch.finfo(dtype).min)).exp()


def _proportional(attention: Tensor, mass: Tensor | None, block: Block) -> Tensor:
    """`softmax(scores + log mass)` out of `softmax(scores)`, which is left as it is."""
    if mass is None:
        return attention
    weighted = attention * _cut(mass, block)
    total = weighted.sum(-1, keepdim=True)
    return weighted.div_(total.masked_fill_(total == 0, 1))


def _softmax_backward(probabilities: Tensor, gradient: Tensor) -> Tensor:
    weighted = probabilities * gradient
    return weighted - probabilities * weighted.sum(-1, keepdim=True)


def _row_sharpness_slope(attention: Tensor) -> Tensor:
    """The derivative of `a log a` less 1: a constant along a row is lost in the softmax behind it."""
    return attention.clamp_min(torch.finfo(attention.dtype).tiny).log()
