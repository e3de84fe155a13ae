"""Operators that reduce or normalise along dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tldr_compile.passes.axes.algebra import BORN, UNIT, Axes, Role
from tldr_compile.passes.axes.rules.pointwise import pointwise
from tldr_compile.passes.axes.rules.table import Call, Kind, Operand, Rule, Typed, rule


def _reduce(kind: Kind) -> Rule:
    def reduce(call: Call) -> Typed:
        operand = call.operands[0]
        axes = call.axes(operand)
        dims = _dims(call.given.get("dim"), len(axes))
        call.use(kind, operand, *dims)
        outputs = _drop(axes, dims, bool(call.given.get("keepdim", False)))
        return call.typed(*[outputs] * len(call.sizes))

    return reduce


def _dims(dim: Any, rank: int) -> tuple[int, ...]:
    if dim is None or (isinstance(dim, Sequence) and not dim):
        return tuple(range(rank))
    return tuple(d % rank for d in (dim if isinstance(dim, Sequence) else (dim,))) if rank else ()


def _drop(axes: Axes, dims: tuple[int, ...], keepdim: bool) -> Axes:
    if keepdim:
        return tuple(UNIT if d in dims else axis for d, axis in enumerate(axes))
    return tuple(axis for d, axis in enumerate(axes) if d not in dims)


rule("mean")(_reduce(Kind.MEAN))
rule("sum")(_reduce(Kind.SUM))
rule("amax", "amin", "aminmax", "any", "all")(_reduce(Kind.INVARIANT))
MIXING = """
    prod std var var_mean std_mean norm linalg_vector_norm logsumexp argmax argmin median count_nonzero
"""
rule(*MIXING.split())(_reduce(Kind.MIX))


@rule("max", "min")
def extreme(call: Call) -> Typed:
    """Of one tensor along its dimensions, or of two entry by entry."""
    return pointwise(call) if "other" in call.given else _reduce(Kind.MIX)(call)


def _along(kind: Kind) -> Rule:
    """The shape stays, but entries along `dim` meet."""

    def along(call: Call) -> Typed:
        operand: Operand = call.operands[0]
        call.use(kind, operand, *_dims(call.given["dim"], len(operand.axes)))
        return call.typed(*[call.axes(operand)] * len(call.sizes))

    return along


rule("softmax", "_softmax", "_safe_softmax")(_along(Kind.SOFTMAX))
rule("log_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp")(_along(Kind.MIX))


@rule("tril", "triu")
def triangle(call: Call) -> Typed:
    """What is left of an entry follows from its place."""
    (operand,) = call.operands
    call.use(Kind.MIX, operand, -2, -1)
    return call.typed(call.axes(operand))


@rule("flip", "roll")
def moved(call: Call) -> Typed:
    """Entries change places along `dims`, which are therefore other dimensions than before."""
    (operand,) = call.operands
    axes = call.axes(operand)
    dims = _dims(call.given.get("dims"), len(axes))
    call.use(Kind.MIX, operand, *dims)
    return call.typed(tuple(call.fresh(each.size) if dim in dims else each for dim, each in enumerate(axes)))


@rule("sort", "argsort")
def sorted_along(call: Call) -> Typed:
    """Entries change places along `dim`; what they were is what they are."""
    (operand,) = call.operands
    axes = call.axes(operand)
    (dim,) = _dims(call.given.get("dim", -1), len(axes)) or (-1,)
    call.use(Kind.MIX, operand, *([dim] if axes else []))
    if not axes:
        return call.typed(*[axes] * len(call.sizes))
    role = Role.TOKEN if axes[dim].clip else Role.UNKNOWN
    placed = call.fresh(axes[dim].size, clip=axes[dim].clip, strength=BORN, role=role)
    return call.typed(*[(*axes[:dim], placed, *axes[dim + 1 :])] * len(call.sizes))


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def normalise_last(call: Call) -> Typed:
    """Statistics over the trailing dimensions, which are the parameters' own; some operators return them too."""
    operand, *parameters = call.operands
    shape = call.given["normalized_shape"]
    for parameter in parameters:
        for theirs, ours in zip(parameter.axes, operand.axes[-len(shape) :], strict=True):
            call.absorb(theirs, ours)
    call.use(Kind.MIX, operand, *range(-len(shape), 0))
    axes = call.axes(operand)
    return call.typed(
        *(tuple(UNIT if size == 1 else axis for axis, size in zip(axes, sizes, strict=True)) for sizes in call.sizes)
    )


@rule("group_norm", "native_group_norm", "instance_norm")
def normalise_groups(call: Call) -> Typed:
    operand, *parameters = call.operands
    _channels(call, operand, parameters)
    call.use(Kind.MIX, operand, *range(1, len(operand.axes)))
    axes = call.axes(operand)
    return call.typed(axes, *((axes[0], call.fresh(groups)) for _, groups in call.sizes[1:]))


@rule("_native_batch_norm_legit_no_training", "_native_batch_norm_legit_functional", "_native_batch_norm_legit")
def normalise_batch(call: Call) -> Typed:
    """With running statistics every entry is scaled on its own; in training all entries of a channel meet."""
    operand, *parameters = call.operands
    _channels(call, operand, parameters)
    if call.given.get("training", False):
        call.use(Kind.MIX, operand, *(d for d in range(len(operand.axes)) if d != 1))
    return call.typed(call.axes(operand), *(tuple(map(call.fresh, sizes)) for sizes in call.sizes[1:]))


def _channels(call: Call, operand: Operand, parameters: Sequence[Operand]) -> None:
    for parameter in parameters:
        call.absorb(parameter.axes[0], operand.axes[1])
