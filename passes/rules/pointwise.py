"""Operators that work entry by entry: their operands' axes are one, up to broadcasting."""

from __future__ import annotations

from passes.rules.table import Call, Kind, Typed, broadcast, rule

UNARY = """
    abs acos acosh alias asin asinh atan atanh bitwise_not ceil celu clamp clamp_max clamp_min clone contiguous cos
    cosh detach
    dropout elu erf erfc exp exp2 expm1 feature_dropout floor frac gelu hardsigmoid hardswish hardtanh isfinite
    isinf isnan
    leaky_relu lift lift_fresh lift_fresh_copy log log10 log1p log2 log_sigmoid logical_not logit mish nan_to_num
    native_dropout
    neg positive reciprocal relu relu6 round rsqrt rrelu selu sgn sigmoid sign silu sin sinh softplus softsign
    special_expit
    sqrt square tan tanh tanhshrink threshold to trunc _to_copy zeros_like ones_like full_like empty_like rand_like
    randn_like
    new_tensor bernoulli
"""
BINARY = """
    add atan2 bitwise_and bitwise_or bitwise_xor copysign div eq floor_divide fmax fmin fmod ge gt hypot le
    logical_and logical_or
    logical_xor lt maximum minimum mul ne nextafter pow remainder rsub sub true_divide xlogy __and__ __or__ __xor__
    where masked_fill lerp addcmul addcdiv isclose
"""


@rule(*BINARY.split())
def pointwise(call: Call) -> Typed:
    axes = broadcast(call, [operand.axes for operand in call.operands])
    return call.typed(*[axes] * len(call.sizes), reads={operand.index: axes for operand in call.operands})


@rule(*UNARY.split())
def unary(call: Call) -> Typed:
    axes = call.axes(call.operands[0])
    return call.typed(*[axes] * len(call.sizes))


@rule("type_as", "to.other", "_assert_tensor_metadata")
def first_only(call: Call) -> Typed:
    """Of a second operand only the dtype or the device is read."""
    for other in call.operands[1:]:
        call.use(Kind.INVARIANT, other, *range(len(other.axes)))
    return call.typed(*[call.axes(call.operands[0])] * len(call.sizes))
