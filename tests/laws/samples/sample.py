"""How every rule is asked: one operator behind a merge, and whether the merge reaches through it.

clip [b, t, n, w] -> linear -> + class token -> attention, merge -> the operator -> output
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from tests.tracing import number

aten = torch.ops.aten
Stream: TypeAlias = Any  # a proxy of a tensor: samples are traced symbolically, so that their constants stay constants

# Every size is another one, so that no two dimensions are mistaken for each other by luck.
B, T, N, W, C = 2, 3, 6, 7, 8
TOKENS = 1 + T * N


@dataclass(frozen=True)
class Sample:
    """`build` calls the operators `names` on a merged stream; `barrier` is a part of why they are not carried, if so.

    The stream is `[b, 1 + t·n, c]`, merged along `t·n`; `framewise` it is `[b, t, n, c]`, merged along `n`
    for every frame on its own.
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
        stream = merged_stream(clip, self.framewise)
        return stream, self.build(stream)


def merged_stream(clip: Stream, framewise: bool) -> Stream:
    x = aten.linear.default(clip, number(C, W))
    if not framewise:
        protected = aten.expand.default(number(1, 1, C), [B, -1, -1])
        x = aten.cat.default([protected, aten.reshape.default(x, [B, T * N, C])], 1)
    q, k, v = (aten.linear.default(x, number(C, C, seed=seed)) for seed in range(3))
    return aten.add.Tensor(x, aten.scaled_dot_product_attention.default(q, k, v))


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


def contiguous(h: Stream) -> Stream:
    return aten.clone.default(h, memory_format=torch.contiguous_format)


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


MIXES, GROUPED, PART = (
    "it mixes the tokens along",
    "are grouped differently for each of it",
    "it needs the tokens along",
)
