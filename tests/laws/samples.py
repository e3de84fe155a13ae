"""How every rule is asked: one operator behind a merge, and whether the merge reaches through it.

clip [b, t, n, w] -> linear -> + class token -> attention, merge -> the operator -> output
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tests.tracing import number

aten = torch.ops.aten
Stream: TypeAlias = Any  # a proxy of a tensor: samples are traced symbolically, so that their constants stay constants

# Every size is another one, so that no two dimensions are mistaken for each other by luck.
B, T, N, W, C = 2, 3, 6, 7, 8
TOKENS = 1 + T * N


@dataclass(frozen=True)
class Sample:
    """`build` calls the operators `names` on a merged stream; `barrier` is a part of why they are not carried, if so.

    The stream is `[b, 1 + t·n, c]`, merged along `t·n`; `framewise` it is `[b, t, n, c]`, merged along `n` frame by frame.
    """

    names: tuple[str, ...]
    build: Callable[[Stream], Any]
    barrier: str | None = None
    framewise: bool = False

    def __str__(self) -> str:
        return f"{'+'.join(self.names[:2])}{'-barrier' if self.barrier else ''}{'-framewise' if self.framewise else ''}"

    def model(self, clip: Stream) -> Any:
        """The whole model, `[b, t, n, w]` to the stream and whatever the operator gives.

        As an output the stream has a second reader: a norm that alone reads it would belong to the residual step.
        """
        x = aten.linear.default(clip, number(C, W))
        if not self.framewise:
            protected = aten.expand.default(number(1, 1, C), [B, -1, -1])
            x = aten.cat.default([protected, aten.reshape.default(x, [B, T * N, C])], 1)
        q, k, v = (aten.linear.default(x, number(C, C, seed=seed)) for seed in range(3))
        stream = aten.add.Tensor(x, aten.scaled_dot_product_attention.default(q, k, v))
        return stream, self.build(stream)


def carried(name: str, *builds: Callable[[Stream], Any]) -> list[Sample]:
    return [Sample((name,), build) for build in builds]


def barred(name: str, reason: str, *builds: Callable[[Stream], Any]) -> list[Sample]:
    return [Sample((name,), build, reason) for build in builds]


def framewise(name: str, build: Callable[[Stream], Any], barrier: str | None = None) -> Sample:
    return Sample((name,), build, barrier, framewise=True)


def unit(h: Stream) -> Stream:
    """Well inside (0, 1), where nearly every function of one number is defined and tame."""
    return aten.add.Tensor(aten.mul.Tensor(aten.sigmoid.default(h), 0.5), 0.25)


def positive(h: Stream) -> Stream:
    return aten.gt.Scalar(h, 0.0)


def across(h: Stream) -> Stream:
    """`[b, c, 1 + t·n]`."""
    return aten.transpose.int(h, 1, 2)


def rows(h: Stream, *shape: int) -> Stream:
    """`[b·(1 + t·n), *shape]`: tokens are a part of the batch."""
    return aten.reshape.default(h, [B * TOKENS, *(shape or (C,))])


def heads(h: Stream) -> Stream:
    """`[b, heads, 1 + t·n, c]`."""
    return aten.transpose.int(aten.reshape.default(h, [B, TOKENS, 4, C // 4]), 1, 2)


def vector(h: Stream) -> Stream:
    """`[1 + t·n]` is not to be had without giving up the samples of the batch."""
    return aten.reshape.default(h, [B * TOKENS * C])


def parts(h: Stream) -> tuple[Stream, Stream]:
    """The class token and the clip."""
    return aten.slice.Tensor(h, 1, 0, 1), aten.slice.Tensor(h, 1, 1, TOKENS)


MIXES, GROUPED, PART = "it mixes the tokens along", "over which n1 was grouped", "it holds a part of"


FUNCTIONS = """
    abs acos alias asin asinh atan atanh ceil celu clone cos cosh detach elu erf erfc exp exp2 expm1 floor frac
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
    *carried("clamp", lambda h: aten.clamp.default(h, -0.5, 0.5)),
    *carried("clamp_max", lambda h: aten.clamp_max.default(h, 0.5)),
    *carried("clamp_min", lambda h: aten.clamp_min.default(h, -0.5)),
    *carried("native_dropout", lambda h: aten.native_dropout.default(unit(h), 0.5, False)),
    *carried("threshold", lambda h: aten.threshold.default(h, 0.1, 20.0)),
    *carried("_to_copy", lambda h: aten._to_copy.default(h, dtype=torch.float64)),
    *carried("full_like", lambda h: aten.full_like.default(h, 2.0)),
    # What is drawn is not to be compared: only its shape goes on.
    *carried("empty_like", lambda h: aten.zeros_like.default(aten.empty_like.default(h))),
    *carried("rand_like", lambda h: aten.lt.Scalar(aten.rand_like.default(h), 2.0)),
    *carried("randn_like", lambda h: aten.zeros_like.default(aten.randn_like.default(h))),
    *carried("bernoulli", lambda h: aten.bernoulli.default(aten._to_copy.default(positive(h), dtype=torch.float32))),
    *barred("add", "its axes conflict", lambda h: aten.add.Tensor(h, aten.cat.default(parts(h)[::-1], 1))),
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


