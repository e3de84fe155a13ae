"""Sums over merged tokens: every value is a density, so every sum over tokens carries the weight of each group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import wide


def _result_dtype(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return x.dtype if dtype is None else dtype


def softmax(x: Tensor, weight: Tensor, *, dim: int, dtype: torch.dtype | None = None, safe: bool = False) -> Tensor:
    """Density softmax `e / sum(weight * e)` with `e = exp(x)`: `weight` tokens of each group share its value.

    `weight` broadcasts to `x`; the result has the shape of `x` and `dtype` (that of `x` if None). Computed in float32.
    `safe`: zeros instead of NaN where all entries are minus infinity.
    """
    out = _result_dtype(x, dtype)
    function = torch._safe_softmax if safe else torch.softmax
    share = function(x.to(wide(out)), dim)
    total = (share * weight).sum(dim, keepdim=True)
    return (share / (total.masked_fill(total == 0, 1) if safe else total)).to(out)


def sum(  # noqa: A001  (named as torch.sum, which it stands for)
    x: Tensor, weight: Tensor, *, dims: Sequence[int], keepdim: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """`sum(weight * x)` over `dims` (all, if empty), computed in float32, as `dtype` (that of `x` if None)."""
    out = _result_dtype(x, dtype)
    return (x.to(wide(out)) * weight).sum(tuple(dims), keepdim=keepdim).to(out)


def mean(
    x: Tensor, weight: Tensor, *, dims: Sequence[int], keepdim: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """`sum(weight * x) / sum(weight)` over `dims` (all, if empty), computed in float32; `dtype` as in `sum`."""
    out = _result_dtype(x, dtype)
    weighted = x.to(wide(out)) * weight
    total = weight.expand_as(weighted).sum(tuple(dims), keepdim=keepdim)
    return (weighted.sum(tuple(dims), keepdim=keepdim) / total).to(out)


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """`x`, each entry as often as `weight` (which broadcasts to it) says: in float32, as the dtype of `x`."""
    return (x.to(wide(x.dtype)) * weight).to(x.dtype)
