"""Operators that only move entries: views multiply and split products, `cat` and slices work on segments."""

from __future__ import annotations

import sys
from typing import Any

from tldr_compile.passes.axes.algebra import (
    BORN,
    UNIT,
    Axes,
    Axis,
    Border,
    Conflict,
    border,
    concat,
    product,
    segment_size,
    subaxis,
)
from tldr_compile.passes.axes.rules.table import Call, Kind, Operand, Span, Typed, rule, unknown
from tldr_compile.passes.sizes import Size, divide, simplify


@rule("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze")
def view(call: Call) -> Typed:
    """Regroup: dimensions whose sizes have equal products on both sides exchange factors."""
    (operand, *_) = call.operands
    axes, sizes = list(call.axes(operand)), list(call.sizes[0])
    outputs: list[Axis] = []
    start = 0
    while axes or sizes:
        group, wanted = _group(axes, sizes)
        dims = range(start, start + len(group))
        start += len(group)
        outputs.extend(_regroup(call, operand, group, wanted, dims))
    return call.typed(tuple(outputs))


def _group(axes: list[Axis], sizes: list[Size]) -> tuple[list[Axis], list[Size]]:
    """The shortest prefixes of both with equal products, taken off."""
    group, wanted = ([axes.pop(0)] if axes else []), ([sizes.pop(0)] if sizes else [])
    have, want = product(group).size, simplify(_product(wanted))
    while have != want:
        if axes and (not sizes or _behind(have, want)):
            group.append(axes.pop(0))
            have = product(group).size
        elif sizes:
            wanted.append(sizes.pop(0))
            want = simplify(_product(wanted))
        else:
            raise Conflict(f"{have} entries cannot be viewed as {want}")
    return group, wanted


def _behind(have: Size, want: Size) -> bool:
    if isinstance(have, int) and isinstance(want, int):
        return have < want
    return divide(want, have) is not None


def _product(sizes: list[Size]) -> Size:
    result: Size = 1
    for size in sizes:
        result = result * size
    return result


def _regroup(call: Call, operand: Operand, group: list[Axis], wanted: list[Size], dims: range) -> list[Axis]:
    rest = product(group).factors
    pieces: list[Axis] = []
    solved = call.solved
    try:
        for size in wanted:
            solved, piece, rest = solved.take(rest, size)
            pieces.append(piece)
    except Conflict:
        if any(axis.clip for axis in group):
            raise
        call.use(Kind.MIX, operand, *dims)
        return [call.fresh(size, clip=False) for size in wanted]
    call.solved = solved
    return [solved.resolve(piece) for piece in pieces]


@rule("permute", "transpose", "t")
def permute(call: Call) -> Typed:
    (operand,) = call.operands
    axes = call.axes(operand)
    rank = len(axes)
    if "dims" in call.given:
        order = [dim % rank for dim in call.given["dims"]]
    else:
        one, two = (call.given.get("dim0", 0) % rank, call.given.get("dim1", 1) % rank) if rank > 1 else (0, 0)
        order = list(range(rank))
        if rank > 1:
            order[one], order[two] = order[two], order[one]
    return call.typed(tuple(axes[dim] for dim in order))


@rule("expand")
def expand(call: Call) -> Typed:
    """A dimension of size 1 that grows is born anew; nothing distinguishes its entries."""
    operand = call.operands[0]
    axes, sizes = call.axes(operand), call.sizes[0]
    axes = (UNIT,) * (len(sizes) - len(axes)) + axes
    outputs = tuple(
        call.fresh(size, clip=False) if axis == UNIT and size != 1 else axis
        for axis, size in zip(axes, sizes, strict=True)
    )
    return call.typed(outputs)


@rule("pixel_unshuffle")
def unshuffled(call: Call) -> Typed:
    """Blocks of places become channels: `[.., C, h·r, w·r]` to `[.., C·r·r, h, w]`."""
    (operand,) = call.operands
    rank, times = len(operand.axes), call.given["downscale_factor"]
    found = call.blocks(operand, {rank - 2: times, rank - 1: times})
    if found is None:
        call.use(Kind.MIX, operand, -3, -2, -1)
        channels, *places = call.sizes[0][-3:]
        born = (call.fresh(channels, clip=False), *(call.fresh(size, strength=BORN) for size in places))
        return call.typed((*call.axes(operand)[:-3], *born))
    counts, part = found
    if part:
        call.use(Kind.MIX, operand, -2, -1, part=part)
    axes = call.axes(operand)
    inside = [product(axes[dim].factors[len(each.factors) :]) for dim, each in counts.items()]
    return call.typed((*axes[:-3], product([axes[-3], *inside]), *counts.values()), reads={operand.index: axes})


