"""Emit the few view operators that lay a tensor along axes: the hand of the rewriter, with nothing of merging in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from tldr_compile.passes.axes import UNIT, Axes, Axis, Factor, find, product, subaxis
from tldr_compile.passes.sizes import Size, one_symbol, simplify, size

aten = torch.ops.aten
Length: TypeAlias = "int | fx.Node"
T = TypeVar("T")


@dataclass(frozen=True)
class Laid:
    """A node of the new graph and the axes it is held along."""

    node: fx.Node
    axes: Axes


class Layout:
    """Appends to a graph. Sizes come from axes, and where they are symbolic from values that have or hold them."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._tracer = fx.proxy.GraphAppendingTracer(graph)
        self._symbols: dict[sympy.Symbol, fx.Proxy] = {}
        self._lengths: dict[Size, Length] = {}
        self._made: dict[Hashable, Any] = {}

    @property
    def symbols(self) -> frozenset[sympy.Symbol]:
        """The symbols whose values are known so far."""
        return frozenset(self._symbols)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` emits, once in a graph; the key says all that it is made of."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def learn(self, placeholder: fx.Node) -> None:
        """Note where the symbols of a placeholder can be read."""
        self._learn(placeholder, placeholder.meta.get("val"))

    def learn_from_data(self, node: fx.Node, emitted: Any, *, shortened: bool) -> None:
        """Note where the symbols can be read that no input tells: those of a result whose sizes follow from data.

        What was emitted for `node` has its traced sizes unless it is `shortened`.
        """
        value = node.meta.get("val")
        sizes = (value, *(value.shape if isinstance(value, torch.Tensor) else ()))
        unknown = any(free_unbacked_symbols(each) for each in sizes if isinstance(each, torch.SymInt))
        if unknown and not shortened and isinstance(emitted, fx.Node):
            self._learn(emitted, value)

    def _learn(self, node: fx.Node, value: Any) -> None:
        if isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol):
            self._symbols.setdefault(value.node.expr, fx.Proxy(node, self._tracer))
        for dim, length in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            solved = one_symbol(size(length))
            if solved is not None and solved[0] not in self._symbols:
                symbol, times, offset = solved
                read = self.call(aten.sym_size.int, node, dim)
                read.meta["val"] = length
                proxy: Any = fx.Proxy(read, self._tracer)
                self._symbols[symbol] = proxy if (times, offset) == (1, 0) else (proxy - offset) // times

    def length(self, of: Size | Axis) -> Length:
        """A size as an argument: a number, or a node that computes it."""
        wanted = of.size if isinstance(of, Axis) else simplify(of)
        if isinstance(wanted, int):
            return wanted
        if wanted not in self._lengths:
            result = sympy_interp(PythonReferenceAnalysis, self._symbols, wanted)
            self._lengths[wanted] = result.node if isinstance(result, fx.Proxy) else int(result)
        return self._lengths[wanted]

    def knows(self, value: Any) -> bool:
        """Whether a traced number follows from the symbols that are known so far."""
        return isinstance(value, torch.SymInt) and all(each in self.symbols for each in value.node.expr.free_symbols)

    def lengths(self, axes: Sequence[Axis]) -> list[Length]:
        return [self.length(axis) for axis in axes]

    def numbers(self, like: fx.Node, axes: Sequence[Axis]) -> fx.Node:
        """0, 1, .. along the last axis, int64, on the device of `like`, wherever that will be."""
        ones = self.call(aten.new_ones.default, like, self.lengths(axes), dtype=torch.int64)
        return self.call(aten.sub.Tensor, self.call(aten.cumsum.default, ones, -1), 1)

    def reshape(self, node: fx.Node, source: Axes, target: Axes) -> fx.Node:
        """The same entries in the same order under other axes."""
        if [axis.size for axis in source] == [axis.size for axis in target]:
            return node
        return self.call(aten.reshape.default, node, self.lengths(target))

    def view(self, laid: Laid, axes: Axes) -> Laid:
        """`reshape` of a value that knows its axes."""
        return Laid(self.reshape(laid.node, laid.axes, axes), axes)

    def arrange(self, node: fx.Node, source: Axes, target: Axes) -> fx.Node:
        """Lay a tensor along other axes by its factors.

        A target axis that shares no factor with the source becomes 1; one that shares some is filled by
        broadcasting. Every factor of
        the source has to appear in the target.

            [b·t, h·w] along (b, h·w·t, 64)   ->   [b, h·w·t, 1]
        """
        have: list[Factor] = [factor for axis in source for factor in axis.factors]
        wanted = [list(axis.factors) if any(f in have for f in axis.factors) else [] for axis in target]
        order = [factor for factors in wanted for factor in factors]
        kept = [factor for factor in order if factor in have]
        if kept != have:
            node = self.reshape(node, source, tuple(product([f]) for f in have))
            node = self.call(aten.permute.default, node, [have.index(f) for f in kept])
            source = tuple(product([f]) for f in kept)
        if len(kept) != len(order):
            spread = tuple(product([f]) if f in have else UNIT for f in order)
            node = self.reshape(node, source, spread)
            source = tuple(product([f]) for f in order)
            node = self.call(aten.expand.default, node, self.lengths(source))
        return self.reshape(node, source, tuple(product(factors) for factors in wanted))

    def rearrange(self, laid: Laid, target: Axes) -> Laid:
        """The same factors in another order, over several dimensions or within the segments of a sum."""
        source = laid.axes
        if Counter(_factors(source)) == Counter(_factors(target)):
            return Laid(self._permuted(laid.node, source, target), target)
        pairs = enumerate(zip(source, target, strict=True))  # sums differ, and they are never moved
        dim, one, two = next((d, *pair) for d, pair in pairs if _sums(pair[0]) != _sums(pair[1]))
        if len(one.segments) > 1:
            parts = []
            for number, (part, wanted) in enumerate(zip(one.segments, two.segments, strict=True)):
                node = self.segments(laid.node, source, dim, (number, number + 1))
                axes, new = ((*source[:dim], subaxis([each]), *source[dim + 1 :]) for each in (part, wanted))
                parts.append(self.rearrange(Laid(node, axes), new).node)
            axes = (*source[:dim], two, *source[dim + 1 :])
            return self.rearrange(Laid(self.call(aten.cat.default, parts, dim), axes), target)
        apart, wanted_apart = (
            (*axes[:dim], *(product([f]) for f in axes[dim].factors), *axes[dim + 1 :]) for axes in (source, target)
        )
        return self.view(self.rearrange(self.view(laid, apart), wanted_apart), target)

    def _permuted(self, node: fx.Node, source: Axes, target: Axes) -> fx.Node:
        have, order = _factors(source), list[int]()
        for factor in _factors(target):  # of pairs the first stays the first
            order.append(next(k for k, f in enumerate(have) if f == factor and k not in order))
        if order != sorted(order):
            node = self.reshape(node, source, tuple(product([f]) for f in have))
            node = self.call(aten.permute.default, node, order)
            source = tuple(product([have[k]]) for k in order)
        return self.reshape(node, source, target)

    def narrow(self, node: fx.Node, dim: int, first: Size, last: Size, whole: Size) -> fx.Node:
        """Entries `[first, last)` of a dimension of size `whole`."""
        if first == 0 and last == whole:
            return node
        return self.call(aten.slice.Tensor, node, dim, self.length(first), self.length(last))

    def segments(self, node: fx.Node, axes: Axes, dim: int, place: tuple[int, int]) -> fx.Node:
        """Segments `[first, last)` of a dimension."""
        first, last = (_offset(axes[dim], border) for border in place)
        return self.narrow(node, dim, first, last, axes[dim].size)

    def along(
        self, node: fx.Node, axes: Axes, dim: int, old: Axis, new: Axis, apply: Callable[[fx.Node, Axes, int], fx.Node]
    ) -> tuple[fx.Node, Axes]:
        """Apply a function to the part `old` of a dimension, which turns it into `new`; what stands around it stays.

        `apply(part, axes, dim)` sees `old` as a dimension of its own.
        """
        axis = axes[dim]
        place = find(axis, old) or _segment_with(axis, old)
        if place is None:
            return self._inside_product(node, axes, dim, old, new, apply)
        whole = subaxis(axis.segments[place[0] : place[1]])
        part, held = self.segments(node, axes, dim, place), (*axes[:dim], whole, *axes[dim + 1 :])
        if whole == old:
            part, held = apply(part, held, dim), (*axes[:dim], new, *axes[dim + 1 :])
        else:
            part, held = self._inside_product(part, held, dim, old, new, apply)
        before, after = (0, place[0]), (place[1], len(axis.segments))
        parts = [self.segments(node, axes, dim, before)] if place[0] else []
        parts += [part]
        parts += [self.segments(node, axes, dim, after)] if after[0] < after[1] else []
        segments = (*axis.segments[: place[0]], *held[dim].segments, *axis.segments[place[1] :])
        result = (*axes[:dim], subaxis(segments), *axes[dim + 1 :])
        return (part if len(parts) == 1 else self.call(aten.cat.default, parts, dim)), result

    def _inside_product(
        self, node: fx.Node, axes: Axes, dim: int, old: Axis, new: Axis, apply: Callable[[fx.Node, Axes, int], fx.Node]
    ) -> tuple[fx.Node, Axes]:
        factors = axes[dim].factors
        first, last = _factor_span(factors, old)
        pieces = (product(factors[:first]), product(factors[first:last]), product(factors[last:]))
        apart = (*axes[:dim], *pieces, *axes[dim + 1 :])
        node, changed = self.along(self.reshape(node, axes, apart), apart, dim + 1, old, new, apply)
        together = (*axes[:dim], product((pieces[0], changed[dim + 1], pieces[2])), *axes[dim + 1 :])
        return self.reshape(node, changed, together), together


def segment_of(axis: Axis, old: Axis) -> tuple[int, int]:
    """The segments `[first, last)` of an axis that are `old`, or of which one has it among its factors."""
    return find(axis, old) or _segment_with(axis, old) or (0, len(axis.segments))


def _segment_with(axis: Axis, old: Axis) -> tuple[int, int] | None:
    """Where, among several segments, stands the one that has `old` among its factors."""
    if len(axis.segments) < 2 or len(old.segments) > 1:
        return None
    inside = [k for k, segment in enumerate(axis.segments) if old.atoms <= Axis((segment,)).atoms]
    return (inside[0], inside[0] + 1) if inside else None


def _factors(axes: Axes) -> list[Factor]:
    return [factor for axis in axes for factor in axis.factors]


def _sums(axis: Axis) -> list[Axis]:
    return [factor for factor in axis.factors if isinstance(factor, Axis)]


def _offset(axis: Axis, border: int) -> Size:
    return simplify(sum((subaxis([segment]).size for segment in axis.segments[:border]), 0))


def _factor_span(factors: Sequence[Factor], old: Axis) -> tuple[int, int]:
    """Where `old` stands in a product: as consecutive factors, or inside one factor that is a sum."""
    inner = old.factors
    for first in range(len(factors)):
        if tuple(factors[first : first + len(inner)]) == tuple(inner):
            return first, first + len(inner)
        factor = factors[first]
        if isinstance(factor, Axis) and find(factor, old) is not None:
            return first, first + 1
    raise ValueError(f"{old!r} does not stand in {product(factors)!r}")
