"""Where a distribution over tokens goes: the results of a softmax, which are densities as long as they are only moved.

softmax over tokens [b, H, N, M]  -> mean over heads -> transpose -> slice ...   still a distribution over M

The weight of a token may be multiplied to it late, wherever it is read as a number: by an operator that does not
commute with scaling, or by whoever gets it as an output.
"""

from __future__ import annotations

from torch import fx

from tldr_compile.passes.axes import Atom, Axis, Factor, Kind, Typed, TypedGraph, axis, product
from tldr_compile.passes.fx_utils import named, operator_name

_SCALES = """
    clone detach alias _to_copy contiguous native_dropout relu abs neg nan_to_num view _unsafe_view reshape squeeze
    unsqueeze permute transpose t expand slice select split split_with_sizes unsafe_split unsafe_split_with_sizes unbind
    mean sum amax amin cat stack mul div masked_fill where linear matmul bmm einsum constant_pad_nd pad
    native_batch_norm _native_batch_norm_legit_no_training convolution conv2d add sub layer_norm rms_norm
"""
SCALES = frozenset(f"aten::{name}" for name in _SCALES.split())
"""Operators that commute with scaling one operand along a dimension that they do not sum, but for offsets of theirs."""
_ONE = frozenset({"aten::mul", "aten::div", "aten::matmul", "aten::bmm", "aten::einsum"})


def commutes(node: fx.Node, typed: TypedGraph, run: Axis, marked: tuple[int, ...]) -> bool:
    """Whether a call may read distributions over `run`, its operands `marked`, before they are scaled."""
    name = operator_name(node)
    if name not in SCALES:
        return False
    reads = typed.calls[node].own
    beside = [k for k in range(len(reads)) if k not in marked and any(each.atoms & run.atoms for each in reads[k])]
    if name in _ONE:
        return len(marked) == 1 and (name != "aten::div" or marked == (0,))
    if name == "aten::masked_fill":
        return marked == (0,) and named(node).get("value") == 0
    if name == "aten::where":
        return not [k for k in beside if k != 0]
    return name not in ("aten::cat", "aten::stack", "aten::add", "aten::sub") or not beside


def dims_after(typed: TypedGraph, node: fx.Node, operand: int, dim: int, run: Axis) -> tuple[tuple[int, ...], ...]:
    """For each result of a call the dimensions on which an operand's dimension `dim` lies.

    The call is typed again with that dimension's tokens under other names.
    """
    call = typed.calls[node]
    names = {atom: Atom(atom.size, atom.label, atom.clip, atom.strength, atom.role) for atom in run.atoms}
    own = list(call.own)
    own[operand] = tuple(_renamed(each, names) if d == dim else each for d, each in enumerate(own[operand]))
    outputs, solved = typed.typed_again(node, own)
    marks = {atom for new in names.values() for atom in solved.resolve(axis(new)).atoms}
    if marks & run.atoms:  # the operator says that the two are one: then it works entry by entry
        rank = len(call.reads[operand])
        back = rank - (dim + rank - len(call.own[operand]))
        return tuple((len(each) - back,) for each in call.outputs)
    return tuple(tuple(d for d, each in enumerate(axes) if each.atoms & marks) for axes in outputs)


def summed(call: Typed, operand: int, dim: int) -> bool:
    """Whether a call sums over a dimension of an operand."""
    kinds = (Kind.SUM, Kind.MEAN, Kind.CONTRACT, Kind.INVARIANT, Kind.KEYS, Kind.LINEAR)
    rank = len(call.reads[operand])
    at = dim + rank - len(call.own[operand])
    return any(use.operand == operand and at in use.dims and use.kind in kinds for use in call.uses)


def _renamed(whole: Axis, names: dict[Atom, Atom]) -> Axis:
    def factor(each: Factor) -> Factor:
        return _renamed(each, names) if isinstance(each, Axis) else names.get(each, each)

    segments = tuple(product([factor(each) for each in segment]).segments for segment in whole.segments)
    return Axis(tuple(segment for each in segments for segment in each))
