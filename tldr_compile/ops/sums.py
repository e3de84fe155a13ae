"""Sums over merged tokens: every value is a density, so every sum over tokens carries the weight of each group.

All take `x`, a float of any shape, and `weight`, a float that broadcasts to it; otherwise they raise RuntimeError.
For softmax this is ToMe's proportional attention (arXiv 2210.09461, section 3); the others follow from the same.
"""

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

    >>> ops.softmax(torch.randn(2, 12, 196, 100), torch.ones(2, 1, 1, 100), dim=-1).shape
    torch.Size([2, 12, 196, 100])
    >>> ops.softmax(torch.zeros(2), torch.tensor([3.0, 1.0]), dim=0)  # 3 tokens and 1, with a quarter each
    tensor([0.2500, 0.2500])
    """
    out = _result_dtype(x, dtype)
    function = torch._safe_softmax if safe else torch.softmax
    share = function(x.to(wide(out)), dim)
    total = (share * weight).sum(dim, keepdim=True)
    return (share / (total.masked_fill(total == 0, 1) if safe else total)).to(out)


def sum(  # noqa: A001  (named as torch.sum, which it stands for)
    x: Tensor, weight: Tensor, *, dims: Sequence[int], keepdim: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """`sum(weight * x)` over `dims` (all, if empty), computed in float32, as `dtype` (that of `x` if None).

    >>> ops.sum(torch.randn(2, 800, 768), torch.ones(2, 800, 1), dims=(1,)).shape
    torch.Size([2, 768])
    >>> ops.sum(torch.tensor([1.0, 5.0]), torch.tensor([3.0, 1.0]), dims=(0,))
    tensor(8.)
    """
    out = _result_dtype(x, dtype)
    return (x.to(wide(out)) * weight).sum(tuple(dims), keepdim=keepdim).to(out)


def mean(
    x: Tensor, weight: Tensor, *, dims: Sequence[int], keepdim: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """`sum(weight * x) / sum(weight)` over `dims` (all, if empty), computed in float32; `dtype` as in `sum`.

    >>> ops.mean(torch.randn(2, 800, 768), torch.ones(2, 800, 1), dims=(1,), keepdim=True).shape
    torch.Size([2, 1, 768])
    >>> ops.mean(torch.tensor([1.0, 5.0]), torch.tensor([3.0, 1.0]), dims=(0,))
    tensor(2.)
    """
    out = _result_dtype(x, dtype)
    weighted = x.to(wide(out)) * weight
    total = weight.expand_as(weighted).sum(tuple(dims), keepdim=keepdim)
    return (weighted.sum(tuple(dims), keepdim=keepdim) / total).to(out)


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """`x`, each entry as often as `weight` says: in float32, as the dtype of `x`.

    >>> ops.multiply(torch.randn(2, 800, 768).half(), torch.ones(2, 800, 1)).dtype
    torch.float16
    """
    return (x.to(wide(x.dtype)) * weight).to(x.dtype)
