"""What a plan costs: floating-point operations of products, and bytes for what has none, at the traced sizes.

linear, at n1        2 · b · n1 · in · out
restore to n         bytes read and written, each worth `BYTE` operations
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TypeAlias

import sympy
import torch
from torch import fx

from tldr_compile.passes.axes import Axes, Axis, TypedGraph, subaxis
from tldr_compile.passes.fx_utils import named, operator_name, tensors
from tldr_compile.passes.plan.plan import Conversion, Merge, Plan, Step
from tldr_compile.passes.plan.resolution import at
from tldr_compile.passes.plan.schedule import Entry
from tldr_compile.passes.sizes import Size

Planned: TypeAlias = Callable[[Sequence[Entry]], Plan]

# What moving a byte is worth: processors do about ten operations in the time in which memory delivers one byte.
BYTE = 10


def of(plan: Plan) -> float:
    """Everything that a plan does."""
    return operations(plan) + BYTE * bytes_moved(plan)


def dense(plan: Plan) -> float:
    """The same of the graph as it was."""
    return operations(Plan(plan.typed, plan.sites, plan.misses, (), (), {}))


def operations(plan: Plan) -> float:
    """Floating-point operations of all products: those of the model, of matching, and of what saliency reads."""
    sizes = _Sizes(plan.typed)
    calls = sum(_call(plan, node, sizes) for node in plan.typed.captured.graph.graph.nodes)
    return calls + sum(_matching(plan, merge, sizes) + _scores(plan, merge, sizes) for merge in plan.merges)


def bytes_moved(plan: Plan) -> float:
    """What bringing operands to other resolutions reads and writes; a merge and an output are no choice."""
    sizes, total = _Sizes(plan.typed), 0.0
    for node, step in plan.steps.items():
        own = plan.typed.own(node)
        for each in step.conversions if node.op != "output" else ():
            total += _moved(own[each.operand], each, plan.typed.operands(node)[each.operand], sizes)
    for merge in plan.merges:
        axes = plan.typed.value(merge.node).axes
        for each in (*merge.stream, *merge.before):
            total += _moved(axes, each, merge.node, sizes)
        for value, conversions in merge.stretch:
            total += sum(_moved(plan.typed.value(value).axes, each, value, sizes) for each in conversions)
    return total


class _Sizes:
    """Sizes as numbers: symbolic ones as in the example, those that depend on data as 1."""

    def __init__(self, typed: TypedGraph) -> None:
        self.known: dict[sympy.Symbol, int] = {}
        for node in typed.captured.graph.graph.nodes:
            for value in (node.meta.get("val"), *(s for t in tensors(node) for s in t.shape)):
                if isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol):
                    self.known[value.node.expr] = int(value.node.hint) if value.node.has_hint() else 1

    def __call__(self, size: Size) -> int:
        return size if isinstance(size, int) else max(0, int(size.subs(self.known)))

    def count(self, axes: Sequence[Axis]) -> int:
        return prod(self(each.size) for each in axes)


def _call(plan: Plan, node: fx.Node, sizes: _Sizes) -> float:
    formula = FORMULAS.get(operator_name(node)) if node.op == "call_function" else None
    if formula is None:
        return 0.0
    typed = plan.typed.calls.get(node)
    if typed is None:  # of constants only
        reads, outputs = plan.typed.own(node), tuple(each.axes for each in plan.typed.values[node])
    else:
        done = plan.steps.get(node, Step()).held
        reads, outputs = tuple(at(axes, done) for axes in typed.reads), tuple(at(axes, done) for axes in typed.outputs)
    return float(formula(node, reads, outputs[0], sizes))


def _linear(node: fx.Node, reads: Sequence[Axes], output: Axes, sizes: _Sizes) -> int:
    return 2 * sizes.count(output) * sizes(reads[0][-1].size)


def _product(node: fx.Node, reads: Sequence[Axes], output: Axes, sizes: _Sizes) -> int:
    return 2 * sizes.count(output) * sizes(reads[-2][-1].size)


def _attention(node: fx.Node, reads: Sequence[Axes], output: Axes, sizes: _Sizes) -> int:
    query, key = reads[0], reads[1]
    return 2 * sizes.count(output[:-1]) * sizes(key[-2].size) * (sizes(query[-1].size) + sizes(output[-1].size))


def _convolution(node: fx.Node, reads: Sequence[Axes], output: Axes, sizes: _Sizes) -> int:
    return 2 * sizes.count(output) * prod(sizes(each.size) for each in reads[1][1:])


def _transposed_convolution(node: fx.Node, reads: Sequence[Axes], output: Axes, sizes: _Sizes) -> int:
    return 2 * sizes.count(reads[0]) * prod(sizes(each.size) for each in reads[1][1:])


def _einsum(node: fx.Node, reads: Sequence[Axes], output: Axes, sizes: _Sizes) -> int:
    letters = str(named(node)["equation"]).replace(" ", "").partition("->")[0].split(",")
    if len(letters) != 2 or "." in "".join(letters):
        return 0
    pairs = zip(letters, reads, strict=True)
    every: Mapping[str, Axis] = {name: each for names, axes in pairs for name, each in zip(names, axes, strict=True)}
    return 2 * sizes.count(tuple(every.values()))


FORMULAS: dict[str, Callable[[fx.Node, Sequence[Axes], Axes, _Sizes], int]] = {
    "aten::linear": _linear,
    **dict.fromkeys((f"aten::{name}" for name in ("matmul", "bmm", "mm", "addmm", "baddbmm")), _product),
    "aten::scaled_dot_product_attention": _attention,
    **dict.fromkeys((f"aten::{name}" for name in ("conv1d", "conv2d", "conv3d", "convolution")), _convolution),
    **dict.fromkeys((f"aten::conv_transpose{dims}d" for dims in (1, 2, 3)), _transposed_convolution),
    "aten::einsum": _einsum,
}


def _matching(plan: Plan, merge: Merge, sizes: _Sizes) -> float:
    """The pairs that are compared, over the channels of the keys or, whatever a metric makes of it, of the stream."""
    axes = [_of_run(axis, merge.target.run) for axis in plan.typed.value(merge.node).axes]
    tokens = sizes(merge.target.groups.size + merge.count)
    width = sizes.count(axes) // max(1, sizes(merge.target.run.size) * sizes(merge.target.batch.size))
    if plan.compares == ("keys",) and (keys := merge.site.attention.keys) is not None:
        width = sizes(merge.grouping.joined.size) * sizes(plan.typed.value(keys).axes[-1].size)
    pairs = -(-tokens // 2) * (tokens // 2) if plan.pairs is None else plan.pairs(tokens, sizes(merge.count))
    return 2.0 * sizes(merge.target.batch.size) * pairs * width


def _scores(plan: Plan, merge: Merge, sizes: _Sizes) -> float:
    """The scores once more for each that is told in a pass of its own, where the attention does not hold them.

    That is what each key received, and sharpness beside dropout, which fused attention alone draws.
    """
    attention = merge.site.attention
    if attention.probabilities is not None:
        return 0.0
    alone = {"received", "sharpness"} if named(attention.node).get("dropout_p", 0.0) else {"received"}
    typed, held = plan.typed.calls[attention.node], plan.steps[attention.node].held
    (query, key, *_), (output, *_) = (tuple(at(axes, held) for axes in each) for each in (typed.reads, typed.outputs))
    once = 2.0 * sizes.count(output[:-1]) * sizes(key[-2].size) * sizes(query[-1].size)
    return once * len(alone & merge.told)


def _of_run(axis: Axis, run: Axis) -> Axis:
    """An axis without what stands beside the run, such as a class token, which is matched with nothing."""
    segments = [segment for segment in axis.segments if Axis((segment,)).atoms & run.atoms]
    return subaxis(segments) if segments else axis


def _moved(axes: Axes, conversion: Conversion, value: fx.Node, sizes: _Sizes) -> float:
    """Bytes of a value at both of its resolutions."""
    both = (at(axes, [each] if each else []) for each in (conversion.source, conversion.target))
    return float(sum(map(sizes.count, both))) * value.meta["val"].dtype.itemsize
