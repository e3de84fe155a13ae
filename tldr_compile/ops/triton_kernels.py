"""Attention with masses, and with its sharpness, in Triton kernels that keep the scores on the chip.

`_attend` attends. Where the sharpness is asked for it leaves of each row its highest score and the inverse of the sum
of exponentials that belongs to it, both without masses. With these `_share` makes the attention of every head anew, a
tile of pairs through all heads before the next tile, and sums up the sharpness of their mean. (One number per row,
`log sum exp`, would lose the sum where scores are large, as under a mask that hides every key with the lowest finite
number.)

Scores, masks and masses are in units of `log 2`: the chip's exponential is that of 2, and the factor hides in `scale`.
"""

# mypy: disable-error-code=no-untyped-def
# Kernels are written in Triton's language: what they take is said where they are launched.

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from . import triton_parts as parts
from .triton_parts import TINY, _places, _plane, _product

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)

NO_MASK, BOOL_MASK, ADDITIVE_MASK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# Where the masses are: nowhere; in the scores, as channels of the keys; or in the values, and once more beside them.
NO_MASS, IN_SCORES, IN_VALUES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# The least that a product of tiles takes.
COLUMNS = tl.constexpr(16)

# Of scores, so that masses in their unit are no infinities in half precision.
SMALLEST_SCALE = 2.0**-10

# Keys whose share of the sharpness one program sums up: so few that the rows of a single clip still fill a GPU.
SPAN = 128

Strides = tuple[int, int, int, int]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, log_mass: Tensor | None) -> Tensor:
    """The output of `reference.attention_with_sharpness` alone; every input is read where it lies."""
    q, scale = _upright(q, scale)
    if log_mass is None:
        return _launch_attend(q, k, v, None, NO_MASS, scale, mask)
    relative = _relative(log_mass, q, k)
    if scale < SMALLEST_SCALE:
        return _launch_attend(q, k, *_weighed(v, relative), IN_VALUES, scale, mask)
    return _launch_attend(q, k, v, _channels(relative / scale, q.dtype), IN_SCORES, scale, mask)


def attend_and_sharpness(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, log_mass: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`reference.attention_with_sharpness` of what `tiled.fits`; every input is read where it lies."""
    q, scale = _upright(q, scale)
    highest = q.new_empty(q.shape[:3], dtype=torch.float32)
    inverse = None if mask is None else torch.empty_like(highest)
    columns, kind = None, NO_MASS
    if log_mass is not None:
        v, columns = _weighed(v, _relative(log_mass, q, k))
        kind = IN_VALUES
    out = _launch_attend(q, k, v, columns, kind, scale, mask, highest, inverse)
    return out, share(q, k, scale, mask, highest, inverse)


def _relative(log_mass: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """`[B, H or 1, Nk]`, float32: masses up to one factor per head, which cancels, so that none overflows."""
    log_mass = log_mass.to(torch.float32).expand(q.shape[0], -1, 1, k.shape[2]).squeeze(2)
    return log_mass - log_mass.amax(-1, keepdim=True).clamp_min(LOWEST.value)


def _channels(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """`bias [..., N]` as columns `[..., N, 16]` of `dtype` whose sum is as exact as float32."""
    columns = []
    for _ in range(3):
        columns.append(bias.to(dtype))
        bias = torch.where(bias.isinf(), 0, bias - columns[-1].to(bias.dtype))
    return F.pad(torch.stack(columns, -1), (0, COLUMNS.value - 3))


def _weighed(v: Tensor, relative: Tensor) -> tuple[Tensor, Tensor]:
    """Values times their mass, and the masses as a column of the values' dtype beside zeros: `[..., N, 16]`."""
    mass = relative.exp().to(v.dtype).unsqueeze(-1)
    return v * mass, F.pad(mass, (0, COLUMNS.value - 1))


def _launch_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: Tensor | None,
    mass: tl.constexpr,
    scale: float,
    mask: Tensor | None,
    highest: Tensor | None = None,
    inverse: Tensor | None = None,
) -> Tensor:
    """The output; `highest` and `inverse` are filled, if they are there."""
    batch, heads, rows, channels = q.shape
    keys, values = v.shape[2:]
    # Heads lie next to channels in memory, as the fused operator leaves them: models join the two next.
    out = q.new_empty(batch, rows, heads, values)
    tile = parts.attend_tile(max(parts.padded(channels), parts.padded(values)), q.element_size())
    masked, mask_strides, kind = _mask(mask, q, k)
    column_strides = (0, 0)
    if columns is not None:
        column_strides = (columns.stride(0), columns.stride(1) if columns.shape[1] == heads else 0)
    parts.wrapped(_attend)[(triton.cdiv(rows, tile.rows) * heads * batch,)](
        q,
        k,
        v,
        masked,
        q if columns is None else columns,
        out,
        out if highest is None else highest,
        out if inverse is None else inverse,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *mask_strides,
        *column_strides,
        scale * LOG2_E.value,
        heads,
        rows,
        keys,
        MASK=kind,
        MASS=mass.value,
        TOTALS=highest is not None,
        CHANNELS=channels,
        VALUES=values,
        BLOCK_V=parts.padded(values),
        **parts.common(q, tile),
    )
    return out.transpose(1, 2)


