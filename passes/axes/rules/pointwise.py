"""Operators that work entry by entry: their operands' axes are one, up to broadcasting."""

from __future__ import annotations

from tldr_compile.passes.axes.rules.table import Call, Typed, broadcast, rule

UNARY = """
    abs acos acosh alias angle asin asinh atan atanh bernoulli bitwise_not ceil celu clamp clamp_max clamp_min clone
    cos cosh detach elu empty_like erf erfc exp exp2 expm1 fill floor frac full_like gelu hardsigmoid hardswish
    hardtanh isfinite isinf isnan leaky_relu log log10 log1p log2 log_sigmoid logical_not logit
    mish nan_to_num native_dropout neg ones_like rand_like randn_like reciprocal relu relu6 round rrelu rsqrt
    selu sgn sigmoid sign silu sin sinh softplus special_expit sqrt square tan tanh threshold _to_copy trunc type_as
    zeros_like
"""
BINARY = """
    add addcdiv addcmul __and__ atan2 bitwise_and bitwise_or bitwise_xor complex copy copysign div eq floor_divide
    fmax fmin fmod ge gt hypot isclose le lerp logical_and logical_or logical_xor lt masked_fill maximum minimum mul ne
    nextafter __or__ polar pow remainder rsub sub true_divide where xlogy __xor__
"""


@rule(*BINARY.split())
def pointwise(call: Call) -> Typed:
    varying = [operand.axes for operand in call.operands if operand.varies]
    axes = broadcast(call, varying, [operand.axes for operand in call.operands if not operand.varies])
    return call.typed(*[axes] * len(call.sizes), reads={operand.index: axes for operand in call.operands})


@rule(*UNARY.split())
def unary(call: Call) -> Typed:
    """Of a second operand only the dtype is read."""
    axes = call.axes(call.operands[0])
    return call.typed(*[axes] * len(call.sizes))


@rule("prelu")
def prelu(call: Call) -> Typed:
    """A slope for all entries, or one for every channel of `x [B, C, ...]`."""
    x, slope = call.operands
    if len(x.axes) > 1 and slope.axes and slope.axes[0].size != 1:
        call.absorb(slope.axes[0], x.axes[1])
    return call.typed(call.axes(x))


@rule("new_zeros", "new_ones", "new_full", "new_empty")
def factory(call: Call) -> Typed:
    """Of the operand only dtype and device are read."""
    return call.typed(tuple(call.fresh(size, clip=False) for size in call.sizes[0]))