def reduction(name: str, overload: str, kind: str | None = None, *, many: bool = True) -> list[Sample]:
    """A reduction over channels, and over tokens; `kind` says why tokens cannot be reduced, if so."""
    call = getattr(getattr(aten, name), overload)

    def over(*dims: int) -> Callable[[Stream], Any]:
        return lambda h: call(h, list(dims) if many else dims[0])

    return [*carried(name, over(-1)), *(barred(name, kind, over(1)) if kind else carried(name, over(1), over(1, 2)))]


REDUCTIONS = [
    *reduction("mean", "dim"),
    *reduction("sum", "dim_IntList"),
    *reduction("amax", "default"),
    *reduction("amin", "default"),
    *reduction("logsumexp", "default", MIXES),
    *reduction("any", "dims", MIXES),
    *reduction("all", "dims", MIXES),
    *reduction("std", "dim", MIXES),
    *reduction("var", "dim", MIXES),
    *reduction("std_mean", "dim", MIXES),
    *reduction("var_mean", "dim", MIXES),
    *reduction("count_nonzero", "dim_IntList", MIXES),
    *reduction("prod", "dim_int", MIXES, many=False),
    *reduction("argmax", "default", MIXES, many=False),
    *reduction("argmin", "default", MIXES, many=False),
    *reduction("max", "dim", MIXES, many=False),
    *reduction("min", "dim", MIXES, many=False),
    *reduction("median", "dim", MIXES, many=False),
    *carried("mean", lambda h: aten.mean.dim(h, [1], True), lambda h: aten.mean.dim(h, [1], dtype=torch.float64)),
    *barred("mean", "it meets entries along", lambda h: aten.mean.default(h)),
    *carried("sum", lambda h: aten.sum.dim_IntList(h, [1], True)),
    *barred("sum", "it meets entries along", lambda h: aten.sum.default(h)),
    *[framewise("mean", lambda h, dim=dim: aten.mean.dim(h, [dim]), GROUPED) for dim in (0, 1)],
    framewise("amax", lambda h: aten.amax.default(h, [1]), GROUPED),
    framewise("std", lambda h: aten.std.dim(h, [1]), GROUPED),
    framewise("mean", lambda h: aten.mean.dim(h, [2])),
    *carried("max", lambda h: aten.max.other(h, number(TOKENS, C))),
    *carried("min", lambda h: aten.min.other(h, number(TOKENS, C))),
    *carried("aminmax", lambda h: aten.aminmax.default(h, dim=2)),
    *barred("aminmax", MIXES, lambda h: aten.aminmax.default(h, dim=1)),
    *carried("norm", lambda h: aten.norm.ScalarOpt_dim(h, 2, [2])),
    *barred("norm", MIXES, lambda h: aten.norm.ScalarOpt_dim(h, 2, [1])),
    *carried("linalg_vector_norm", lambda h: aten.linalg_vector_norm.default(h, 2, [2], True)),
    *barred("linalg_vector_norm", MIXES, lambda h: aten.linalg_vector_norm.default(h, 2, [1])),
]


