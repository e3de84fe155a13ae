"""Small facts about the nodes of a captured graph."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from tldr_compile.passes.axes import Size, simplify


def operands(node: fx.Node) -> Iterator[fx.Node]:
    """Nodes among the arguments that hold a tensor, in the order of the schema, repetitions included."""
    for each in _leaves((node.args, node.kwargs)):
        if isinstance(each, fx.Node) and isinstance(each.meta.get("val"), torch.Tensor):
            yield each


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, (tuple, list)):
        for each in tree:
            yield from _leaves(each)
    elif isinstance(tree, dict):
        for each in tree.values():
            yield from _leaves(each)
    else:
        yield tree


def tensors(node: fx.Node) -> tuple[torch.Tensor, ...]:
    """The traced tensors that a node produces."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return (value,)
    return tuple(each for each in value if isinstance(each, torch.Tensor)) if isinstance(value, (tuple, list)) else ()


def size(value: Any) -> Size:
    """A traced size as a plain int or a sympy expression.

    A symbol that the traced program divides evenly is a multiple: `s` is `4 (s // 4)`, so that `s // (s // 4)` is 4.
    """
    if not isinstance(value, torch.SymInt):
        return int(value)
    found = value.node.expr
    for symbol, by in _multiples(value.node.shape_env).items():
        if symbol in found.free_symbols:
            part = sympy.Dummy(integer=True, positive=True)
            found = found.subs(symbol, by * part).subs(part, FloorDiv(symbol, by))
    return simplify(found)


def _multiples(shape_env: ShapeEnv) -> dict[sympy.Symbol, int]:
    """What guards of the traced program say of symbols: by which number each can be divided."""
    count, found = _MULTIPLES.get(shape_env, (0, {}))
    for guard in shape_env.guards[count:]:
        if not isinstance(guard.expr, sympy.Eq):
            continue
        for symbol, by in _divides(guard.expr):
            found[symbol] = math.lcm(found.get(symbol, 1), by)
    _MULTIPLES[shape_env] = len(shape_env.guards), found
    return found


_MULTIPLES: WeakKeyDictionary[ShapeEnv, tuple[int, dict[sympy.Symbol, int]]] = WeakKeyDictionary()
"""Guards are only ever added: how many were read, and what they say."""


def _divides(equation: sympy.Eq) -> Iterator[tuple[sympy.Symbol, int]]:
    """`s % n = 0`, or what comes down to `s = n (s // n)`."""
    for rest in equation.atoms(Mod, PythonMod):
        symbol, by = rest.args
        if symbol.is_Symbol and by.is_Integer and equation in (sympy.Eq(rest, 0), sympy.Eq(0, rest)):
            yield symbol, int(by)
    for quotient in equation.atoms(FloorDiv):
        symbol, by = quotient.args
        if symbol.is_Symbol and by.is_Integer:
            part = sympy.Dummy(integer=True, positive=True)
            ratio = sympy.cancel(equation.lhs.subs(quotient, part) / equation.rhs.subs(quotient, part))
            if ratio in (symbol / (by * part), by * part / symbol):
                yield symbol, int(by)


def operator_name(node: fx.Node) -> str:
    """The qualified name of what a node calls, as rules are registered under: "aten::view"."""
    target: Any = node.target
    schema = getattr(target, "_schema", None)
    return schema.name if schema else getattr(target, "__name__", str(target))


def argument_names(node: fx.Node) -> list[str]:
    """The names of a call's positional arguments, by its schema where it has one."""
    schema = getattr(node.target, "_schema", None)
    return [each.name for each in schema.arguments] if schema else [str(k) for k in range(len(node.args))]


def named(node: fx.Node, args: Any = None, kwargs: Any = None) -> dict[str, Any]:
    """The arguments of a call, or those to replace them, by name."""
    args, kwargs = (node.args, node.kwargs) if args is None else (args, kwargs)
    return {**dict(zip(argument_names(node), args, strict=False)), **kwargs}
