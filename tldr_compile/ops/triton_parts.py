"""What all Triton kernels share: their tiles, how they are launched, and the pieces that they are made of."""

# mypy: disable-error-code=no-untyped-def
# Kernels are written in Triton's language: what they take is said where they are launched.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


class Tile(NamedTuple):
    """Rows and keys that a program holds at a time, its warps, and how many loads of keys are under way."""

    rows: int
    keys: int
    warps: int
    stages: int


def attend_tile(channels: int, size: int) -> Tile:
    """For heads of `channels` (padded) in numbers of `size` bytes: the fastest on an H200 in half precision, of 64
    and 128 channels (`benchmarks/results/gpu-tiles.json`); other tiles are small enough to fit, and not measured.

    A table, since timing at the first call costs seconds, differs from run to run and cannot be done while a graph is
    captured.
    """
    if size > 2 or channels > 128:
        return Tile(64, 32, 4, 2)
    return Tile(128, 64, 8, 3) if channels > 64 else Tile(64, 64, 4, 3)


def share_tile(channels: int, size: int) -> Tile:
    """As `attend_tile`."""
    return Tile(64, 32, 4, 2) if size > 2 or channels > 128 else Tile(64, 64, 4, 3)


def match_tile(size: int) -> Tile:
    """As `attend_tile`, of sources and destinations."""
    return Tile(64, 64, 4, 3) if size > 2 else Tile(128, 128, 8, 3)


def wrapped(kernel: Any) -> Any:
    """What a compiled graph sees of a kernel; the interpreter, which no graph holds, takes it as it is."""
    return wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel


def common(q: Tensor, tile: Tile) -> dict[str, Any]:
    """What every kernel is launched with."""
    return {
        "BLOCK_C": padded(q.shape[-1]),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        "EXACT": torch.backends.cuda.matmul.fp32_precision != "tf32",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def padded(channels: int) -> int:
    """What a product of tiles takes: a power of two, 16 or more."""
    return max(16, triton.next_power_of_2(channels))


@triton.jit
def _plane(tensor, batch_stride, head_stride, batch, head):
    """Where the matrix of one head of one sample begins; in 64 bits, as all offsets: a mask can be large."""
    return tensor + tl.cast(batch, tl.int64) * batch_stride + tl.cast(head, tl.int64) * head_stride


@triton.jit
def _places(plane, row, row_stride, column, column_stride):
    """Where the entries of a matrix at `row [M]` and `column [N]` lie."""
    return plane + row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride


@triton.jit
def _product(a, b, total, EXACT: tl.constexpr):
    """float32 is multiplied as the user lets torch do it, or in three parts that together are as exact."""
    if EXACT:
        return tl.dot(a, b, total, input_precision="tf32x3")
    return tl.dot(a, b, total, input_precision="tf32")
