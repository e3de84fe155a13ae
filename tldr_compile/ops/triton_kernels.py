"""Attention and its sharpness in two Triton kernels that keep the scores on the chip.

The first kernel attends, and leaves of each row its highest score and the sum of exponentials that belongs to it, both
without masses. With these the second makes the attention of every head anew, a tile of pairs through all heads before
the next tile, and sums up the sharpness of their mean. (One number per row, `log sum exp`, would lose the sum where
scores are large, as under a mask that hides every key with the lowest finite number.)

Scores and masks are in units of `log 2`: the chip's exponential is that of 2, and the factor hides in `scale`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocked import empty_results

LOG2_E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)

# Keys whose share of the sharpness one program sums up: so few that the rows of a single clip still fill a GPU.
SPAN = 128


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, log_mass: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`reference.attention_with_sharpness` of what `tiled.fits`; every input is read where it lies."""
    out, sharpness = empty_results(q, v)
    batch, heads, rows, channels = q.shape
    keys, values = v.shape[2:]
    if mask is not None:
        mask = mask.expand(batch, heads, rows, keys)
    if log_mass is not None:
        log_mass = log_mass.expand(batch, heads, 1, keys)
    highest, inverse = q.new_empty(2, batch, heads, rows, dtype=torch.float32)
    shares = q.new_empty(batch, triton.cdiv(keys, SPAN), rows, dtype=torch.float32)
    common: dict[str, Any] = {
        "scale": scale * LOG2_E.value,
        "heads": heads,
        "rows": rows,
        "keys": keys,
        "rows_class": triton.next_power_of_2(rows),
        "keys_class": triton.next_power_of_2(keys),
        "CHANNELS": channels,
        "BLOCK_C": _padded(channels),
        "enable_fp_fusion": True,
        "PRECISION": _precision(),
    }
    pairs = *_placed(q), *_placed(k), *_placed(mask)
    with torch.cuda.device_of(q):
        _attend[lambda tile: (triton.cdiv(rows, tile["BLOCK_M"]) * heads * batch,)](
            *pairs,
            *_placed(log_mass),
            *_placed(v),
            *_placed(out),
            highest,
            inverse,
            VALUES=values,
            BLOCK_V=_padded(values),
            **common,
        )
        _share[lambda tile: (triton.cdiv(rows, tile["BLOCK_M"]) * shares.shape[1] * batch,)](
            *pairs, highest, inverse, shares, SPAN=SPAN, **common
        )
    torch.sum(shares, 1, out=sharpness)
    return out, sharpness


def _placed(tensor: Tensor | None) -> tuple[Tensor | None, tuple[int, ...]]:
    """A tensor `[B, H, N, d]` and its strides, as the kernels take them."""
    return (None, (0, 0, 0, 0)) if tensor is None else (tensor, tensor.stride())


