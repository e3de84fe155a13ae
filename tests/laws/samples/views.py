"""What only moves entries."""

from __future__ import annotations

import sys
from typing import Any

from tests.laws.samples.sample import (
    GROUPED,
    MIXES,
    TOKENS,
    B,
    C,
    N,
    Sample,
    T,
    aten,
    barred,
    carried,
    framewise,
    parts,
    rows,
)
from tests.tracing import number


def view(name: str) -> list[Sample]:
    call = getattr(aten, name).default
    return [
        *carried(
            name,
            lambda h: call(h, [B, TOKENS, 4, 2]),
            lambda h: call(h, [B * TOKENS, 1, C]),
            lambda h: call(parts(h)[1], [B, T, N, C]),
            lambda h: call(parts(h)[1], [B, T, N * C]),
        ),
        framewise(name, lambda h: call(h, [B * T, N, C])),
    ]


def picture(h: Any) -> Any:
    return aten.reshape.default(aten.transpose.int(parts(h)[1], 1, 2), [B, C, T, N])


VIEWS = [
    *view("view"),
    *view("_unsafe_view"),
    *view("reshape"),
    *carried("unsqueeze", lambda h: aten.unsqueeze.default(h, 1)),
    *carried(
        "squeeze",
        lambda h: aten.squeeze.dim(aten.unsqueeze.default(h, 1), 1),
        lambda h: aten.squeeze.dims(aten.unsqueeze.default(h, 1), [0, 1]),
        lambda h: aten.squeeze.default(aten.unsqueeze.default(h, 1)),
    ),
    *barred("pixel_unshuffle", MIXES, lambda h: aten.pixel_unshuffle.default(picture(h), T)),
    *carried("pixel_shuffle", lambda h: aten.pixel_shuffle.default(picture(h), 2)),
    *carried("permute", lambda h: aten.permute.default(h, [1, -1, 0])),
    *carried("transpose", lambda h: aten.transpose.int(h, -1, 1)),
    *carried("t", lambda h: aten.t.default(rows(h))),
    *carried(
        "expand",
        lambda h: aten.expand.default(aten.unsqueeze.default(h, 1), [-1, 5, -1, -1]),
        lambda h: aten.expand.default(h, [5, B, TOKENS, C]),
    ),
    *carried("tile", lambda h: aten.tile.default(h, [2, 3])),
    *carried("repeat_interleave", lambda h: aten.repeat_interleave.self_int(h, 2, 2)),
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
    *carried(
        "pad",
        lambda h: aten.pad.default(h, [0, 0, 1, 2]),
        lambda h: aten.pad.default(h, [2, 3], "constant", 1.0),
        lambda h: aten.pad.default(h, [2, 3], "reflect"),
    ),
    *barred("pad", MIXES, lambda h: aten.pad.default(h, [0, 0, -1, 0])),
    *carried("constant_pad_nd", lambda h: aten.constant_pad_nd.default(h, [0, 0, 1, 2])),
    *carried(
        "view_as_complex",
        lambda h: aten.view_as_real.default(aten.view_as_complex.default(aten.reshape.default(h, [B, TOKENS, 4, 2]))),
    ),
    *carried("view_as_real", lambda h: aten.view_as_real.default(aten.complex.default(h, h))),
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