def share(q: Tensor, k: Tensor, scale: float, mask: Tensor | None, highest: Tensor, inverse: Tensor | None) -> Tensor:
    """`[B, Nq]` of attention whose rows have this highest score and this inverse of their sum (1 if None)."""
    batch, heads, rows, channels = q.shape
    keys = k.shape[2]
    tile = parts.share_tile(parts.padded(channels), q.element_size())
    spans = triton.cdiv(keys, SPAN)
    shares = q.new_empty(batch, spans, rows, dtype=torch.float32)
    masked, mask_strides, kind = _mask(mask, q, k)
    parts.wrapped(_share)[(triton.cdiv(rows, tile.rows) * spans * batch,)](
        q,
        k,
        masked,
        highest,
        highest if inverse is None else inverse,
        shares,
        *q.stride(),
        *k.stride(),
        *mask_strides,
        scale * LOG2_E.value,
        math.log2(heads),
        heads,
        rows,
        keys,
        MASK=kind,
        CHANNELS=channels,
        SPAN=SPAN,
        **parts.common(q, tile),
    )
    return shares.sum(1)


def _upright(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores with a scale that is not negative: the highest product is then the highest score."""
    return (-q, -scale) if scale < 0 else (q, scale)


def _mask(mask: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor, Strides, int]:
    """The mask laid like the scores `[B, H, Nq, Nk]`, its strides, and its kind."""
    if mask is None:
        return q, (0, 0, 0, 0), NO_MASK.value
    mask = mask.expand(*q.shape[:3], k.shape[2])
    batch, head, row, key = mask.stride()
    return mask, (batch, head, row, key), BOOL_MASK.value if mask.dtype == torch.bool else ADDITIVE_MASK.value


if triton.knobs.runtime.interpret:

    @triton.jit
    def _log2(x):
        return tl.log2(x)

else:

    @triton.jit
    def _log2(x):
        """The chip's own, exact to 22 bits behind the point: Triton's is some twenty operations."""
        return libdevice.fast_log2f(x)


@triton.jit
def _load(places, row, rows, column, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """Entries of a matrix, 0 beyond its ends, which only a `TAIL` of rows and a padded block of columns reach."""
    if TAIL:
        if COLUMNS == BLOCK:
            return tl.load(places, mask=(row < rows)[:, None], other=0)
        return tl.load(places, mask=(row < rows)[:, None] & (column < COLUMNS)[None, :], other=0)
    if COLUMNS == BLOCK:
        return tl.load(places)
    return tl.load(places, mask=(column < COLUMNS)[None, :], other=0)


@triton.jit
def _biased(scores, places, row, rows, key, keys, MASK: tl.constexpr):
    bias = tl.load(places, mask=(row < rows)[:, None] & (key < keys)[None, :], other=0)
    if MASK == BOOL_MASK:
        return tl.where(bias != 0, scores, -float("inf"))
    natural = bias.to(tl.float32)
    binary = natural * LOG2_E
    # The lowest finite number hides nothing from a row that sees nothing else: it must not become -inf.
    return scores + tl.where((binary == -float("inf")) & (natural != -float("inf")), LOWEST, binary)


@triton.jit
def _finite(highest):
    """What to subtract before an exponential: nothing where there is nothing but -inf."""
    return tl.where(highest == -float("inf"), 0.0, highest)


@triton.jit
def _inverse(total):
    """What makes weights sum to 1, and leaves those of a row without any at zero."""
    return 1.0 / tl.where(total == 0, 1.0, total)


@triton.jit
def _step(
    state,
    first,
    queries,
    k_places,
    v_places,
    mask_places,
    column_places,
    k_stride,
    v_stride,
    mask_stride,
    scale,
    row,
    rows,
    keys,
    MASK: tl.constexpr,
    MASS: tl.constexpr,
    TOTALS: tl.constexpr,
    CHANNELS: tl.constexpr,
    VALUES: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
):
    """A block of keys for a block of rows, relative to the highest score so far."""
    highest, total, mixed, weighed = state
    key = first + tl.arange(0, BLOCK_N)
    channel, value, column = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_V), tl.arange(0, COLUMNS)
    offset = tl.cast(first, tl.int64)
    some_keys = _load(k_places + offset * k_stride, key, keys, channel, CHANNELS, BLOCK_C, TAIL)
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if MASS != NO_MASS:
        columns = _load(column_places + offset * COLUMNS, key, keys, column, COLUMNS, COLUMNS, TAIL)
    if MASS == IN_SCORES:
        ones = tl.full((BLOCK_M, COLUMNS), 1.0, queries.dtype)
        products = _product(ones, tl.trans(columns), products, EXACT)
    products = _product(queries, tl.trans(some_keys), products, EXACT)
    if MASK == NO_MASK and not TAIL:
        # One operation per score, a product and a difference, where a mask needs two.
        higher = tl.maximum(highest, tl.max(products, 1) * scale)
        weights = tl.exp2(products * scale - _finite(higher)[:, None])
    else:
        scores = products * scale
        if MASK != NO_MASK:
            scores = _biased(scores, mask_places + offset * mask_stride, row, rows, key, keys, MASK)
        if TAIL:
            scores = tl.where((key < keys)[None, :], scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - _finite(higher)[:, None])
    decay = tl.exp2(highest - _finite(higher))
    if TOTALS or MASS != IN_VALUES:
        total = total * decay + tl.sum(weights, 1)
    if VALUES > 0:
        some_values = _load(v_places + offset * v_stride, key, keys, value, VALUES, BLOCK_V, TAIL)
        weights = weights.to(some_values.dtype)
        mixed = _product(weights, some_values, mixed * decay[:, None], EXACT)
        if MASS == IN_VALUES:
            weighed = _product(weights, columns, weighed * decay[:, None], EXACT)
    return higher, total, mixed, weighed


@triton.jit
def _attend(
    q,
    k,
    v,
    mask,
    columns,
    out,
    highest_scores,
    inverse_totals,
    q_batch,
    q_head,
    q_row,
    q_channel,
    k_batch,
    k_head,
    k_row,
    k_channel,
    v_batch,
    v_head,
    v_row,
    v_channel,
    mask_batch,
    mask_head,
    mask_row,
    mask_key,
    columns_batch,
    columns_head,
    scale,
    heads,
    rows,
    keys,
    MASK: tl.constexpr,
    MASS: tl.constexpr,
    TOTALS: tl.constexpr,
    CHANNELS: tl.constexpr,
    VALUES: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block of rows of one head, key block by key block."""
    scale = tl.cast(scale, tl.float32)  # a compiled graph hands numbers over in double precision
    row_blocks = tl.cdiv(rows, BLOCK_M)
    row = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    plane = tl.program_id(0) // row_blocks
    batch, head = plane // heads, plane % heads
    channel, value, key = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    q_places = _places(_plane(q, q_batch, q_head, batch, head), row, q_row, channel, q_channel)
    k_places = _places(_plane(k, k_batch, k_head, batch, head), key, k_row, channel, k_channel)
    v_places = _places(_plane(v, v_batch, v_head, batch, head), key, v_row, value, v_channel)
    mask_places = _places(_plane(mask, mask_batch, mask_head, batch, head), row, mask_row, key, mask_key)
    column_places = _places(
        _plane(columns, columns_batch, columns_head, batch, head), key, COLUMNS, tl.arange(0, COLUMNS), 1
    )
    queries = _load(q_places, row, rows, channel, CHANNELS, BLOCK_C, True)

    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    weighed = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    whole = keys // BLOCK_N * BLOCK_N
    for first in range(0, whole, BLOCK_N):
        highest, total, mixed, weighed = _step(
            (highest, total, mixed, weighed), first, queries, k_places, v_places, mask_places, column_places,
            k_row, v_row, mask_key, scale, row, rows, keys,
            MASK, MASS, TOTALS, CHANNELS, VALUES, EXACT, BLOCK_C, BLOCK_V, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
    if whole < keys:
        highest, total, mixed, weighed = _step(
            (highest, total, mixed, weighed), whole, queries, k_places, v_places, mask_places, column_places,
            k_row, v_row, mask_key, scale, row, rows, keys,
            MASK, MASS, TOTALS, CHANNELS, VALUES, EXACT, BLOCK_C, BLOCK_V, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip

    if TOTALS:
        place = plane.to(tl.int64) * rows + row
        if MASK == NO_MASK:
            tl.store(highest_scores + place, _finite(highest) + _log2(total), mask=row < rows)
        else:
            tl.store(highest_scores + place, _finite(highest), mask=row < rows)
            tl.store(inverse_totals + place, _inverse(total), mask=row < rows)
    if VALUES > 0:
        if MASS == IN_VALUES:
            total = tl.sum(weighed, 1)
        mixed *= _inverse(total)[:, None]
        to = _places(
            out + plane // heads * tl.cast(heads, tl.int64) * rows * VALUES + head * VALUES,
            row,
            heads * VALUES,
            value,
            1,
        )
        tl.store(to, mixed.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (value < VALUES)[None, :])


@triton.jit
def _share(
    q,
    k,
    mask,
    highest_scores,
    inverse_totals,
    shares,
    q_batch,
    q_head,
    q_row,
    q_channel,
    k_batch,
    k_head,
    k_row,
    k_channel,
    mask_batch,
    mask_head,
    mask_row,
    mask_key,
    scale,
    log_heads,
    heads,
    rows,
    keys,
    MASK: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPAN: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What one span of keys adds to the sharpness of a block of rows."""
    scale, log_heads = tl.cast(scale, tl.float32), tl.cast(log_heads, tl.float32)  # as above
    row_blocks = tl.cdiv(rows, BLOCK_M)
    row = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    plane = tl.program_id(0) // row_blocks
    spans = tl.cdiv(keys, SPAN)
    batch, span = plane // spans, plane % spans
    channel = tl.arange(0, BLOCK_C)
    # Beyond the ends the last row and key are read again, and their results dropped.
    near = tl.minimum(row, rows - 1)
    q_places = _places(_plane(q, q_batch, q_head, batch, 0), near, q_row, channel, q_channel)
    mask = _plane(mask, mask_batch, mask_head, batch, 0)
    totals = tl.cast(batch, tl.int64) * heads * rows + near

    # With `summed` the sum of the heads, `mean log mean = summed (log summed - log heads) / heads`.
    share = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(span * SPAN, tl.minimum(span * SPAN + SPAN, keys), BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        within = tl.minimum(key, keys - 1)
        k_places = _places(_plane(k, k_batch, k_head, batch, 0), within, k_row, channel, k_channel)
        mask_places = _places(mask, near, mask_row, within, mask_key)
        summed = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        highest = tl.load(highest_scores + totals)
        for head in range(heads):
            offset = tl.cast(head, tl.int64)
            # Read before it is needed: this load does not wait in the queue of the others.
            next_highest = tl.load(highest_scores + totals + tl.minimum(offset + 1, heads - 1) * rows)
            queries = _load(q_places + offset * q_head, near, rows, channel, CHANNELS, BLOCK_C, False)
            some_keys = _load(k_places + offset * k_head, within, keys, channel, CHANNELS, BLOCK_C, False)
            scores = _product(queries, tl.trans(some_keys), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), EXACT) * scale
            if MASK == NO_MASK:
                summed += tl.exp2(scores - highest[:, None])
            else:
                scores = _biased(scores, mask_places + offset * mask_head, row, rows, key, keys, MASK)
                inverse = tl.load(inverse_totals + totals + offset * rows)
                summed += tl.exp2(scores - highest[:, None]) * inverse[:, None]
            highest = next_highest
        summed = tl.where((key < keys)[None, :], summed, 0.0)
        share += tl.sum(summed * (_log2(tl.maximum(summed, TINY)) - log_heads), 1)
    tl.store(shares + plane.to(tl.int64) * rows + row, share / (heads * LOG2_E), mask=row < rows)