def along(name: str, call: Callable[[Stream, int], Any], kind: str | None = MIXES) -> list[Sample]:
    """An operator that keeps its shape while entries along one dimension meet: channels, and tokens."""
    tokens = barred(name, kind, lambda h: call(h, 1)) if kind else carried(name, lambda h: call(h, 1))
    return [*carried(name, lambda h: call(h, 2)), *tokens]


ALONG = [
    *along("softmax", lambda h, dim: aten.softmax.int(h, dim), None),
    *along("_softmax", lambda h, dim: aten._softmax.default(h, dim, False), None),
    *carried("softmax", lambda h: aten.softmax.int(h, -2, torch.float64)),
    *along("log_softmax", lambda h, dim: aten.log_softmax.int(h, dim)),
    *along("_log_softmax", lambda h, dim: aten._log_softmax.default(h, dim, False)),
    *along("cumsum", lambda h, dim: aten.cumsum.default(h, dim)),
    *along("cumprod", lambda h, dim: aten.cumprod.default(h, dim)),
    *along("logcumsumexp", lambda h, dim: aten.logcumsumexp.default(h, dim)),
    *along("sort", lambda h, dim: aten.sort.default(h, dim)),
    *along("argsort", lambda h, dim: aten.argsort.default(h, dim)),
    *along("flip", lambda h, dim: aten.flip.default(h, [dim])),
    *along("roll", lambda h, dim: aten.roll.default(h, [1], [dim])),
    framewise("softmax", lambda h: aten.softmax.int(h, 1), GROUPED),
    framewise("roll", lambda h: aten.roll.default(h, [1], [1]), GROUPED),
    *barred("roll", "it meets entries along", lambda h: aten.roll.default(h, [1])),
]

NORMS = [
    *carried(
        "layer_norm",
        lambda h: aten.layer_norm.default(h, [C], number(C), number(C)),
        lambda h: aten.layer_norm.default(h, [C]),
    ),
    *barred("layer_norm", MIXES, lambda h: aten.layer_norm.default(h, [TOKENS, C])),
    *carried("native_layer_norm", lambda h: aten.native_layer_norm.default(h, [C], number(C), number(C), 1e-5)),
    *barred(
        "native_layer_norm", MIXES, lambda h: aten.native_layer_norm.default(across(h), [TOKENS], None, None, 1e-5)
    ),
    *carried("rms_norm", lambda h: aten.rms_norm.default(h, [C], number(C))),
    *barred("rms_norm", MIXES, lambda h: aten.rms_norm.default(across(h), [TOKENS], number(TOKENS))),
    *carried("_fused_rms_norm", lambda h: aten._fused_rms_norm.default(h, [C], number(C), 1e-5)),
    *barred("_fused_rms_norm", MIXES, lambda h: aten._fused_rms_norm.default(across(h), [TOKENS], None, 1e-5)),
    *carried("group_norm", lambda h: aten.group_norm.default(rows(h), 2, number(C), number(C))),
    *barred("group_norm", MIXES, lambda h: aten.group_norm.default(across(h), 2, number(C), number(C))),
    *carried(
        "native_group_norm", lambda h: aten.native_group_norm.default(rows(h), None, None, B * TOKENS, C, 1, 2, 1e-5)
    ),
    *barred(
        "native_group_norm",
        MIXES,
        lambda h: aten.native_group_norm.default(across(h), None, None, B, C, TOKENS, 2, 1e-5),
    ),
    *carried(
        "instance_norm",
        lambda h: aten.instance_norm.default(rows(h, 2, 4), None, None, None, None, True, 0.1, 1e-5, False),
    ),
    *barred(
        "instance_norm",
        MIXES,
        lambda h: aten.instance_norm.default(across(h), None, None, None, None, True, 0.1, 1e-5, False),
    ),
]


