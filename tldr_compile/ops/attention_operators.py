"""The registered operators of attention, on `[B, H, N, d]`: who provides them, their derivatives and their costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import blocked, native, reference, tiled
from .fused import biased
from .providers import Provider, Providers, everything
from .reference import attention_with_sharpness, empty_gradients, empty_received, empty_results, wide
from .transforms import Folded, differentiable, folded, lifted, slopes

Shape = Sequence[int]

Arguments = tuple[Tensor, Tensor, Tensor, float, "Tensor | None", "Tensor | None"]
"""Of the registered operators: q, k, v, scale, mask and log_mass."""

@torch.library.custom_op("tldr::attend", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, log_mass: Tensor) -> Tensor:
    """Where gradients are wanted, fused attention has faster ones of its own."""
    return ATTEND.run(q, k, v, scale, mask, log_mass)


@_attend.register_fake
def _attend_fake(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, log_mass: Tensor) -> Tensor:
    return empty_results(q, v)[0]


@torch.library.custom_op("tldr::attend_and_sharpness", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, log_mass: Tensor | None
) -> tuple[Tensor, Tensor]:
    return ATTEND_AND_SHARPNESS.run(q, k, v, scale, mask, log_mass)


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, log_mass: Tensor | None
) -> tuple[Tensor, Tensor]:
    return empty_results(q, v)


@torch.library.triton_op("tldr::tiled_attend", mutates_args=())
def _tiled_attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, log_mass: Tensor) -> Tensor:
    """A compiler sees the kernels in it, and code that it makes needs no Python to call them."""
    return tiled.attend(q, k, v, scale, mask, log_mass)


@torch.library.triton_op("tldr::tiled_attend_and_sharpness", mutates_args=())
def _tiled_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, log_mass: Tensor | None
) -> tuple[Tensor, Tensor]:
    return tiled.forward(q, k, v, scale, mask, log_mass)


@torch.library.custom_op("tldr::attend_and_sharpness_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_sharpness: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    log_mass: Tensor | None,
    mask_grad: bool,
    log_mass_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, mask and log_mass; empty tensors for the last two where nobody asks for them."""
    results = empty_gradients(q, k, v, mask if mask_grad else None, log_mass if log_mass_grad else None)
    blocked.backward(results, grad_out, grad_sharpness, q, k, v, scale, mask, log_mass)
    return results


