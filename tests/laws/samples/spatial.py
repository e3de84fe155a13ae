"""Over the last dimensions of a map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.laws.samples.sample import MIXES, C, Sample, Stream, across, aten, barred, carried, rows
from tests.tracing import number


def resampled(name: str, rank: int, call: Callable[[Stream], Any]) -> list[Sample]:
    """A map of its own for every token; and, of one dimension, the map of all tokens."""
    maps = {1: (2, 4), 2: (2, 2, 2), 3: (1, 2, 2, 2)}[rank]
    barrier = barred(name, MIXES, lambda h: call(across(h))) if rank == 1 else []
    return [*carried(name, lambda h: call(rows(h, *maps))), *barrier]


def interpolated(name: str, rank: int, *more: Any) -> list[Sample]:
    return resampled(name, rank, lambda x: getattr(aten, name).default(x, [3] * rank, *more))


def pooled(name: str, rank: int) -> list[Sample]:
    """Every other entry: of a window that covers all of them the mean is just a mean."""
    return resampled(name, rank, lambda x: getattr(aten, name).default(x, [1] * rank, [2] * rank))


SPATIAL = [
    *carried("conv1d", lambda h: aten.conv1d.default(rows(h, 2, 4), number(5, 2, 3), number(5))),
    *barred("conv1d", MIXES, lambda h: aten.conv1d.default(across(h), number(5, C, 3))),
    *carried("conv2d", lambda h: aten.conv2d.default(rows(h, 2, 2, 2), number(5, 2, 2, 2))),
    *carried("conv3d", lambda h: aten.conv3d.default(rows(h, 1, 2, 2, 2), number(5, 1, 2, 2, 2))),
    *carried("conv1d", lambda h: aten.conv1d.default(across(h), number(5, C, 1), number(5))),
    *barred("conv1d", MIXES, lambda h: aten.conv1d.default(across(h), number(5, C, 1), None, [2])),
    *carried(
        "convolution",
        lambda h: aten.convolution.default(rows(h, 2, 4), number(6, 1, 3), None, [1], [0], [1], False, [0], 2),
    ),
    *carried("conv_transpose1d", lambda h: aten.conv_transpose1d.default(rows(h, 2, 4), number(2, 5, 3), number(5))),
    *barred("conv_transpose1d", MIXES, lambda h: aten.conv_transpose1d.default(across(h), number(C, 5, 3))),
    *carried("conv_transpose2d", lambda h: aten.conv_transpose2d.input(rows(h, 2, 2, 2), number(2, 5, 2, 2))),
    *carried("conv_transpose2d", lambda h: aten.conv_transpose2d.input(rows(h, 2, 2, 2), number(2, 3, 2, 2), groups=2)),
    *carried("conv_transpose3d", lambda h: aten.conv_transpose3d.input(rows(h, 1, 2, 2, 2), number(1, 5, 2, 2, 2))),
    *pooled("avg_pool1d", 1),
    *pooled("avg_pool2d", 2),
    *pooled("avg_pool3d", 3),
    *pooled("max_pool2d", 2),
    *pooled("max_pool2d_with_indices", 2),
    *pooled("max_pool3d", 3),
    *interpolated("adaptive_avg_pool1d", 1),
    *interpolated("adaptive_avg_pool2d", 2),
    *interpolated("adaptive_avg_pool3d", 3),
    *interpolated("upsample_linear1d", 1, False),
    *interpolated("upsample_nearest1d", 1),
    *interpolated("upsample_bilinear2d", 2, False),
    *interpolated("upsample_bicubic2d", 2, False),
    *interpolated("upsample_nearest2d", 2),
    *interpolated("_upsample_bilinear2d_aa", 2, False),
    *interpolated("_upsample_bicubic2d_aa", 2, False),
    *interpolated("_upsample_nearest_exact2d", 2),
    *interpolated("upsample_trilinear3d", 3, False),
    *interpolated("upsample_nearest3d", 3),
]