def _precision() -> str:
    """How float32 is multiplied: as the user lets torch do it, or in three parts that together are as exact."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _padded(channels: int) -> int:
    """What a product of tiles takes: a power of two, 16 or more."""
    return max(16, triton.next_power_of_2(channels))


class _Tile(NamedTuple):
    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None
    """The most that a thread may use, where fewer let a second program run beside the first."""


def _tuned(*tiles: _Tile) -> Any:
    """Times the tiles and keeps the fastest, once for all lengths up to the next power of two."""
    configs = [
        triton.Config(
            {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys},
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=tile.registers,
        )
        for tile in tiles
    ]
    return triton.autotune(
        configs,
        key=["rows_class", "keys_class", "CHANNELS"],
        prune_configs_by={"early_config_prune": _worth_timing},
        cache_results=True,
    )


def _worth_timing(configs: list[Any], arguments: Mapping[str, Any], **constants: Any) -> list[Any]:
    """Tiles not much longer than the tokens, whose operands leave room on the chip for what they are multiplied to."""
    size = arguments["q"].element_size()
    most_rows = min(max(64, constants["rows_class"]), 32768 // (constants["BLOCK_C"] * size))
    most_keys = min(max(32, constants["keys_class"]), 256 // size)
    return [c for c in configs if c.kwargs["BLOCK_M"] <= most_rows and c.kwargs["BLOCK_N"] <= most_keys]


# Lengths change from call to call: code is not compiled anew for those that are multiples of 16.
_kernel = triton.jit(do_not_specialize=["heads", "rows", "keys", "rows_class", "keys_class"])


@triton.jit
def _plane(tensor: tl.tensor, strides: tl.tuple, batch: tl.tensor, head: tl.tensor) -> tl.tensor:
    """Where the matrix of one head of one sample begins; in 64 bits, as all offsets: a mask can be large."""
    return tensor + tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]


@triton.jit
def _offset(strides: tl.tuple, row: tl.tensor, column: tl.tensor) -> tl.tensor:
    return row.to(tl.int64)[:, None] * strides[2] + column.to(tl.int64)[None, :] * strides[3]


@triton.jit
def _inside(row: tl.tensor, column: tl.tensor, rows: tl.tensor, columns: tl.tensor) -> tl.tensor:
    return (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def _tile(
    plane: tl.tensor, strides: tl.tuple, row: tl.tensor, column: tl.tensor, rows: tl.tensor, columns: tl.tensor
) -> tl.tensor:
    """The entries of a matrix at `row [M]` and `column [N]`, 0 beyond its ends."""
    return tl.load(plane + _offset(strides, row, column), mask=_inside(row, column, rows, columns), other=0)


@triton.jit
def _scores(
    queries: tl.tensor,
    some_keys: tl.tensor,
    scale: tl.tensor,
    mask: tl.tensor,
    mask_strides: tl.tuple,
    batch: tl.tensor,
    head: tl.tensor,
    row: tl.tensor,
    key: tl.tensor,
    rows: tl.tensor,
    keys: tl.tensor,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    scores = tl.dot(queries, tl.trans(some_keys), input_precision=PRECISION) * scale
    if mask is not None:
        bias = _tile(_plane(mask, mask_strides, batch, head), mask_strides, row, key, rows, keys)
        if bias.dtype == tl.int1:
            scores = tl.where(bias, scores, -INFINITY)
        else:
            natural = bias.to(tl.float32)
            binary = natural * LOG2_E
            # The lowest finite number hides nothing from a row that sees nothing else: it must not become -inf.
            scores += tl.where((binary == -INFINITY) & (natural != -INFINITY), LOWEST, binary)
    return scores


@triton.jit
def _finite(highest: tl.tensor) -> tl.tensor:
    """What to subtract before an exponential: nothing where there is nothing but -inf."""
    return tl.where(highest == -INFINITY, 0.0, highest)


@triton.jit
def _inverse(total: tl.tensor) -> tl.tensor:
    """What makes weights sum to 1, and leaves those of a row without any at zero."""
    return 1.0 / tl.where(total == 0, 1.0, total)


@_tuned(
    *(_Tile(128, 128, 8, 2), _Tile(128, 128, 8, 3), _Tile(128, 64, 8, 3)),
    *(_Tile(128, 64, 4, 3), _Tile(64, 64, 4, 3), _Tile(64, 32, 4, 2)),
)
@_kernel
def _attend(
    q: tl.tensor,
    q_strides: tl.tuple,
    k: tl.tensor,
    k_strides: tl.tuple,
    mask: tl.tensor,
    mask_strides: tl.tuple,
    log_mass: tl.tensor,
    log_mass_strides: tl.tuple,
    v: tl.tensor,
    v_strides: tl.tuple,
    out: tl.tensor,
    out_strides: tl.tuple,
    highest_scores: tl.tensor,
    inverse_totals: tl.tensor,
    scale: tl.tensor,
    heads: tl.tensor,
    rows: tl.tensor,
    keys: tl.tensor,
    rows_class: tl.tensor,
    keys_class: tl.tensor,
    CHANNELS: tl.constexpr,
    VALUES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """A block of rows of one head, key block by key block, relative to the highest score and largest mass so far."""
    row_blocks = tl.cdiv(rows, BLOCK_M)
    row = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    plane = tl.program_id(0) // row_blocks
    batch, head = plane // heads, plane % heads
    channel, value = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_V)
    k = _plane(k, k_strides, batch, head)
    v = _plane(v, v_strides, batch, head)
    if log_mass is not None:
        log_mass = _plane(log_mass, log_mass_strides, batch, head)
    queries = _tile(_plane(q, q_strides, batch, head), q_strides, row, channel, rows, CHANNELS)

    highest = tl.full((BLOCK_M,), -INFINITY, tl.float32)
    heaviest = tl.full((1,), -INFINITY, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighed = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for first in range(0, keys, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        some_keys = _tile(k, k_strides, key, channel, keys, CHANNELS)
        scores = _scores(queries, some_keys, scale, mask, mask_strides, batch, head, row, key, rows, keys, PRECISION)
        scores = tl.where((key < keys)[None, :], scores, -INFINITY)
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - _finite(higher)[:, None])
        decay = tl.exp2(highest - _finite(higher))
        total = total * decay + tl.sum(weights, 1)
        highest = higher
        if VALUES > 0:
            if log_mass is not None:
                masses = tl.load(log_mass + key.to(tl.int64) * log_mass_strides[3], mask=key < keys, other=-INFINITY)
                masses = masses.to(tl.float32) * LOG2_E
                heavier = tl.maximum(heaviest, tl.max(masses, 0))
                weights *= tl.exp2(masses - _finite(heavier))[None, :]
                decay *= tl.exp2(heaviest - _finite(heavier))
                weighed = weighed * decay + tl.sum(weights, 1)
                heaviest = heavier
            some_values = _tile(v, v_strides, key, value, keys, VALUES)
            mixed = tl.dot(
                weights.to(v.dtype.element_ty), some_values, mixed * decay[:, None], input_precision=PRECISION
            )

    place = plane.to(tl.int64) * rows + row
    tl.store(highest_scores + place, _finite(highest), mask=row < rows)
    tl.store(inverse_totals + place, _inverse(total), mask=row < rows)
    if VALUES > 0:
        if log_mass is None:
            weighed = total
        mixed *= _inverse(weighed)[:, None]
        to = _plane(out, out_strides, batch, head) + _offset(out_strides, row, value)
        tl.store(to, mixed.to(out.dtype.element_ty), mask=_inside(row, value, rows, VALUES))


@_tuned(
    *(_Tile(128, 128, 8, 3), _Tile(128, 64, 8, 2, 128), _Tile(128, 64, 8, 3, 128)),
    *(_Tile(64, 64, 4, 3, 128), _Tile(64, 64, 4, 2), _Tile(64, 32, 4, 2)),
)
@_kernel
def _share(
    q: tl.tensor,
    q_strides: tl.tuple,
    k: tl.tensor,
    k_strides: tl.tuple,
    mask: tl.tensor,
    mask_strides: tl.tuple,
    highest_scores: tl.tensor,
    inverse_totals: tl.tensor,
    shares: tl.tensor,
    scale: tl.tensor,
    heads: tl.tensor,
    rows: tl.tensor,
    keys: tl.tensor,
    rows_class: tl.tensor,
    keys_class: tl.tensor,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """What one span of keys adds to the sharpness of a block of rows."""
    row_blocks = tl.cdiv(rows, BLOCK_M)
    row = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    plane = tl.program_id(0) // row_blocks
    spans = tl.cdiv(keys, SPAN)
    batch, span = plane // spans, plane % spans
    channel = tl.arange(0, BLOCK_C)

    share = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(span * SPAN, tl.minimum(span * SPAN + SPAN, keys), BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        mean = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for head in range(heads):
            queries = _tile(_plane(q, q_strides, batch, head), q_strides, row, channel, rows, CHANNELS)
            some_keys = _tile(_plane(k, k_strides, batch, head), k_strides, key, channel, keys, CHANNELS)
            scores = _scores(
                queries, some_keys, scale, mask, mask_strides, batch, head, row, key, rows, keys, PRECISION
            )
            place = (tl.cast(batch, tl.int64) * heads + head) * rows + row
            highest = tl.load(highest_scores + place, mask=row < rows, other=0.0)
            inverse = tl.load(inverse_totals + place, mask=row < rows, other=0.0)
            mean += tl.exp2(scores - highest[:, None]) * inverse[:, None]
        mean = tl.where((key < keys)[None, :], mean / heads, 0.0)
        share += tl.sum(mean * tl.log(tl.maximum(mean, TINY)), 1)
    tl.store(shares + plane.to(tl.int64) * rows + row, share, mask=row < rows)
