"""Attention, and attention that also tells how sharp each token's attention is, without a matrix of all pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import fused, native
from .attention_operators import ATTEND, ATTEND_AND_SHARPNESS, RECEIVED, Arguments, Shape
from .reference import masked
from .transforms import differentiates, refuse_forward_mode


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    log_mass: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    """Step 7, attention whose keys count with their mass: `softmax(scale q k' + mask + log_mass) v`.

    ToMe's proportional attention (arXiv 2210.09461, section 3), which vid-TLDR keeps.

    `q [..., H, Nq, d]`, `k [..., H, Nk, d]`, `v [..., H, Nk, c]`, floats of one dtype, to `[..., H, Nq, c]` of it;
    `mask` (bool, True keeps, or additive) and `log_mass` (float) broadcast to `[..., H, Nq, Nk]`.
    The rest is that of `torch.nn.functional.scaled_dot_product_attention`. Without dropout, gradients have gradients,
    which hold matrices of all pairs; those of compiled code have none.

    Raises:
        NotImplementedError: a forward-mode derivative with masses.
        RuntimeError: shapes or dtypes do not fit each other.

    >>> q, k, v = torch.randn(3, 2, 12, 196, 64)
    >>> ops.attend(q, k, v, log_mass=torch.zeros(2, 1, 1, 196)).shape
    torch.Size([2, 12, 196, 64])
    """
    if log_mass is not None:
        plain = q.dim() >= 3 and not (dropout_p or is_causal or enable_gqa)
        if plain and (q.is_cuda or native.takes(q, log_mass)) and not differentiates(q, k, v, mask, log_mass):
            _refuse_tangents(q, k, v, mask, log_mass)
            lead, arguments = _flat(q, k, v, scale, mask, log_mass)
            if (operator := _faster(arguments)) is not None:
                out = operator(*arguments)
                return out.reshape(*lead, *out.shape[1:])
        if is_causal:
            causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
            log_mass, is_causal = masked(torch.atleast_2d(log_mass), causal), False
        mask = fused.biased(q, mask, log_mass)
    elif mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)  # cuDNN reads a mask of any dtype as one of this (pytorch #191612)
    return fused.attention(q, k, v, mask, dropout_p, is_causal, scale, enable_gqa)


def attend_and_sharpness(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    log_mass: Tensor | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """The output of `attend`, and the sharpness of its rows: steps 1, 2 and 7 of vid-TLDR in one pass.

    Shapes, dtypes and errors as in `attend`, with and without masses; the sharpness is `[..., Nq]`, float32 (float64 of
    float64). `mask` enters both, `log_mass` only the output. `reference.attention_with_sharpness` is the specification.

    >>> q, k, v = torch.randn(3, 2, 12, 196, 64)
    >>> [tuple(each.shape) for each in ops.attend_and_sharpness(q, k, v)]
    [(2, 12, 196, 64), (2, 196)]
    """
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    _refuse_tangents(q, k, v, mask, log_mass)
    lead, arguments = _flat(q, k, v, scale, mask, log_mass)
    out, sharpness = ATTEND_AND_SHARPNESS(*arguments)
    return out.reshape(*lead, *out.shape[1:]), sharpness.reshape(*lead, *sharpness.shape[1:])


def sharpness(
    q: Tensor, k: Tensor, *, scale: float | None = None, mask: Tensor | None = None, enable_gqa: bool = False
) -> Tensor:
    """Steps 1 and 2 alone: the sharpness `[..., Nq]` of attention from `q [..., H, Nq, d]` to `k [..., H, Nk, d]`.

    Dtypes, `mask` and errors as in `attend_and_sharpness`. It is attention to values without channels.

    >>> q, k = torch.randn(2, 2, 12, 196, 64)
    >>> ops.sharpness(q, k).shape
    torch.Size([2, 196])
    """
    return attend_and_sharpness(q, k, k[..., :0], scale=scale, mask=mask, enable_gqa=enable_gqa)[1]


def received(
    q: Tensor, k: Tensor, *, scale: float | None = None, mask: Tensor | None = None, enable_gqa: bool = False
) -> Tensor:
    """How much attention each key receives, `[..., Nk]`: the mean over heads and queries of `softmax(scale q k')`.

    Shapes, dtypes, `mask` and errors as in `sharpness`; the keys' add up to 1 unless a query may see none. A pass of
    its own over the rows, without a matrix of all pairs; `reference.received` is the specification.

    >>> q, k = torch.randn(2, 2, 12, 196, 64)
    >>> ops.received(q, k).shape
    torch.Size([2, 196])
    """
    if enable_gqa:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    _refuse_tangents(q, k, mask)
    lead, (q, k, _, scale, mask, _) = _flat(q, k, k, scale, mask, None)
    found = RECEIVED(q, k, scale, mask)
    return found.reshape(*lead, found.shape[-1])


def _faster(arguments: Arguments) -> Callable[..., Tensor] | None:
    """What is faster than fused attention under a mask that holds the masses, if anything is."""
    operator = ATTEND.in_graph(*arguments)
    if operator is not None:
        return operator
    q, log_mass = arguments[0], arguments[5]
    return torch.ops.tldr.attend if native.takes(q, log_mass) else None


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """Registered operators would drop them."""
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        refuse_forward_mode()


def _flat(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None, log_mass: Tensor | None
) -> tuple[Shape, Arguments]:
    """The leading dimensions, and what the registered operators take: those as one, heads alike, the scale told."""
    *lead, heads = torch.broadcast_shapes(*(t.shape[:-2] for t in (q, k, v)))
    q, k, v = (t.expand(*lead, heads, -1, -1).reshape(math.prod(lead), heads, *t.shape[-2:]) for t in (q, k, v))
    mask, log_mass = (None if bias is None else _batched(bias, lead) for bias in (mask, log_mass))
    return lead, (q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, mask, log_mass)


def _batched(bias: Tensor, lead: Sequence[int]) -> Tensor:
    """A bias that broadcasts to `[*lead, H, Nq, Nk]` as one that broadcasts to `[B, H, Nq, Nk]`."""
    bias = bias.reshape((1,) * (len(lead) + 3 - bias.dim()) + bias.shape)
    if len(lead) == 1:
        return bias
    return bias.expand(*lead, *bias.shape[-3:]).reshape(math.prod(lead), *bias.shape[-3:])
