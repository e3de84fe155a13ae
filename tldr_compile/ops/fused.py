"""Fused attention as torch has it; with second derivatives, and without cuDNN where its gradients are NaN."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .reference import masked
from .transforms import differentiates, slopes

CUDNN_DEVICE = "cuda"
"""Where cuDNN may be what attends."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None,
    enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.scaled_dot_product_attention`; outside compiled code its gradients have gradients."""
    options = mask, dropout_p, is_causal, scale, enable_gqa
    out = _attention(q, k, v, *options)
    # Graphs that are compiled have no second derivatives; of one draw of dropout there is none.
    if torch.compiler.is_compiling() or dropout_p or not differentiates(q, k, v, mask):
        return out
    twice: Tensor = _Twice.apply(q, k, v, *options, out)
    return twice


def biased(q: Tensor, mask: Tensor | None, log_mass: Tensor) -> Tensor:
    """Mask and masses as the one additive mask that fused attention takes."""
    return masked(torch.atleast_2d(log_mass.to(q.dtype)), mask)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None,
    enable_gqa: bool,
) -> Tensor:  # fmt: skip
    unsafe = mask is not None and q.device.type == CUDNN_DEVICE and differentiates(q, k, v, mask)
    with sdpa_kernel(_without_cudnn()) if unsafe else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


class _Twice(torch.autograd.Function):
    """The last argument, which is fused attention of the others: its gradients, but with gradients of their own.

    Fused attention's have none. Where some may be asked for, they are those of `_FusedGradients`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        out: Tensor = arguments[-1]
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.options = inputs[4:-1]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return *(None,) * 8, grad_out
        asked = 3 + ctx.needs_input_grad[3]
        gradients = _FusedGradients.apply(grad_out, *ctx.saved_tensors, *ctx.options, asked)
        return *gradients, *(None,) * (9 - asked)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[-1].view_as(tangents[-1])


class _FusedGradients(torch.autograd.Function):
    """The gradients of fused attention, done again, in its first tensors; theirs are those of attention spelled out."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad_out: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
        *given, asked = arguments
        return slopes(lambda *tensors: _attention(*tensors, *given[asked:]), given[:asked], grad_out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.options = inputs[5:]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        with sdpa_kernel(SDPBackend.MATH):  # whose matrices of all pairs exist
            return slopes(_FusedGradients.forward, (*ctx.saved_tensors, *ctx.options), cotangents)


@torch.compiler.assume_constant_result
def _without_cudnn() -> list[SDPBackend]:
    """What may attend under a mask that gradients pass: cuDNN's are NaN at some lengths (pytorch #196678).

    Graphs that are compiled have chosen by the time they run. What is exported holds torch's operator, which chooses
    when it runs.
    """
    flags = torch.backends.cuda
    enabled = {
        SDPBackend.FLASH_ATTENTION: flags.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: flags.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: flags.math_sdp_enabled(),
    }
    return [backend for backend, is_enabled in enabled.items() if is_enabled] or [SDPBackend.MATH]
