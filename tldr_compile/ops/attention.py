"""Attention, and attention that also tells how sharp each token's attention is, without a matrix of all pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import register_flop_formula

from . import blocked, native, reference, tiled
from .providers import Provider, Providers, everything
from .reference import attention_with_sharpness, empty_gradients, empty_received, empty_results, masked, wide
from .transforms import Folded, differentiable, folded, lifted, refuse_forward_mode, slopes

Shape = Sequence[int]

Arguments = tuple[Tensor, Tensor, Tensor, float, "Tensor | None", "Tensor | None"]
"""Of the registered operators: q, k, v, scale, mask and log_mass."""

CUDNN_DEVICE = "cuda"
"""Where cuDNN may be what attends."""


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
        if plain and (q.is_cuda or native.takes(q, log_mass)) and not _differentiates(q, k, v, mask, log_mass):
            _refuse_tangents(q, k, v, mask, log_mass)
            lead, arguments = _flat(q, k, v, scale, mask, log_mass)
            if (operator := _faster(arguments)) is not None:
                out = operator(*arguments)
                return out.reshape(*lead, *out.shape[1:])
        if is_causal:
            causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
            log_mass, is_causal = masked(torch.atleast_2d(log_mass), causal), False
        mask = _biased(q, mask, log_mass)
    elif mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)  # cuDNN reads a mask of any dtype as one of this (pytorch #191612)
    options = mask, dropout_p, is_causal, scale, enable_gqa
    out = _fused_attention(q, k, v, *options)
    # Graphs that are compiled have no second derivatives; of one draw of dropout there is none.
    if torch.compiler.is_compiling() or dropout_p or not _differentiates(q, k, v, mask):
        return out
    twice: Tensor = _Twice.apply(q, k, v, *options, out)
    return twice


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


def _biased(q: Tensor, mask: Tensor | None, log_mass: Tensor) -> Tensor:
    """Mask and masses as the one additive mask that fused attention takes."""
    return masked(torch.atleast_2d(log_mass.to(q.dtype)), mask)


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


def _differentiates(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


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


# --- fused attention, as torch has it ---------------------------------------------------------------------------------


def _fused_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None,
    enable_gqa: bool,
) -> Tensor:  # fmt: skip
    unsafe = mask is not None and q.device.type == CUDNN_DEVICE and _differentiates(q, k, v, mask)
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
        return slopes(lambda *tensors: _fused_attention(*tensors, *given[asked:]), given[:asked], grad_out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.options = inputs[5:]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        with sdpa_kernel(SDPBackend.MATH):  # whose matrices of all pairs exist
            return slopes(_FusedGradients.forward, (*ctx.saved_tensors, *ctx.options), cotangents)


# --- the registered operators, on [B, H, N, d] ------------------------------------------------------------------------


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
    return F.scaled_dot_product_attention(q, k, v, _biased(q, mask, log_mass), scale=scale)


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