@rule("pixel_shuffle")
def shuffled(call: Call) -> Typed:
    """Channels become blocks of places: `[.., C·r·r, h, w]` to `[.., C, h·r, w·r]`."""
    (operand,) = call.operands
    times, sizes = call.given["upscale_factor"], call.sizes[0]
    solved, channels, rest = call.solved.take(call.axes(operand)[-3].factors, sizes[-3])
    call.solved, rows, columns = solved.take(rest, times)
    if part := rows.atoms | product(columns).atoms:
        call.use(Kind.MIX, operand, -3, part=part)
    axes = call.axes(operand)
    places = product([axes[-2], rows]), product([axes[-1], *columns])
    outputs = (*axes[:-3], *(call.solved.resolve(each) for each in (channels, *places)))
    return call.typed(outputs, reads={operand.index: axes})


@rule("repeat", "tile")
def repeat(call: Call) -> Typed:
    (operand,) = call.operands
    axes, sizes = call.axes(operand), call.sizes[0]
    axes = (UNIT,) * (len(sizes) - len(axes)) + axes
    repeats = call.given.get("repeats", call.given.get("dims"))
    repeats = [1] * (len(axes) - len(repeats)) + list(repeats)
    outputs = []
    for axis, times, size in zip(axes, repeats, sizes, strict=True):
        if axis.size == size:
            outputs.append(axis)
        elif axis == UNIT:
            outputs.append(call.fresh(size, clip=False))
        else:
            outputs.append(product([call.fresh(times, clip=False), axis]))
    return call.typed(tuple(outputs))


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> Typed:
    """Every entry along a dimension `repeats` times, one after the other."""
    operand, *counts = call.operands
    dim, axes = call.given.get("dim"), call.axes(operand)
    if counts or dim is None:
        return unknown(call)
    dim %= len(axes)
    times = product([axes[dim], call.fresh(call.given["repeats"], clip=False)])
    return call.typed((*axes[:dim], times, *axes[dim + 1 :]))


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Typed:
    operands = [o for o in call.operands if o.axes and not (len(o.axes) == 1 and o.axes[0].size == 0)]
    rank = len(operands[0].axes)
    dim = call.given.get("dim", 0) % rank
    columns = [
        concat(call.axes(o)[d] for o in operands) if d == dim else call.same(*(o.axes[d] for o in operands))
        for d in range(rank)
    ]
    reads = {o.index: tuple(o.axes[d] if d == dim else columns[d] for d in range(rank)) for o in operands}
    return call.typed(tuple(columns), reads=reads)


