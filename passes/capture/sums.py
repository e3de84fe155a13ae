"""Sums in disguise, said plainly: one place gives tokens their weight, and it knows sums, means and softmax.

    var(x)  ->  mean -> sub -> mul -> mean          e = exp(x - amax(x)); e / sum(e)  ->  softmax(x)

A decomposition takes a `Call` and emits what stands for it, or returns None where the operator stays. Register one
with `@decomposition("var")`. Its values are the operator's to rounding, its shape and dtype exactly: half precision is
summed in float32, as the kernels do. The number of entries is that of the original graph: merged means are weighed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from operator import getitem
from typing import Any, TypeAlias

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from tldr_compile.passes.fx_utils import named, operands, operator_name
from tldr_compile.passes.sizes import Size, size

aten = torch.ops.aten

_HALF = frozenset({torch.float16, torch.bfloat16})
_COPIES = frozenset({aten.detach.default, aten.clone.default, aten.alias.default})


@dataclass(frozen=True)
class Call:
    """One call to be said in other operators; calling it emits one of them in its place."""

    graph: fx.Graph
    node: fx.Node

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = insert(self.graph, target, *args, **kwargs)
        told = {key: each for key, each in self.node.meta.items() if key not in ("val", "tensor_meta")}
        node.meta.update(told)  # where the model says it, for whoever reads a report
        return node

    @property
    def given(self) -> dict[str, Any]:
        return named(self.node)

    @property
    def x(self) -> fx.Node:
        return next(operands(self.node))

    @property
    def shape(self) -> tuple[Size, ...]:
        return tuple(map(size, self.x.meta["val"].shape))

    @property
    def dtype(self) -> torch.dtype:
        """Of the result, the first of several."""
        value = self.node.meta["val"]
        result: torch.dtype = (value[0] if isinstance(value, (tuple, list)) else value).dtype
        return result

    @property
    def dims(self) -> list[int]:
        """The dimensions that are summed over; none given are all."""
        rank, dim = len(self.shape), self.given.get("dim")
        if dim is None or dim == []:
            return list(range(rank))
        return [d % rank for d in (dim if isinstance(dim, Sequence) else [dim])] if rank else []

    @property
    def keepdim(self) -> bool:
        return bool(self.given.get("keepdim", False))

    def wide(self) -> fx.Node:
        """The operand in the dtype that the operator sums in."""
        return self.cast(self.x, torch.float32 if self.dtype in _HALF else self.dtype)

    def cast(self, node: fx.Node, dtype: torch.dtype | None = None) -> fx.Node:
        """A value in another dtype, by default the result's."""
        dtype = dtype or self.dtype
        return node if node.meta["val"].dtype == dtype else self(aten._to_copy.default, node, dtype=dtype)

    def root(self, square: fx.Node) -> fx.Node:
        """A square root whose gradient at 0 is 0, as that of a norm and of a deviation is."""
        zero = self(aten.eq.Scalar, square, 0)
        root = self(aten.sqrt.default, self(aten.masked_fill.Scalar, square, zero, 1))
        return self(aten.masked_fill.Scalar, root, zero, 0)


Decomposition: TypeAlias = Callable[[Call], "fx.Node | tuple[fx.Node, ...] | None"]
DECOMPOSITIONS: dict[str, Decomposition] = {}


def decomposition(*names: str) -> Callable[[Decomposition], Decomposition]:
    """Register what ATen operators are sums of."""

    def register(function: Decomposition) -> Decomposition:
        DECOMPOSITIONS.update({f"aten::{name}": function for name in names})
        return function

    return register


def decompose(graph: fx.Graph) -> None:
    """Say every operator that has a decomposition by it; all others are left as they are."""
    for node in list(graph.nodes):
        function = DECOMPOSITIONS.get(operator_name(node)) if node.op == "call_function" else None
        if function is None or any(each.meta["val"].is_complex() for each in operands(node)):
            continue
        with graph.inserting_before(node):
            new = function(Call(graph, node))
        if new is not None:
            _substitute(graph, node, new)


def _substitute(graph: fx.Graph, node: fx.Node, new: fx.Node | tuple[fx.Node, ...]) -> None:
    """One result in the place of the call, or several in the place of what is taken out of its tuple."""
    whole = isinstance(new, fx.Node)
    results: Any = {node: new} if whole else {user: new[user.args[1]] for user in node.users}  # type: ignore[index]
    for old, result in results.items():
        old.replace_all_uses_with(result)
        graph.erase_node(old)
    if not whole:
        graph.erase_node(node)


