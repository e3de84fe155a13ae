"""Operators of PyTorch that hide a whole attention, in plain operators, so that it is found, typed and merged.

_transformer_encoder_layer_fwd(x, ...)   ->   [norm] -> attention -> + x [-> norm] -> linear -> relu -> linear -> + ...
_native_multi_head_attention(q, k, v)    ->   linear -> scaled_dot_product_attention -> linear

`nn.TransformerEncoderLayer` and `nn.MultiheadAttention` call them in eval mode, where no gradient is wanted.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tldr_compile.passes.capture.decompositions import decomposition
from tldr_compile.passes.errors import CaptureError

# What the dimensions of a mask are, by the number that the operators give its kind.
_QUERIES_KEYS, _SAMPLES_KEYS, _ALL = 0, 1, 2


@decomposition("aten::_transformer_encoder_layer_fwd")
def encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """What the operator returns. Raises `CaptureError` where `src` is nested."""

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    def attended(x: Tensor) -> Tensor:
        weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        return multi_head_attention(x, x, x, embed_dim, num_heads, *weights, mask, False, mask_type=mask_type)[0]

    def fed_forward(x: Tensor) -> Tensor:
        x = F.linear(x, ffn_weight_1, ffn_bias_1)
        # On CUDA the operator's product has an epilogue, which approximates.
        x = F.gelu(x, approximate="tanh" if x.is_cuda else "none") if use_gelu else F.relu(x)
        return F.linear(x, ffn_weight_2, ffn_bias_2)

    if norm_first:
        x = src + attended(norm_1(src))
        return x + fed_forward(norm_2(x))
    x = norm_1(src + attended(src))
    return norm_2(x + fed_forward(x))


@decomposition("aten::_native_multi_head_attention")
def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What the operator returns: the output, and the weights or, where they are not needed, nothing in a tensor.

    `query`, `key` and `value` are `[B, N, embed_dim]`. A query from which every key is hidden gets zeros, where the
    operator gives NaN.

    Raises:
        CaptureError: an operand is nested.
    """
    if query.is_nested or key.is_nested or value.is_nested:
        raise CaptureError(
            "an operand is a nested tensor, whose samples have their own lengths; give padded tensors, and "
            "enable_nested_tensor=False to nn.TransformerEncoder"
        )
    projected = _projected((query, key, value), qkv_weight, qkv_bias)
    q, k, v = (each.unflatten(-1, (num_head, embed_dim // num_head)).transpose(1, 2) for each in projected)
    hidden = None if mask is None else _hidden(mask, mask_type)
    if need_weights:
        scores = (q / math.sqrt(embed_dim // num_head)) @ k.transpose(-2, -1)
        weights = (scores if hidden is None else scores.masked_fill(hidden, -math.inf)).softmax(-1)
        out = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        out = F.scaled_dot_product_attention(q, k, v, None if hidden is None else hidden.logical_not())
        weights = query.new_empty(0)
    return F.linear(out.transpose(1, 2).flatten(2), proj_weight, proj_bias), weights


def _projected(operands: tuple[Tensor, Tensor, Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values: of one tensor with one product."""
    query, key, value = operands
    if query is key and key is value:
        return F.linear(query, weight, bias).chunk(3, -1)
    pairs = zip(operands, weight.chunk(3), bias.chunk(3), strict=True)
    return tuple(F.linear(operand, part, shift) for operand, part, shift in pairs)


def _hidden(mask: Tensor, kind: int | None) -> Tensor:
    """Where a score is hidden, to be broadcast along `[B, H, N, M]`: wherever the mask is not 0, floats too."""
    mask = mask.to(torch.bool)
    if kind == _SAMPLES_KEYS:
        return mask[:, None, None, :]
    if kind in (_QUERIES_KEYS, _ALL, None):
        return mask
    raise CaptureError(f"mask_type={kind} is no kind of mask; it is 0, 1 or 2")