@rule("pad", "constant_pad_nd")
def pad(call: Call) -> Typed:
    """Padding by a constant is a segment beside the others, as `cat` makes it; any other repeats entries."""
    (operand,) = call.operands
    axes, amounts = list(call.axes(operand)), call.given["pad"]
    for place in range(len(amounts) // 2):
        dim, (before, after) = len(axes) - 1 - place, amounts[2 * place : 2 * place + 2]
        if call.given.get("mode", "constant") == "constant" and _padded(before) and _padded(after):
            ends = [[call.fresh(size, clip=False)] if size != 0 else [] for size in (before, after)]
            axes[dim] = concat([*ends[0], axes[dim], *ends[1]])
        elif (before, after) != (0, 0):
            call.use(Kind.MIX, operand, dim)
            axes[dim] = call.fresh(call.sizes[0][dim])
    reads = tuple(call.axes(operand))
    return call.typed(tuple(axes), reads={operand.index: reads})


def _padded(amount: Any) -> bool:
    return isinstance(amount, int) and amount >= 0


@rule("view_as_complex")
def view_as_complex(call: Call) -> Typed:
    """Pairs along the last dimension become numbers."""
    (operand,) = call.operands
    call.use(Kind.MIX, operand, -1)
    return call.typed(call.axes(operand)[:-1])


@rule("view_as_real")
def view_as_real(call: Call) -> Typed:
    return call.typed((*call.axes(call.operands[0]), call.fresh(2, clip=False)))


@rule("stack")
def stack(call: Call) -> Typed:
    rank = len(call.operands[0].axes)
    axes = tuple(call.same(*(o.axes[d] for o in call.operands)) for d in range(rank))
    dim = call.given.get("dim", 0) % (rank + 1)
    outputs = (*axes[:dim], call.fresh(len(call.operands), strength=BORN), *axes[dim:])
    return call.typed(outputs, reads={o.index: axes for o in call.operands})


@rule("slice")
def slice_(call: Call) -> Typed:
    (operand,) = call.operands
    axes = call.axes(operand)
    dim = call.given.get("dim", 0) % len(axes)
    start, end, step = call.given.get("start"), call.given.get("end"), call.given.get("step", 1)
    if step != 1:
        return _strided(call, operand, dim, start or 0, end, step)
    length = axes[dim].size
    first = _offset(0 if start is None else start, length)
    last = _offset(length if end is None else end, length)
    return _cut(call, operand, axes, dim, [(first, last)])


def _strided(call: Call, operand: Operand, dim: int, start: Any, end: Any, step: Any) -> Typed:
    """`x[start::step]`: one entry of every block of `step`; where blocks are none, entries by their place."""
    axes = call.axes(operand)
    whole = end is None or _offset(end, axes[dim].size) == axes[dim].size
    found = None
    if whole and isinstance(start, int) and isinstance(step, int) and 0 <= start < step:
        found = call.blocks(operand, {dim: step})
    if found is None:
        return _cut(call, operand, axes, dim, [None])
    counts, inside = found
    call.use(Kind.MIX, operand, dim, part=inside)
    axes = call.axes(operand)
    outputs = (*axes[:dim], counts[dim], *axes[dim + 1 :])
    return call.typed(outputs, reads={operand.index: axes}, cut=dim, spans=(None,))


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def split(call: Call) -> Typed:
    (operand,) = call.operands
    axes = call.axes(operand)
    dim = call.given.get("dim", 0) % len(axes)
    spans: list[Span | None] = []
    at: Size = 0
    for sizes in call.sizes:
        spans.append((at, simplify(at + sizes[dim])))
        at = simplify(at + sizes[dim])
    return _cut(call, operand, axes, dim, spans)


@rule("select")
def select(call: Call) -> Typed:
    (operand,) = call.operands
    axes = call.axes(operand)
    dim, index = call.given.get("dim", 0) % len(axes), call.given["index"]
    at = _offset(index, axes[dim].size) if isinstance(index, int) else None
    typed = _cut(call, operand, axes, dim, [None if at is None else (at, simplify(at + 1))], keep=False)
    return typed


@rule("unbind")
def unbind(call: Call) -> Typed:
    (operand,) = call.operands
    axes = call.axes(operand)
    dim = call.given.get("dim", 0) % len(axes)
    spans: list[Span | None] = [(k, k + 1) for k in range(len(call.sizes))]
    return _cut(call, operand, axes, dim, spans, keep=False)


def _offset(index: Any, length: Size) -> Size:
    """Where an index of a slice points, counted from the front."""
    if index == sys.maxsize:
        return length
    if isinstance(index, int) and index < 0:
        return simplify(length + index)
    if isinstance(index, int) and isinstance(length, int):
        return min(index, length)
    return simplify(index)


def _cut(call: Call, operand: Operand, axes: Axes, dim: int, spans: list[Span | None], keep: bool = True) -> Typed:
    """Pieces of one dimension. An offset inside a segment of the clip tells tokens apart by their place."""
    known: list[Span | None] = []
    outputs: list[Axes] = []
    for span, sizes in zip(spans, call.sizes, strict=True):
        borders = None if span is None else [border(axes[dim], offset) for offset in span]
        if borders is None or None in borders or any(_inside_clip(axes[dim], each) for each in borders if each):
            call.use(Kind.MIX, operand, dim)
            span, piece = None, call.fresh(sizes[dim], clip=axes[dim].clip) if keep else UNIT
        else:
            piece = _piece(call, axes[dim], *(each for each in borders if each)) if keep else UNIT
        known.append(span)
        outputs.append((*axes[:dim], *([piece] if keep else []), *axes[dim + 1 :]))
    return call.typed(*outputs, cut=dim, spans=tuple(known))


def _inside_clip(axis: Axis, at: Border) -> bool:
    number, inside = at
    return inside != 0 and subaxis([axis.segments[number]]).clip


def _piece(call: Call, axis: Axis, start: Border, end: Border) -> Axis:
    """The whole segments between two borders, and new dimensions for parts of protected ones."""
    (first, skipped), (last, taken) = start, end
    if first == last:
        return call.fresh(simplify(taken - skipped), clip=False)
    segment = [call.fresh(simplify(segment_size(axis.segments[first]) - skipped), clip=False)] if skipped != 0 else []
    whole = axis.segments[first + bool(segment) : last]
    tail = [call.fresh(taken, clip=False)] if taken != 0 else []
    return concat([*segment, Axis(whole), *tail]) if segment or tail else subaxis(whole)
