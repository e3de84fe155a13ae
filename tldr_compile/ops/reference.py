"""Steps 1 to 5 and 7 of vid-TLDR (arXiv 2403.13347, section 3) in plain PyTorch: the specification of every provider.

    1  attention    A = mean over heads of softmax(scale q k')
    2  sharpness    s_i = sum_j A_ij log A_ij
    3  scaling      s to [0, 1] in every sample
    4  saliency     what lies above the mean, as a share of the largest; the background has none
    5  matching     every source to the destination that is most like it
    6  merging      the mean of each group, weighed by mass; sources by their saliency too
    7  attention    keys count with the mass of their group

`empty_...` are the results of a function that is not computed: shapes, dtypes, and strides, for fake kernels.
"""

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
    """Step 2 of an attention whose matrix is at hand: `[..., H, Nq, Nk]`, float, to its sharpness `[..., Nq]`.

    In float32 (float64 of float64). Rows may have any positive sum: a softmax that mass has weighed has another than 1.

    >>> ops.sharpness_of(torch.rand(2, 12, 196, 196)).shape
    torch.Size([2, 196])
    """
    return row_sharpness(_rows_of_one(probabilities).mean(-3))


def received_of(probabilities: Tensor) -> Tensor:
    """What each key receives of an attention whose matrix is at hand: `[..., H, Nq, Nk]`, float, to `[..., Nk]`.

    The mean over heads and queries, each of which has 1 to give. Dtypes and rows as in `sharpness_of`.

    >>> ops.received_of(torch.tensor([[[0.5, 0.5], [0.0, 1.0]]]))
    tensor([0.2500, 0.7500])
    """
    return _rows_of_one(probabilities).mean((-3, -2))


def _rows_of_one(probabilities: Tensor) -> Tensor:
    """Rows that add up to 1; one without anything stays so."""
    rows = probabilities.to(wide(probabilities.dtype))
    return rows / rows.sum(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


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


def received(q: Tensor, k: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """What each key receives, with every matrix materialised: the mean over heads and queries of step 1's rows.

    Shapes and dtypes of `q`, `k` and `mask` as in `attention_with_sharpness`; gives `[..., Nk]`, float32 (float64 of
    float64). A query that may see no key gives nothing.
    """
    dtype = wide(q.dtype)
    return safe_softmax(masked((q.to(dtype) * scale) @ k.to(dtype).mT, mask)).mean((-3, -2))


def empty_received(q: Tensor, k: Tensor) -> Tensor:
    """What `received` gives for `q [B, H, Nq, d]` and `k [B, H, Nk, d]`, not computed."""
    return k.new_empty(k.shape[0], k.shape[2], dtype=wide(q.dtype))


def empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What `attention_with_sharpness` gives for `q [B, H, Nq, d]` and `v [B, H, Nk, c]`, not computed.

    Heads lie next to channels in memory, as the fused operator leaves them: models join the two next.
    """
    batch, heads, rows, _ = q.shape
    out = q.new_empty(batch, rows, heads, v.shape[-1]).transpose(1, 2)
    return out, q.new_empty(batch, rows, dtype=wide(q.dtype))


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of q, k, v, mask and log_mass."""


def empty_gradients(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, log_mass: Tensor | None) -> Gradients:
    """Contiguous gradients in the inputs' dtypes; for a bias that is None, a tensor without elements."""
    d_mask, d_log_mass = (q.new_empty(0) if bias is None else bias.new_empty(bias.shape) for bias in (mask, log_mass))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_mask, d_log_mass


def shift(after: Tensor, before: Tensor) -> Tensor:
    """How a layer moved its tokens: the difference of two `[..., C]`, in float32 (float64 of float64).

    Raises RuntimeError where the two do not broadcast.

    >>> moved = ops.shift(torch.randn(2, 196, 768).bfloat16(), torch.randn(2, 196, 768).bfloat16())
    >>> moved.shape, moved.dtype
    (torch.Size([2, 196, 768]), torch.float32)
    """
    dtype = wide(after.dtype)
    return after.to(dtype) - before.to(dtype)


# Below this part of the largest magnitude differences of sharpness are no differences. Sharpness is a sum of products
# of float32 (section 2), so its rounding is some units of its magnitude; scaled to [0, 1], it would become weights.
FLOOR = 4096 * torch.finfo(torch.float32).eps


def saliency(sharpness: Tensor) -> Tensor:
    """Steps 3 and 4: `[B, N]`, float, to the same in [0, 1], 0 on the background; ones where a sample's are all equal.

    Equal is what differs by less than `FLOOR` of the largest magnitude, in float64 too. The scaling of step 3 cancels
    in step 4, so only the shift by the smallest is left: it makes equal values exactly 0.

    >>> ops.saliency(torch.tensor([[-3.0, -1.0, -2.0, -2.5, -1.5]]))
    tensor([[0.0000, 1.0000, 0.0000, 0.0000, 0.5000]])
    """
    shifted = sharpness - sharpness.amin(-1, keepdim=True)
    above = shifted - shifted.mean(-1, keepdim=True)
    top = above.amax(-1, keepdim=True)
    noise = FLOOR * sharpness.detach().abs().amax(-1, keepdim=True)
    flat = (shifted.amax(-1, keepdim=True) <= noise) | (top <= 0)
    return torch.where(flat, 1.0, above.clamp_min(0) / torch.where(flat, 1.0, top))


def unit(metric: Tensor) -> Tensor:
    """Vectors `[..., C]` of length 1, a zero vector as it is, in float32 (float64 of float64).

    >>> ops.unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
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


def empty_match(metric: Tensor) -> tuple[Tensor, Tensor]:
    """What `match` gives, not computed."""
    batch, tokens, _ = metric.shape
    sources = batch, (tokens + 1) // 2
    return metric.new_empty(sources, dtype=wide(metric.dtype)), metric.new_empty(sources, dtype=torch.int64)


def near(cosine: Tensor, margin: float) -> Tensor:
    """PiToMe's `f_m` (arXiv 2405.16148, equation 4) with `alpha = 1`: what lies below the margin counts against."""
    return torch.where(cosine >= margin, cosine, (cosine - margin).expm1())


def energy(metric: Tensor, margin: float) -> Tensor:
    """`[B, N, C]`, float, to `E_i = 1 / N sum over j != i of f_m(cos(v_i, v_j))`, `[B, N]`, as PiToMe's equation 4."""
    tokens = unit(metric)
    own = torch.eye(metric.shape[1], dtype=torch.bool, device=metric.device)
    return near(tokens @ tokens.mT, margin).masked_fill(own, 0).mean(-1)


def affinity(metric: Tensor) -> Tensor:
    """`[B, N, C]`, float, to `s_i = sum over j of softmax(X X')_ji`, `[B, N]`: AdaMerge (arXiv 2605.27465), equation 2.

    Products are not scaled, as there; in float32 (float64 of float64).
    """
    tokens = metric.to(wide(metric.dtype))
    return (tokens @ tokens.mT).softmax(-1).sum(-2)


def empty_centrality(metric: Tensor) -> Tensor:
    """What `energy` and `affinity` give, not computed."""
    return metric.new_empty(metric.shape[:2], dtype=wide(metric.dtype))