@_backward.register_fake
def _backward_fake(
    grad_out: Tensor,
    grad_sharpness: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    log_mass: Tensor | None,
    mask_grad: bool,
    log_mass_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return empty_gradients(q, k, v, mask if mask_grad else None, log_mass if log_mass_grad else None)


@torch.library.custom_op("tldr::received", mutates_args=())
def _received(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    return RECEIVED.run(q, k, scale, mask)


@_received.register_fake
def _received_fake(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    return empty_received(q, k)


@torch.library.custom_op("tldr::received_backward", mutates_args=())
def _received_backward(
    grad_received: Tensor, q: Tensor, k: Tensor, scale: float, mask: Tensor | None, mask_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and mask; an empty tensor for the last where nobody asks for it."""
    results = _received_backward_fake(grad_received, q, k, scale, mask, mask_grad)
    blocked.received_backward(results, grad_received, q, k, scale, mask)
    return results


@_received_backward.register_fake
def _received_backward_fake(
    grad_received: Tensor, q: Tensor, k: Tensor, scale: float, mask: Tensor | None, mask_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, _, d_mask, _ = empty_gradients(q, k, k, mask if mask_grad else None, None)
    return d_q, d_k, d_mask


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, log_mass: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, biased(q, mask, log_mass), scale=scale)


ATTEND: Providers[..., Tensor] = Providers(
    "attend",
    torch.ops.tldr.attend,
    _attend_fake,
    [
        Provider("tiled", tiled.serves, torch.ops.tldr.tiled_attend, visible=True),
        Provider("native", native.serves, native.attend, laid=True),
        Provider("fused", everything, _fused),
    ],
    _fused,
)
"""Of attention with masses alone, where no gradients are wanted: fused attention has faster ones of its own."""

ATTEND_AND_SHARPNESS: Providers[..., tuple[Tensor, Tensor]] = Providers(
    "attend_and_sharpness",
    torch.ops.tldr.attend_and_sharpness,
    _forward_fake,
    [
        Provider("tiled", tiled.serves, torch.ops.tldr.tiled_attend_and_sharpness, visible=True),
        Provider("native", native.serves, native.forward, laid=True),
        Provider("blocked", everything, blocked.forward, laid=True),
    ],
    blocked.decomposition,
)

RECEIVED: Providers[..., Tensor] = Providers(
    "received",
    torch.ops.tldr.received,
    _received_fake,
    [Provider("blocked", everything, blocked.received, laid=True)],
    blocked.received_decomposition,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, ctx.scale, mask, log_mass = inputs
    ctx.save_for_backward(q, k, v, mask, log_mass)


def _differentiate(ctx: Any, grad_out: Tensor, grad_sharpness: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, mask, log_mass = ctx.saved_tensors
    mask_grad, log_mass_grad = ctx.needs_input_grad[4:6]
    d_q, d_k, d_v, d_mask, d_log_mass = torch.ops.tldr.attend_and_sharpness_backward(
        grad_out, grad_sharpness, q, k, v, ctx.scale, mask, log_mass, mask_grad, log_mass_grad
    )
    return d_q, d_k, d_v, None, d_mask if mask_grad else None, d_log_mass if log_mass_grad else None


def _differentiate_output(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    q = ctx.saved_tensors[0]
    return _differentiate(ctx, grad_out, q.new_zeros(q.shape[0], q.shape[2], dtype=wide(q.dtype)))


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_out, grad_sharpness, q, k, v, ctx.scale, mask, log_mass, *ctx.asked = inputs
    ctx.save_for_backward(grad_out, grad_sharpness, q, k, v, mask, log_mass)


def _differentiate_gradients(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """The second derivative, by way of the specification: rare, and so its matrices of all pairs may exist."""
    *given, mask, log_mass = ctx.saved_tensors
    return slopes(_specified_gradients, (*given, ctx.scale, mask, log_mass, *ctx.asked), cotangents)


def _specified_gradients(
    grad_out: Tensor,
    grad_sharpness: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    log_mass: Tensor | None,
    mask_grad: bool,
    log_mass_grad: bool,
) -> tuple[Tensor | None, ...]:
    """What `_backward` computes, in operators that have derivatives of any order."""
    with torch.autocast(q.device.type, enabled=False):
        found = slopes(_specified, (q, k, v, scale, mask, log_mass), (grad_out, grad_sharpness))
    d_q, d_k, d_v, _, d_mask, d_log_mass = found
    return d_q, d_k, d_v, d_mask if mask_grad else q.new_empty(0), d_log_mass if log_mass_grad else q.new_empty(0)


def _specified(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, log_mass: Tensor | None
) -> tuple[Tensor, Tensor]:
    return attention_with_sharpness(q, k, v, scale=scale, mask=mask, log_mass=log_mass)


def _fold_gradients(
    operator: Callable[..., Any], biases: Sequence[int], info: Any, in_dims: Sequence[int | None], *arguments: Any
) -> Folded:
    """As `folded`; the gradient of a bias with a batch of 1 is that of its broadcast, summed.

    `biases` are the places of the biases among the arguments, whose last ones say which gradients are asked for.
    """
    results, dims = folded(operator)(info, in_dims, *arguments)
    given = (lifted(arguments[at], in_dims[at], info.batch_size) for at in biases)
    count = len(biases)
    asked = zip(results[-count:], given, arguments[-count:], strict=True)
    summed = (grad.sum_to_size(bias.shape) if is_asked else grad for grad, bias, is_asked in asked)
    return (*results[:-count], *summed), dims


def _save_received(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, ctx.scale, mask = inputs
    ctx.save_for_backward(q, k, mask)


def _differentiate_received(ctx: Any, grad_received: Tensor) -> tuple[Tensor | None, ...]:
    q, k, mask = ctx.saved_tensors
    asked = ctx.needs_input_grad[3]
    d_q, d_k, d_mask = torch.ops.tldr.received_backward(grad_received, q, k, ctx.scale, mask, asked)
    return d_q, d_k, None, d_mask if asked else None


def _save_received_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_received, q, k, ctx.scale, mask, ctx.asked = inputs
    ctx.save_for_backward(grad_received, q, k, mask)


def _differentiate_received_gradients(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """As `_differentiate_gradients`."""
    *given, mask = ctx.saved_tensors
    return slopes(_specified_received_gradients, (*given, ctx.scale, mask, ctx.asked), cotangents)


def _specified_received_gradients(
    grad_received: Tensor, q: Tensor, k: Tensor, scale: float, mask: Tensor | None, mask_grad: bool
) -> tuple[Tensor | None, ...]:
    with torch.autocast(q.device.type, enabled=False):
        d_q, d_k, _, d_mask = slopes(_specified_received, (q, k, scale, mask), grad_received)
    return d_q, d_k, d_mask if mask_grad else q.new_empty(0)


def _specified_received(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    return reference.received(q, k, scale=scale, mask=mask)


differentiable("attend_and_sharpness", _save, _differentiate)
differentiable("tiled_attend_and_sharpness", _save, _differentiate)
differentiable("attend", _save, _differentiate_output)
differentiable("tiled_attend", _save, _differentiate_output)
differentiable(
    "attend_and_sharpness_backward",
    _save_gradients,
    _differentiate_gradients,
    partial(_fold_gradients, torch.ops.tldr.attend_and_sharpness_backward, (6, 7)),
)
differentiable("received", _save_received, _differentiate_received)
differentiable(
    "received_backward",
    _save_received_gradients,
    _differentiate_received_gradients,
    partial(_fold_gradients, torch.ops.tldr.received_backward, (4,)),
)


def attention_flop(q_shape: Shape, k_shape: Shape, v_shape: Shape, *args: Any, **kwargs: Any) -> int:
    """Floating-point operations of the two products of `q [B, H, Nq, d]`, `k [B, H, Nk, d]`, `v [B, H, Nk, c]`."""
    batch, heads, rows, channels = q_shape
    return 2 * batch * heads * rows * k_shape[-2] * (channels + v_shape[-1])


register_flop_formula(
    [
        torch.ops.tldr.attend,
        torch.ops.tldr.attend_and_sharpness,
        torch.ops.tldr.tiled_attend,
        torch.ops.tldr.tiled_attend_and_sharpness,
    ]
)(attention_flop)


@register_flop_formula(torch.ops.tldr.received)
def _received_flop(q_shape: Shape, k_shape: Shape, *args: Any, **kwargs: Any) -> int:
    """The scores alone."""
    return attention_flop(q_shape, k_shape, (0,))


@register_flop_formula(torch.ops.tldr.received_backward)
def _received_backward_flop(grad_shape: Shape, q_shape: Shape, k_shape: Shape, *args: Any, **kwargs: Any) -> int:
    """The scores again, and two products for them."""
    return 3 * attention_flop(q_shape, k_shape, (0,))


@register_flop_formula(torch.ops.tldr.attend_and_sharpness_backward)
def _backward_flop(
    out_shape: Shape,
    sharpness_shape: Shape,
    q_shape: Shape,
    k_shape: Shape,
    v_shape: Shape,
    *args: Any,
    **kwargs: Any,
) -> int:
    """The scores again; then two products each for the output and for the scores."""
    batch, heads, rows, channels = q_shape
    return 2 * batch * heads * rows * k_shape[-2] * (3 * channels + 2 * v_shape[-1])