def statistics() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return number(C), number(C), number(C), number(C).abs()


NORMS += [
    *carried(
        "_native_batch_norm_legit_no_training",
        lambda h: aten._native_batch_norm_legit_no_training.default(across(h), *statistics(), 0.1, 1e-5)[0],
        lambda h: aten._native_batch_norm_legit_no_training.default(rows(h), *statistics(), 0.1, 1e-5)[0],
    ),
    *barred(
        "_native_batch_norm_legit_functional",
        "it meets entries along",
        lambda h: aten._native_batch_norm_legit_functional.default(across(h), *statistics(), True, 0.1, 1e-5),
    ),
    *carried(
        "_native_batch_norm_legit_functional",
        lambda h: aten._native_batch_norm_legit_functional.default(across(h), *statistics(), False, 0.1, 1e-5)[0],
    ),
    *barred(
        "_native_batch_norm_legit",
        "it meets entries along",
        lambda h: aten._native_batch_norm_legit.no_stats(across(h), number(C), number(C), True, 0.1, 1e-5),
    ),
]

PRODUCTS = [
    *carried(
        "linear",
        lambda h: aten.linear.default(h, number(5, C), number(5)),
        lambda h: aten.linear.default(rows(h), number(5, C)),
    ),
    *barred("linear", MIXES, lambda h: aten.linear.default(across(h), number(TOKENS, TOKENS))),
    *carried(
        "matmul",
        lambda h: aten.matmul.default(h, number(C, 5)),
        lambda h: aten.matmul.default(h, number(C)),
        lambda h: aten.matmul.default(across(h), h),
        lambda h: aten.matmul.default(h, across(h)),
    ),
    *barred("matmul", MIXES, lambda h: aten.matmul.default(number(5, TOKENS), h)),
    framewise(
        "matmul",
        lambda h: aten.matmul.default(aten.permute.default(h, [0, 2, 3, 1]), aten.permute.default(h, [0, 2, 1, 3])),
        GROUPED,
    ),
    *carried("bmm", lambda h: aten.bmm.default(across(h), h), lambda h: aten.bmm.default(h, number(B, C, 5))),
    *barred("bmm", MIXES, lambda h: aten.bmm.default(number(B, 5, TOKENS), h)),
    *carried("mm", lambda h: aten.mm.default(rows(h), number(C, 5))),
    *barred("mm", "it meets entries along", lambda h: aten.mm.default(number(5, B * TOKENS), rows(h))),
    *carried("mv", lambda h: aten.mv.default(rows(h), number(C))),
    *barred("mv", "it meets entries along", lambda h: aten.mv.default(aten.t.default(rows(h)), number(B * TOKENS))),
    *barred("dot", "it meets entries along", lambda h: aten.dot.default(vector(h), vector(h))),
    *carried("addmm", lambda h: aten.addmm.default(number(5), rows(h), number(C, 5), beta=2, alpha=3)),
    *barred("addmm", "it meets entries along", lambda h: aten.addmm.default(number(C), number(5, B * TOKENS), rows(h))),
    *carried(
        "baddbmm",
        lambda h: aten.baddbmm.default(number(B, C, C), across(h), h),
        lambda h: aten.baddbmm.default(number(1, TOKENS, 5), h, number(B, C, 5)),
    ),
    *barred("baddbmm", MIXES, lambda h: aten.baddbmm.default(number(C), number(B, 5, TOKENS), h)),
    *carried(
        "einsum",
        lambda h: aten.einsum.default("bnc,cd->bnd", [h, number(C, 5)]),
        lambda h: aten.einsum.default("b n c, b m c -> b n m", [h, h]),
        lambda h: aten.einsum.default("bnc,bnd->bcd", [h, h]),
        lambda h: aten.einsum.default("bnc->bc", [h]),
        lambda h: aten.einsum.default("bnc->cnb", [h]),
        lambda h: aten.einsum.default("bnc,cd->bd", [h, number(C, 5)]),
        lambda h: aten.einsum.default("bnc,bd->bcd", [h, aten.select.int(h, 1, 0)]),
    ),
    *barred("einsum", MIXES, lambda h: aten.einsum.default("bnc,nd->bcd", [h, number(TOKENS, 5)])),
    *barred("einsum", "it has no rule", lambda h: aten.einsum.default("...nc,cd->...nd", [h, number(C, 5)])),
    *carried(
        "scaled_dot_product_attention",
        lambda h: aten.scaled_dot_product_attention.default(heads(h), heads(h), heads(h)),
        lambda h: aten.scaled_dot_product_attention.default(h, h, h, number(TOKENS, TOKENS), scale=0.5),
        lambda h: aten.scaled_dot_product_attention.default(heads(h), heads(h), heads(h), number(TOKENS, TOKENS) > -1),
        lambda h: aten.scaled_dot_product_attention.default(parts(h)[0], h, h, number(B, 1, TOKENS)),
        lambda h: aten.scaled_dot_product_attention.default(number(B, 5, C), h, h),
        lambda h: aten.scaled_dot_product_attention.default(h, number(B, 5, C), number(B, 5, C)),
        lambda h: aten.scaled_dot_product_attention.default(
            heads(h), aten.slice.Tensor(heads(h), 1, 0, 2), aten.slice.Tensor(heads(h), 1, 2, 4), enable_gqa=True
        ),
    ),
    *barred(
        "scaled_dot_product_attention",
        MIXES,
        lambda h: aten.scaled_dot_product_attention.default(h, h, h, is_causal=True),
    ),
    framewise("scaled_dot_product_attention", lambda h: aten.scaled_dot_product_attention.default(h, h, h)),
    framewise(
        "scaled_dot_product_attention",
        lambda h: aten.scaled_dot_product_attention.default(*[aten.transpose.int(h, 1, 2)] * 3),
        GROUPED,
    ),
    *carried("embedding", lambda h: aten.embedding.default(number(C, 5), aten.argmax.default(h, 2))),
    *carried("conv1d", lambda h: aten.conv1d.default(rows(h, 2, 4), number(5, 2, 3), number(5))),
    *barred("conv1d", MIXES, lambda h: aten.conv1d.default(across(h), number(5, C, 3))),
    *carried("conv2d", lambda h: aten.conv2d.default(rows(h, 2, 2, 2), number(5, 2, 2, 2))),
    *carried("conv3d", lambda h: aten.conv3d.default(rows(h, 1, 2, 2, 2), number(5, 1, 2, 2, 2))),
    *carried(
        "convolution",
        lambda h: aten.convolution.default(rows(h, 2, 4), number(6, 1, 3), None, [1], [0], [1], False, [0], 2),
    ),
]

