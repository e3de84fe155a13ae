"""Operators that look entries up by number, or write them there."""

from __future__ import annotations

from dataclasses import replace

from tldr_compile.passes.axes.algebra import BORN, UNIT, Axes, Axis, Role
from tldr_compile.passes.axes.rules.table import Call, Kind, Operand, Typed, broadcast, rule, unknown
from tldr_compile.passes.sizes import Size


@rule("embedding")
def embedding(call: Call) -> Typed:
    """Rows of a table: whatever the indices stand for stays."""
    table, indices = call.operands
    call.use(Kind.MIX, table, 0)
    return call.typed((*call.axes(indices), *call.axes(table)[1:]))


@rule("index")
def index(call: Call) -> Typed:
    """`x[:, i, j]`: the dimensions that are indexed become those that the indices stand for."""
    x, indices = call.operands[0], call.given["indices"]
    places = [dim for dim, each in enumerate(indices) if each is not None]
    tensors = [indices[dim] for dim in places]
    if places != list(range(places[0], places[0] + len(places))) or not _looks_up(call, x, tensors, places[0]):
        return unknown(call)
    call.use(Kind.MIX, x, *places)
    axes = call.axes(x)
    found = _chosen_by(call, tensors, axes[places[0] : places[-1] + 1])
    return call.typed((*axes[: places[0]], *found, *axes[places[-1] + 1 :]))


def _looks_up(call: Call, x: Operand, indices: list[Operand], first: int) -> bool:
    """Whether these are numbers of entries; of a mask, the result is as long as it has true entries."""
    found = max((each.axes for each in indices), key=len)
    sizes = call.sizes[0][first : first + len(found)]
    fits = all(axis.size in (1, size) for axis, size in zip(found, sizes, strict=False))
    return fits and len(call.sizes[0]) == len(x.axes) - len(indices) + len(found)


@rule("index_select")
def index_select(call: Call) -> Typed:
    x, indices = call.operands
    dim = call.given["dim"] % len(x.axes)
    call.use(Kind.MIX, x, dim)
    axes = call.axes(x)
    found = _chosen_by(call, [replace(indices, axes=indices.axes or (UNIT,))], axes[dim : dim + 1])
    return call.typed((*axes[:dim], *found, *axes[dim + 1 :]))


@rule("gather")
def gather(call: Call) -> Typed:
    """Along `dim` the result is laid like the indices; along the others like both, if they are of one length."""
    x, indices = call.operands
    dim = call.given["dim"] % len(x.axes)
    columns = _beside(call, x, indices, dim)
    outputs = tuple(indices.axes[d] if columns[d] is None else columns[d] for d in range(len(x.axes)))
    if x.axes[dim].clip and not indices.axes[dim].clip:  # a choice among tokens of the clip is of the clip
        chosen = call.same(
            call.fresh(indices.axes[dim].size, clip=True, strength=BORN, role=_role(x.axes[dim])), indices.axes[dim]
        )
        outputs = (*outputs[:dim], chosen, *outputs[dim + 1 :])
    return call.typed(tuple(call.solved.resolve(each) for each in outputs if each is not None))


def _chosen_by(call: Call, indices: list[Operand], among: Axes) -> Axes:
    """What a choice among the entries of some axes is laid along: its indices, and new entries of what is chosen.

    An index along what is of the clip already says itself what is chosen.
    """
    found = broadcast(call, [each.axes for each in indices])
    varies = any(each.varies for each in indices)
    if varies and (len(found) != 1 or not among[0].clip or found[0].clip):
        return found
    chosen = tuple(_chosen(call, each.size, among) for each in found)
    return tuple(call.same(*pair) for pair in zip(chosen, found, strict=True)) if varies else chosen


def _chosen(call: Call, size: Size, among: Axes) -> Axis:
    """What a constant choice among the entries of some axes bears: samples of samples, tokens of tokens."""
    clip = any(axis.clip for axis in among)
    role = _role(among[0]) if len(among) == 1 else Role.TOKEN
    return call.fresh(size, clip=clip, strength=BORN, role=role if clip else Role.UNKNOWN)


def _role(axis: Axis) -> Role:
    """What a choice among the entries of an axis is: the same, if all of the axis is of one role."""
    roles = {atom.role for atom in axis.atoms if atom.clip}
    return roles.pop() if len(roles) == 1 else Role.TOKEN


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(call: Call) -> Typed:
    """Entries of `self` are overwritten: the result is laid like it."""
    x, indices, *source = call.operands
    dim = call.given["dim"] % len(x.axes)
    for each in (indices, *source):
        _beside(call, x, each, dim)
        call.use(Kind.MIX, each, dim)
    return call.typed(call.axes(x))


def _beside(call: Call, x: Operand, other: Operand, dim: int) -> list[Axis | None]:
    """The dimensions that two tensors share; None along `dim`, and where only a part of one is read or written."""
    columns: list[Axis | None] = []
    for d, (mine, theirs) in enumerate(zip(x.axes, other.axes, strict=True)):
        whole = d != dim and mine.size == theirs.size
        columns.append(call.same(mine, theirs) if whole else None)
        if not whole:
            call.use(Kind.MIX, x, d)
    return columns


@rule("slice_scatter", "select_scatter")
def written(call: Call) -> Typed:
    """A part of `self` along `dim` is overwritten."""
    x, source = call.operands
    dim = call.given.get("dim", 0) % len(x.axes)
    call.use(Kind.MIX, x, dim)
    rest = [d for d in range(len(x.axes)) if d != dim]
    if len(source.axes) == len(x.axes):
        call.use(Kind.MIX, source, dim)
        theirs = [source.axes[d] for d in rest]
    else:
        theirs = list(source.axes)
    for mine, each in zip((x.axes[d] for d in rest), theirs, strict=True):
        call.same(mine, each)
    return call.typed(call.axes(x))


@rule("topk")
def topk(call: Call) -> Typed:
    x = call.operands[0]
    dim = call.given.get("dim", -1) % len(x.axes)
    call.use(Kind.MIX, x, dim)
    axes = call.axes(x)
    chosen = call.fresh(call.sizes[0][dim], clip=False)
    return call.typed(*[(*axes[:dim], chosen, *axes[dim + 1 :])] * 2)


@rule("one_hot")
def one_hot(call: Call) -> Typed:
    return call.typed((*call.axes(call.operands[0]), call.fresh(call.sizes[0][-1], clip=False)))


@rule("grid_sampler")
def grid_sampler(call: Call) -> Typed:
    """`x [B, C, ...]` looked up at the places `[B, ..., 2]`, which it is laid like."""
    x, places = call.operands
    call.use(Kind.MIX, x, *range(2, len(x.axes)))
    call.use(Kind.MIX, places, -1)
    batch = call.same(x.axes[0], places.axes[0])
    return call.typed((batch, call.axes(x)[1], *call.axes(places)[1:-1]))
