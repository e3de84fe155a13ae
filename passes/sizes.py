"""Sizes of dimensions: a plain int, or a sympy formula of the sizes that the capture left open, in one normal form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

Size: TypeAlias = int | sympy.Expr


def simplify(size: Size) -> Size:
    """A size in one normal form, so that `==` compares: a plain int wherever it is a number."""
    if isinstance(size, int):
        return size
    expanded = sympy.expand(size)
    return int(expanded) if expanded.is_Integer else expanded


def divide(size: Size, by: Size) -> Size | None:
    """The exact quotient of two sizes, or None if there is none."""
    if isinstance(size, int) and isinstance(by, int):
        return size // by if by and size % by == 0 else None
    quotient = sympy.cancel(sympy.sympify(size) / sympy.sympify(by))
    numerator, denominator = quotient.as_numer_denom()
    return simplify(numerator) if denominator == 1 else None


def is_open(value: Any) -> bool:
    """Whether a traced number, or a size of a traced tensor, was left open."""
    numbers = value.shape if isinstance(value, torch.Tensor) else (value,)
    return any(isinstance(each, (torch.SymInt, torch.SymFloat, torch.SymBool)) for each in numbers)


def one_symbol(length: Size) -> tuple[sympy.Symbol, int, int] | None:
    """`(symbol, a, b)` of a size `a * symbol + b`; None of any other size."""
    if isinstance(length, int) or len(length.free_symbols) != 1:
        return None
    (symbol,) = length.free_symbols
    if not length.is_polynomial(symbol):
        return None
    times, offset = length.coeff(symbol), length.subs(symbol, 0)
    exact = times.is_Integer and offset.is_Integer and simplify(length - times * symbol - offset) == 0
    return (symbol, int(times), int(offset)) if exact and times != 0 else None


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