VIEWS = [
    *[
        sample
        for name in ("view", "_unsafe_view", "reshape")
        for sample in (
            *carried(name, lambda h, name=name: getattr(aten, name).default(h, [B, TOKENS, 4, 2])),
            *carried(name, lambda h, name=name: getattr(aten, name).default(h, [B * TOKENS, 1, C])),
            *barred(
                name, "it holds a part of", lambda h, name=name: getattr(aten, name).default(parts(h)[1], [B, T, N, C])
            ),
            framewise(name, lambda h, name=name: getattr(aten, name).default(h, [B * T, N, C])),
        )
    ],
    *carried("unsqueeze", lambda h: aten.unsqueeze.default(h, 1)),
    *carried(
        "squeeze",
        lambda h: aten.squeeze.dim(aten.unsqueeze.default(h, 1), 1),
        lambda h: aten.squeeze.dims(aten.unsqueeze.default(h, 1), [0, 1]),
        lambda h: aten.squeeze.default(aten.unsqueeze.default(h, 1)),
    ),
    *carried("permute", lambda h: aten.permute.default(h, [1, -1, 0])),
    *carried("transpose", lambda h: aten.transpose.int(h, -1, 1)),
    *carried("t", lambda h: aten.t.default(rows(h))),
    *carried(
        "expand",
        lambda h: aten.expand.default(aten.unsqueeze.default(h, 1), [-1, 5, -1, -1]),
        lambda h: aten.expand.default(h, [5, B, TOKENS, C]),
    ),
    *carried("tile", lambda h: aten.tile.default(h, [2, 3])),
    *carried("repeat", lambda h: aten.repeat.default(h, [5, 1, 1, 3]), lambda h: aten.repeat.default(h, [3, 2, 1])),
    *carried(
        "cat",
        lambda h: aten.cat.default([number(B, 2, C), h], 1),
        lambda h: aten.cat.default([h, h], -1),
        lambda h: aten.cat.default([h, number(B, TOKENS, 3)], 2),
        lambda h: aten.cat.default([parts(h)[1], parts(h)[0]], 1),
        lambda h: aten.cat.default([h, h], 1),
    ),
    *carried("concat", lambda h: aten.concat.default([h, number(B, 2, C)], 1)),
    *carried("concatenate", lambda h: aten.concatenate.default([h, number(B, 2, C)], 1)),
    *carried("stack", lambda h: aten.stack.default([h, aten.neg.default(h)], 2), lambda h: aten.stack.default([h, h])),
    *carried(
        "slice",
        lambda h: aten.slice.Tensor(h, 1, 0, 1),
        lambda h: aten.slice.Tensor(h, 1, 1, sys.maxsize),
        lambda h: aten.slice.Tensor(h, 1, -T * N),
        lambda h: aten.slice.Tensor(h, 2, 0, 6, 2),
        lambda h: aten.slice.Tensor(h, -1, 0, 5),
    ),
    *barred("slice", MIXES, lambda h: aten.slice.Tensor(h, 1, 3, 9), lambda h: aten.slice.Tensor(h, 1, 0, TOKENS, 2)),
    framewise("slice", lambda h: aten.slice.Tensor(h, 1, 1, 3), GROUPED),
    *carried("select", lambda h: aten.select.int(h, 1, 0), lambda h: aten.select.int(h, 2, -3)),
    *barred("select", MIXES, lambda h: aten.select.int(h, 1, 5)),
    framewise("select", lambda h: aten.select.int(h, 1, 1), GROUPED),
    *carried("split", lambda h: aten.split.Tensor(h, 3, -1)),
    *barred("split", MIXES, lambda h: aten.split.Tensor(h, 5, 1)),
    *carried("split_with_sizes", lambda h: aten.split_with_sizes.default(h, [1, T * N], 1)),
    *barred("split_with_sizes", MIXES, lambda h: aten.split_with_sizes.default(h, [4, TOKENS - 4], 1)),
    *carried("unsafe_split", lambda h: aten.unsafe_split.Tensor(h, 3, -1)),
    *barred("unsafe_split", MIXES, lambda h: aten.unsafe_split.Tensor(h, 5, 1)),
    *carried("unsafe_split_with_sizes", lambda h: aten.unsafe_split_with_sizes.default(h, [1, T * N], 1)),
    *barred("unsafe_split_with_sizes", MIXES, lambda h: aten.unsafe_split_with_sizes.default(h, [4, TOKENS - 4], 1)),
    *carried("unbind", lambda h: aten.unbind.int(h, 2)),
    *barred("unbind", MIXES, lambda h: aten.unbind.int(h, 1)),
    framewise("unbind", lambda h: aten.unbind.int(h, 1), GROUPED),
]

SAMPLES = (*FAMILIES, *POINTWISE, *REDUCTIONS, *ALONG, *NORMS, *PRODUCTS, *VIEWS)
