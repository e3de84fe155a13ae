"""Entry by entry."""

from __future__ import annotations

import torch

from tests.laws.samples.sample import (
    TOKENS,
    C,
    N,
    Sample,
    Stream,
    T,
    aten,
    barred,
    carried,
    framewise,
    parts,
    positive,
    rows,
    unit,
)
from tests.tracing import number

FUNCTIONS = """
    abs acos alias angle asin asinh atan atanh ceil celu clone cos cosh detach elu erf erfc exp exp2 expm1 floor frac
    gelu hardsigmoid hardswish hardtanh isfinite isinf isnan leaky_relu log log10 log1p log2 log_sigmoid
    logical_not logit mish nan_to_num neg ones_like reciprocal relu relu6 round rrelu rsqrt selu sgn sigmoid
    sign silu sin sinh softplus special_expit sqrt square tan tanh trunc zeros_like
"""
OF_TWO = "atan2 fmax fmin hypot maximum minimum nextafter logical_and logical_or logical_xor"
OF_TENSORS = """
    add copysign div eq fmod ge gt le lt mul ne remainder rsub sub true_divide xlogy
    bitwise_and bitwise_or bitwise_xor __and__ __or__ __xor__
"""


def function(name: str, h: Stream) -> Stream:
    return getattr(aten, name).default(unit(h))


def with_table(name: str, overload: str, h: Stream) -> Stream:
    """Of the stream and of a table with an entry for each of its tokens."""
    call, table = getattr(getattr(aten, name), overload), number(TOKENS, C).abs() + 0.5
    return call(positive(h), table > 1) if "and" in name or "or" in name else call(unit(h), table)


FAMILIES = [
    Sample(tuple(FUNCTIONS.split()), lambda h: [function(name, h) for name in FUNCTIONS.split()]),
    Sample(tuple(OF_TWO.split()), lambda h: [with_table(name, "default", h) for name in OF_TWO.split()]),
    Sample(tuple(OF_TENSORS.split()), lambda h: [with_table(name, "Tensor", h) for name in OF_TENSORS.split()]),
]
POINTWISE = [
    *carried("acosh", lambda h: aten.acosh.default(aten.add.Tensor(unit(h), 1.0))),
    *carried("bitwise_not", lambda h: aten.bitwise_not.default(positive(h))),
    *carried("copy", lambda h: aten.copy.default(h, aten.neg.default(h))),
    *carried("clamp", lambda h: aten.clamp.default(h, -0.5, 0.5)),
    *carried("clamp_max", lambda h: aten.clamp_max.default(h, 0.5)),
    *carried("clamp_min", lambda h: aten.clamp_min.default(h, -0.5)),
    *carried("fill", lambda h: aten.fill.Scalar(h, 2.0)),
    *carried("prelu", lambda h: aten.prelu.default(rows(h), number(C)), lambda h: aten.prelu.default(h, number(1))),
    *carried("complex", lambda h: aten.view_as_real.default(aten.complex.default(h, unit(h)))),
    *carried("polar", lambda h: aten.view_as_real.default(aten.polar.default(unit(h), h))),
    *[
        sample
        for name in ("new_zeros", "new_ones")
        for sample in carried(name, lambda h, name=name: aten.add.Tensor(h, getattr(aten, name).default(h, [C])))
    ],
    *carried("new_full", lambda h: aten.add.Tensor(h, aten.new_full.default(h, [C], 2.0))),
    *carried("new_empty", lambda h: aten.add.Tensor(h, aten.zeros_like.default(aten.new_empty.default(h, [C])))),
    *carried("native_dropout", lambda h: aten.native_dropout.default(unit(h), 0.5, False)),
    *carried("threshold", lambda h: aten.threshold.default(h, 0.1, 20.0)),
    *carried("_to_copy", lambda h: aten._to_copy.default(h, dtype=torch.float64)),
    *carried("full_like", lambda h: aten.full_like.default(h, 2.0)),
    # What is drawn is not to be compared: only its shape goes on.
    *carried("empty_like", lambda h: aten.zeros_like.default(aten.empty_like.default(h))),
    *carried("rand_like", lambda h: aten.lt.Scalar(aten.rand_like.default(h), 2.0)),
    *carried("randn_like", lambda h: aten.zeros_like.default(aten.randn_like.default(h))),
    *carried("bernoulli", lambda h: aten.bernoulli.default(aten._to_copy.default(positive(h), dtype=torch.float32))),
    *barred(
        "add", "its sizes contradict each other", lambda h: aten.add.Tensor(h, aten.cat.default(parts(h)[::-1], 1))
    ),
    *carried("add", lambda h: aten.add.Tensor(h, number(1, TOKENS, C)), lambda h: aten.add.Tensor(h, parts(h)[0])),
    *carried("floor_divide", lambda h: aten.floor_divide.default(h, 0.3)),
    *carried("pow", lambda h: aten.pow.Tensor_Tensor(unit(h), unit(h)), lambda h: aten.pow.Scalar(2.0, unit(h))),
    *carried("where", lambda h: aten.where.self(positive(h), h, number(TOKENS, 1))),
    *carried(
        "masked_fill",
        lambda h: aten.masked_fill.Scalar(h, number(TOKENS, C) > 0, 3.0),
        lambda h: aten.masked_fill.Tensor(h, positive(h), number()),
    ),
    *carried(
        "lerp",
        lambda h: aten.lerp.Scalar(h, number(TOKENS, C), 0.3),
        lambda h: aten.lerp.Tensor(h, number(TOKENS, C), unit(h)),
    ),
    *carried("addcmul", lambda h: aten.addcmul.default(h, number(TOKENS, C), unit(h), value=0.5)),
    *carried("addcdiv", lambda h: aten.addcdiv.default(h, number(TOKENS, C), unit(h), value=0.5)),
    *carried("isclose", lambda h: aten.isclose.default(h, number(TOKENS, C), 0.5, 0.5)),
    *carried("type_as", lambda h: aten.type_as.default(h, positive(h))),
    framewise("add", lambda h: aten.add.Tensor(h, number(N, C))),
    framewise("add", lambda h: aten.add.Tensor(h, number(T, 1, C))),
]
