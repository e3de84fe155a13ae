"""Operators over the last dimensions of a map: its positions are born here, whatever they were before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tldr_compile.passes.axes.algebra import BORN, Axes, Role
from tldr_compile.passes.axes.rules.table import Call, Kind, Operand, Typed, rule

PLACES = (("t", Role.TIME), ("h", Role.HEIGHT), ("w", Role.WIDTH))
MAPS = {
    1: "avg_pool1d adaptive_avg_pool1d upsample_linear1d upsample_nearest1d",
    2: """
        avg_pool2d adaptive_avg_pool2d max_pool2d max_pool2d_with_indices upsample_bilinear2d upsample_bicubic2d
        upsample_nearest2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_nearest_exact2d
    """,
    3: "avg_pool3d adaptive_avg_pool3d max_pool3d upsample_trilinear3d upsample_nearest3d",
}


def positions(call: Call, count: int) -> Axes:
    """The last `count` dimensions of the result."""
    sizes, places = call.sizes[0][-count:], PLACES[-count:]
    return tuple(
        call.fresh(size, label=label, strength=BORN, role=role)
        for size, (label, role) in zip(sizes, places, strict=True)
    )


@rule("conv1d", "conv2d", "conv3d", "convolution")
def convolution(call: Call) -> Typed:
    """`x [B, C, ...]`, `weight [O, C / groups, ...]`."""
    x, weight, *bias = call.operands
    if call.given.get("groups", 1) == 1:
        call.absorb(weight.axes[1], x.axes[-len(weight.axes) + 1])
    spatial = len(weight.axes) - 2
    call.use(Kind.MIX, weight, *range(len(weight.axes)))
    out = call.same(weight.axes[0], *(each.axes[0] for each in bias))
    if call.given.get("groups", 1) != 1:  # channels, or streams that are kept apart
        out = call.fresh(weight.axes[0].size, clip=x.clip, strength=BORN)
    if _pointwise(call, weight):
        call.use(Kind.MIX, x, -spatial - 1)
        return call.typed((*call.axes(x)[: -spatial - 1], out, *call.axes(x)[-spatial:]))
    kernel = [axis.size for axis in weight.axes[2:]]
    if (patches := _patches(call, x, kernel, call.given.get("stride", 1))) is not None:
        call.use(Kind.MIX, x, -spatial - 1)
        return call.typed((*call.axes(x)[: -spatial - 1], out, *patches), reads={x.index: call.axes(x)})
    call.use(Kind.MIX, x, *range(-spatial - 1, 0))
    born = positions(call, spatial)
    return call.typed((*call.axes(x)[: -spatial - 1], out, *born))


def _patches(call: Call, x: Operand, kernel: Sequence[Any], stride: Any) -> Axes | None:
    """The positions of a kernel that moves by its own length: blocks of tokens, which it mixes; None of any other."""
    spatial, rank = len(kernel), len(x.axes)
    plain = _all(call, "padding", 0) and _all(call, "dilation", 1) and not call.given.get("ceil_mode", False)
    moves = list(stride) if isinstance(stride, (list, tuple)) else [stride] * spatial
    if not plain or moves * (spatial // len(moves)) != list(kernel) or not all(isinstance(k, int) for k in kernel):
        return None
    found = call.blocks(x, {rank - spatial + k: length for k, length in enumerate(kernel)})
    if found is None:
        return None
    counts, inside = found
    if inside:
        call.use(Kind.MIX, x, *counts, part=inside)
    return tuple(counts.values())


def _pointwise(call: Call, weight: Operand) -> bool:
    """A kernel of one entry that is moved by one: a linear layer over the channels, position by position."""
    kernel = [axis.size for axis in weight.axes[2:]]
    return all(size == 1 for size in kernel) and _all(call, "stride", 1) and _all(call, "padding", 0)


def _all(call: Call, name: str, value: int) -> bool:
    given = call.given.get(name, value)
    return all(each == value for each in (given if isinstance(given, (list, tuple)) else [given]))


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(call: Call) -> Typed:
    """`x [B, C, ...]`, `weight [C, O / groups, ...]`."""
    x, weight, *bias = call.operands
    spatial = len(weight.axes) - 2
    call.absorb(weight.axes[0], x.axes[-spatial - 1])
    call.use(Kind.MIX, x, *range(-spatial - 1, 0))
    call.use(Kind.MIX, weight, *range(len(weight.axes)))
    born = positions(call, spatial)
    whole = call.given.get("groups", 1) == 1
    out = weight.axes[1] if whole else call.fresh(call.sizes[0][-spatial - 1], clip=False)
    out = call.same(out, *(each.axes[0] for each in bias))
    return call.typed((*call.axes(x)[: -spatial - 1], out, *born))


def resampled(call: Call) -> Typed:
    """Pooled or interpolated, every channel by itself."""
    x = call.operands[0]
    spatial = RANKS[call.name]
    kernel = call.given.get("kernel_size")
    if kernel is not None and len(call.sizes) == 1:  # with indices, they number the places of the whole picture
        lengths = kernel if isinstance(kernel, (list, tuple)) else [kernel]
        lengths = list(lengths) * (spatial // len(lengths))
        if (patches := _patches(call, x, lengths, call.given.get("stride") or lengths)) is not None:
            axes = (*call.axes(x)[:-spatial], *patches)
            return call.typed(*[axes] * len(call.sizes), reads={x.index: call.axes(x)})
    call.use(Kind.MIX, x, *range(-spatial, 0))
    axes = (*call.axes(x)[:-spatial], *positions(call, spatial))
    return call.typed(*[axes] * len(call.sizes))


RANKS = {f"aten::{name}": rank for rank, names in MAPS.items() for name in names.split()}
rule(*RANKS)(resampled)
