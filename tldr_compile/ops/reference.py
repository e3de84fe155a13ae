"""Steps 1 to 5 of vid-TLDR (arXiv 2403.13347, section 3) in plain PyTorch: the specification of every provider."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which attention, matching and merging of `dtype` are computed: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """`scores` under a mask that broadcasts to them: bool (True keeps) or additive."""
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(mask.logical_not(), -torch.inf)
    return scores + mask.to(scores.dtype)


def safe_softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension; a row masked throughout gives zeros, and zero gradients, instead of NaN."""
    dead = scores.amax(-1, keepdim=True) == -torch.inf
    return scores.masked_fill(dead, 0).softmax(-1).masked_fill(dead, 0)


def row_sharpness(attention: Tensor) -> Tensor:
    """Step 2: `s_i = sum_j A_ij log A_ij` with `0 log 0 = 0`; `[..., Nq, Nk]` to `[..., Nq]`.

    The clamp keeps the gradient finite at 0; what it changes lies below the smallest normal number.
    """
    return (attention * attention.clamp_min(torch.finfo(attention.dtype).tiny).log()).sum(-1)


def sharpness_of(probabilities: Tensor) -> Tensor:
    """The sharpness of an attention whose matrix is at hand: `[..., H, Nq, Nk]` to `[..., Nq]`.

    In float32 (float64 of float64). Rows may have any positive sum: a softmax that mass has weighed has another than 1.
    """
    rows = probabilities.to(wide(probabilities.dtype))
    total = rows.sum(-1, keepdim=True)
    return row_sharpness((rows / total.clamp_min(torch.finfo(rows.dtype).tiny)).mean(-3))


def attention_with_sharpness(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None, log_mass: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Steps 1, 2 and 7 with every matrix materialised.

    `q [..., H, Nq, d]`, `k [..., H, Nk, d]`, `v [..., H, Nk, c]`; `mask` and `log_mass` broadcast to the scores
    `[..., H, Nq, Nk]`. Gives the output `[..., H, Nq, c]` in the dtype of `q`, and the sharpness `[..., Nq]` in float32
    (float64 of float64). `mask` enters both, `log_mass` only the output.
    """
    dtype = wide(q.dtype)
    scores = masked((q.to(dtype) * scale) @ k.to(dtype).mT, mask)
    sharpness = row_sharpness(safe_softmax(scores).mean(-3))
    proportional = scores if log_mass is None else scores + log_mass.to(dtype)
    return (safe_softmax(proportional) @ v.to(dtype)).to(q.dtype), sharpness


def shift(after: Tensor, before: Tensor) -> Tensor:
    """How a layer moved its tokens: the difference, in float32 (float64 of float64)."""
    dtype = wide(after.dtype)
    return after.to(dtype) - before.to(dtype)


# Below this part of the largest magnitude differences of sharpness are no differences. Sharpness is a sum of products
# of float32 (section 2), so its rounding is some units of its magnitude; scaled to [0, 1], it would become weights.
FLOOR = 4096 * torch.finfo(torch.float32).eps


def saliency(sharpness: Tensor) -> Tensor:
    """Steps 3 and 4: `[B, N]` to `[B, N]` in [0, 1], 0 on the background; ones where all of a sample are equal.

    Equal is what differs by less than `FLOOR` of the largest magnitude, in float64 too. The scaling of step 3 cancels
    in step 4, so only the shift by the smallest is left: it makes equal values exactly 0.
    """
    shifted = sharpness - sharpness.amin(-1, keepdim=True)
    above = shifted - shifted.mean(-1, keepdim=True)
    top = above.amax(-1, keepdim=True)
    noise = FLOOR * sharpness.detach().abs().amax(-1, keepdim=True)
    flat = (shifted.amax(-1, keepdim=True) <= noise) | (top <= 0)
    return torch.where(flat, 1.0, above.clamp_min(0) / torch.where(flat, 1.0, top))


def unit(metric: Tensor) -> Tensor:
    """Vectors `[..., C]` of length 1, a zero vector as it is, in float32 (float64 of float64)."""
    metric = metric.to(wide(metric.dtype))
    return metric / metric.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(metric.dtype).tiny)


def match(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Step 5, bipartite matching: the similarity and the index of the best destination of every source.

    `metric [B, N, C]`, `N >= 2`; even positions are sources, odd ones destinations; gives float32 and int64, both
    `[B, ceil(N/2)]`. Similarity is the cosine, 0 of a zero vector. Between equals the first wins.
    """
    tokens = unit(metric)
    similarity, destination = (tokens[:, ::2] @ tokens[:, 1::2].mT).max(-1)
    return similarity, destination
