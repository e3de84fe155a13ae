"""Reductions, norms, and what runs along a dimension."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.laws.samples.sample import (
    GROUPED,
    MIXES,
    TOKENS,
    B,
    C,
    Sample,
    Stream,
    across,
    aten,
    barred,
    carried,
    contiguous,
    framewise,
    rows,
)
from tests.tracing import number


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
    *reduction("logsumexp", "default"),
    *reduction("any", "dims"),
    *reduction("all", "dims"),
    *reduction("std", "dim"),
    *reduction("var", "dim"),
    *reduction("std_mean", "dim"),
    *reduction("var_mean", "dim"),
    *reduction("count_nonzero", "dim_IntList"),
    *reduction("prod", "dim_int", MIXES, many=False),
    *reduction("argmax", "default", MIXES, many=False),
    *reduction("argmin", "default", MIXES, many=False),
    *reduction("max", "dim", MIXES, many=False),
    *reduction("min", "dim", MIXES, many=False),
    *reduction("median", "dim", MIXES, many=False),
    *carried("mean", lambda h: aten.mean.dim(h, [1], True), lambda h: aten.mean.dim(h, [1], dtype=torch.float64)),
    *carried("mean", lambda h: aten.mean.default(h)),
    *carried("sum", lambda h: aten.sum.dim_IntList(h, [1], True)),
    *carried("sum", lambda h: aten.sum.default(h)),
    framewise("mean", lambda h: aten.mean.dim(h, [0]), GROUPED),
    framewise("mean", lambda h: aten.mean.dim(h, [1]), GROUPED),
    framewise("amax", lambda h: aten.amax.default(h, [1]), GROUPED),
    framewise("std", lambda h: aten.std.dim(h, [1]), GROUPED),
    framewise("mean", lambda h: aten.mean.dim(h, [2])),
    *carried("max", lambda h: aten.max.other(h, number(TOKENS, C))),
    *carried("min", lambda h: aten.min.other(h, number(TOKENS, C))),
    *carried("aminmax", lambda h: aten.aminmax.default(h, dim=2)),
    *carried("aminmax", lambda h: aten.aminmax.default(h, dim=1)),
    *carried("norm", lambda h: aten.norm.ScalarOpt_dim(h, 2, [2])),
    *carried("norm", lambda h: aten.norm.ScalarOpt_dim(h, 2, [1]), lambda h: aten.norm.ScalarOpt_dim(h, 1, [1])),
    *barred("norm", MIXES, lambda h: aten.norm.ScalarOpt_dim(h, 3, [1])),
    *carried("linalg_vector_norm", lambda h: aten.linalg_vector_norm.default(h, 2, [2], True)),
    *carried("linalg_vector_norm", lambda h: aten.linalg_vector_norm.default(h, math.inf, [1])),
    *barred("linalg_vector_norm", MIXES, lambda h: aten.linalg_vector_norm.default(h, 3, [1])),
]


def along(name: str, call: Callable[[Stream, int], Any], kind: str | None = MIXES) -> list[Sample]:
    """An operator that keeps its shape while entries along one dimension meet: channels, and tokens."""
    tokens = barred(name, kind, lambda h: call(h, 1)) if kind else carried(name, lambda h: call(h, 1))
    return [*carried(name, lambda h: call(h, 2)), *tokens]


ALONG = [
    *along("softmax", lambda h, dim: aten.softmax.int(h, dim), None),
    *along("_safe_softmax", lambda h, dim: aten._safe_softmax.default(h, dim), None),
    *along("_softmax", lambda h, dim: aten._softmax.default(h, dim, False), None),
    *carried("softmax", lambda h: aten.softmax.int(h, -2, torch.float64)),
    *along("log_softmax", lambda h, dim: aten.log_softmax.int(h, dim), None),
    *along("_log_softmax", lambda h, dim: aten._log_softmax.default(h, dim, False), None),
    *along("cumsum", lambda h, dim: aten.cumsum.default(h, dim)),
    *along("cumprod", lambda h, dim: aten.cumprod.default(h, dim)),
    *along("logcumsumexp", lambda h, dim: aten.logcumsumexp.default(h, dim)),
    *along("sort", lambda h, dim: aten.sort.default(h, dim)),
    *along("argsort", lambda h, dim: aten.argsort.default(h, dim)),
    *carried("sort", lambda h: aten.sort.default(h)),
    *carried("argsort", lambda h: aten.argsort.default(h)),
    *along("flip", lambda h, dim: aten.flip.default(h, [dim])),
    *along("roll", lambda h, dim: aten.roll.default(h, [1], [dim])),
    *barred("tril", MIXES, lambda h: aten.tril.default(h)),
    *carried("tril", lambda h: aten.tril.default(rows(h, 2, 4))),
    *barred("triu", MIXES, lambda h: aten.triu.default(h)),
    *carried("triu", lambda h: aten.triu.default(rows(h, 2, 4))),
    framewise("softmax", lambda h: aten.softmax.int(h, 1), GROUPED),
    framewise("roll", lambda h: aten.roll.default(h, [1], [1]), GROUPED),
    *barred("roll", "it mixes entries along", lambda h: aten.roll.default(h, [1])),
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
        lambda h: aten.native_group_norm.default(contiguous(across(h)), None, None, B, C, TOKENS, 2, 1e-5),
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
        "it mixes entries along",
        lambda h: aten._native_batch_norm_legit_functional.default(across(h), *statistics(), True, 0.1, 1e-5),
    ),
    *carried(
        "_native_batch_norm_legit_functional",
        lambda h: aten._native_batch_norm_legit_functional.default(across(h), *statistics(), False, 0.1, 1e-5)[0],
    ),
    *barred(
        "_native_batch_norm_legit",
        "it mixes entries along",
        lambda h: aten._native_batch_norm_legit.no_stats(across(h), number(C), number(C), True, 0.1, 1e-5),
    ),
]