def insert(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call at the graph's insertion point, with its traced value."""
    node = graph.call_function(target, args, kwargs)
    values, keywords = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    traced = (each.meta["val"] for each in node.all_input_nodes)
    fake = next((each.fake_mode for each in traced if isinstance(each, FakeTensor)), nullcontext())
    with fake, torch.no_grad():
        node.meta["val"] = target(*values, **keywords)
    return node


# --- moments ---


@decomposition("var")
def var(call: Call) -> fx.Node | None:
    variance = _variance(call)
    return variance and call.cast(variance)


@decomposition("std")
def std(call: Call) -> fx.Node | None:
    variance = _variance(call)
    return variance and call.cast(call.root(variance))


@decomposition("var_mean")
def var_mean(call: Call) -> tuple[fx.Node, ...] | None:
    variance = _variance(call)
    return None if variance is None else (call.cast(variance), _mean(call))


@decomposition("std_mean")
def std_mean(call: Call) -> tuple[fx.Node, ...] | None:
    variance = _variance(call)
    return None if variance is None else (call.cast(call.root(variance)), _mean(call))


def _mean(call: Call) -> fx.Node:
    return call(aten.mean.dim, call.x, call.dims, call.keepdim)


def _variance(call: Call) -> fx.Node | None:
    """The mean square of what is left beside the mean, times `n / (n - correction)`."""
    correction = _correction(call.given)
    counted = _counted(call, correction) if correction else ()
    if counted is None:
        return None
    x = call.wide()
    beside = call(aten.sub.Tensor, x, call(aten.mean.dim, x, call.dims, True))
    moment = call(aten.mean.dim, call(aten.mul.Tensor, beside, beside), call.dims, call.keepdim)
    for target, factor in counted:
        moment = call(target, moment, factor)
    return moment


def _correction(given: dict[str, Any]) -> float:
    correction = given.get("correction")
    correction = float(given.get("unbiased", True) if correction is None else correction)
    return int(correction) if correction.is_integer() else correction


def _counted(call: Call, correction: float) -> Sequence[tuple[Any, Any]] | None:
    """What makes a moment that of a sample; None where the count cannot be said."""
    counts = [call.shape[dim] for dim in call.dims]
    if all(isinstance(each, int) for each in counts):
        count = math.prod(counts)
        left = max(count - correction, 0)
        return [(aten.mul.Tensor, count / left if left else math.inf)]
    sizes = [each if isinstance(each, int) else _number(call, each) for each in counts]
    if None in sizes or correction > 1:  # of fewer entries than that there is no moment, and a number cannot ask
        return None
    count = sizes[0]
    for each in sizes[1:]:
        count = call(operator.mul, count, each)
    return [(aten.mul.Tensor, count), (aten.div.Tensor, call(operator.sub, count, correction))]


def _number(call: Call, wanted: Size) -> fx.Node | None:
    """A size that depends on the inputs, read off an input: what is merged has another."""
    for node in call.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and size(value) == wanted:
            return node
        for dim, each in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if size(each) == wanted:
                return call(aten.sym_size.int, node, dim)
    return None


# --- norms ---


@decomposition("norm", "linalg_vector_norm", "linalg_norm")
def norm(call: Call) -> fx.Node | None:
    given = call.given
    p = given.get("ord", given.get("p"))
    several = call.node.target is aten.linalg_norm.default and len(call.dims) > 1
    if several and p is not None:
        return None  # of a matrix
    p = 2 if p is None else p
    if p not in (1, 2, math.inf):
        return None
    x = call.wide()
    if p == 2:
        square = call(aten.sum.dim_IntList, call(aten.mul.Tensor, x, x), call.dims, call.keepdim)
        return call.cast(call.root(square))
    size_of = call(aten.abs.default, x)
    target = aten.sum.dim_IntList if p == 1 else aten.amax.default
    return call.cast(call(target, size_of, call.dims, call.keepdim))


# --- exponentials ---


@decomposition("logsumexp")
def logsumexp(call: Call) -> fx.Node:
    x = call.wide()
    highest = call(aten.detach.default, call(aten.amax.default, x, call.dims, True))
    infinite = call(aten.eq.Scalar, call(aten.abs.default, highest), math.inf)  # infinity is not less than infinity
    highest = call(aten.masked_fill.Scalar, highest, infinite, 0)
    low = call(aten.exp.default, call(aten.sub.Tensor, x, highest))
    summed = call(aten.log.default, call(aten.sum.dim_IntList, low, call.dims, True))
    result = call(aten.add.Tensor, summed, highest)
    if not call.keepdim and call.dims:
        result = call(aten.squeeze.dims, result, call.dims)
    return call.cast(result)


@decomposition("log_softmax", "_log_softmax")
def log_softmax(call: Call) -> fx.Node:
    x = call.wide()
    low = call(aten.sub.Tensor, x, call(aten.detach.default, call(aten.amax.default, x, call.dims, True)))
    summed = call(aten.sum.dim_IntList, call(aten.exp.default, low), call.dims, True)
    return call.cast(call(aten.sub.Tensor, low, call(aten.log.default, summed)))


@decomposition("div", "mul", "true_divide")
def written_softmax(call: Call) -> fx.Node | None:
    """`exp(x) / sum(exp(x))` along one dimension, whatever was subtracted along it before."""
    powers, total = _quotient(call)
    if powers is None or total is None or powers.target is not aten.exp.default:
        return None
    scores: Any = powers.args[0]
    dim = _along(total, powers, aten.sum.dim_IntList)
    if dim is None or not scores.meta["val"].is_floating_point():
        return None
    x = _unshifted(scores, dim)
    return call(aten.softmax.int, x, dim, None if x.meta["val"].dtype == call.dtype else call.dtype)


def _quotient(call: Call) -> tuple[fx.Node | None, fx.Node | None]:
    """What is divided by what; a product with a reciprocal is a quotient too."""
    one, two = [*operands(call.node), None][:2]
    if operator_name(call.node) != "aten::mul":
        return (one, two) if call.given.get("rounding_mode") is None else (None, None)
    for left, right in ((one, two), (two, one)):
        if right is not None and right.target is aten.reciprocal.default:
            return left, next(operands(right))
    return None, None


def _unshifted(scores: fx.Node, dim: int) -> fx.Node:
    """Scores as they were before their highest was subtracted."""
    if scores.target is aten.sub.Tensor and not scores.kwargs:
        x, highest = [*operands(scores), None][:2]
        if x is not None and _along(highest, _under(x, _COPIES), aten.amax.default, aten.max.dim) == dim:
            return x
    return scores


def _along(node: fx.Node | None, x: fx.Node | None, *targets: Any) -> int | None:
    """The one dimension, counted from the last, along which `node` reduces `x`, and which it keeps or puts back."""
    node = _under(node, {*_COPIES, aten.expand.default})
    back = None
    if node is not None and node.target is aten.unsqueeze.default:
        back, node = named(node)["dim"], _under(node.args[0], _COPIES)
    if node is not None and node.target is getitem and node.args[1] == 0:
        node = _under(node.args[0], ())
    if x is None or node is None or node.target not in targets or _under(node.args[0], _COPIES) is not x:
        return None
    given, rank = named(node), x.meta["val"].ndim
    dims = given["dim"] if isinstance(given["dim"], Sequence) else [given["dim"]]
    kept = given.get("keepdim") if back is None else [back % rank] == [each % rank for each in dims]
    return dims[0] % rank - rank if len(dims) == 1 and kept else None


def _under(node: Any, targets: Collection[Any]) -> fx.Node | None:
    """What calls of `targets` were made of."""
    while isinstance(node, fx.Node) and node.target in targets:
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


# --- pools ---

_POOLS = {f"aten::{kind}_pool{rank}d": rank for kind in ("avg", "adaptive_avg", "_adaptive_avg") for rank in (1, 2, 3)}


@decomposition(*(name.removeprefix("aten::") for name in _POOLS))
def pool(call: Call) -> fx.Node | None:
    """A mean, where every dimension is pooled whole or not at all."""
    spatial, given = _POOLS[operator_name(call.node)], call.given
    have, result = call.shape[-spatial:], tuple(map(size, call.node.meta["val"].shape[-spatial:]))
    whole = [k - spatial for k in range(spatial) if result[k] == 1 and have[k] != 1]
    apart = [k - spatial for k in range(spatial) if result[k] == have[k]]
    if not whole or len(whole) + len(apart) < spatial:
        return None
    if "kernel_size" in given and not _fits(given, [n if k - spatial in whole else 1 for k, n in enumerate(have)]):
        return None
    return call(aten.mean.dim, call.x, whole, True)


def _fits(given: dict[str, Any], wanted: Sequence[Size]) -> bool:
    """Whether the windows have a size, and nothing is added around them or left out of their mean."""
    kernel = [_traced(each) for each in _each(given["kernel_size"], len(wanted))]
    padded, divisor = any(_each(given.get("padding", 0), 1)), given.get("divisor_override")
    return kernel == list(wanted) and divisor is None and not padded


def _each(value: Any, count: int) -> list[Any]:
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    return values * count if len(values) == 1 else values


def _traced(value: Any) -> Size:
    return size(value.meta["val"] if isinstance(value, fx.Node) else value)


# --- counts ---


@decomposition("count_nonzero")
def count_nonzero(call: Call) -> fx.Node:
    return call(aten.sum.dim_IntList, call(aten.ne.Scalar, call.x, 0), call.dims)
