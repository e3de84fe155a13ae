"""Sizes in a normal form that knows what the traced program divides evenly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from tldr_compile.passes.sizes import size

GUARDS: dict[str, Callable[[torch.SymInt], bool]] = {
    "a remainder": lambda s: bool(s % 4 == 0),
    "a multiple": lambda s: bool(4 * (s // 4) == s),
    "entries of a view": lambda s: bool(18 * s == 72 * (s // 4)),
    "two divisors": lambda s: bool(s % 4 == 0) and bool(6 * (s // 6) == s),
}


def symbol(hint: int = 24) -> torch.SymInt:
    env = ShapeEnv()
    made = env.create_symbol(hint, ConstantSource("s"), dynamic_dim=DimDynamic.DYNAMIC)
    found = env.create_symintnode(made, hint=hint)
    assert isinstance(found, torch.SymInt)
    return found


@pytest.mark.parametrize("guard", GUARDS)
def test_what_is_divided_evenly_comes_out_whole(guard: str) -> None:
    s = symbol()
    assert GUARDS[guard](s)
    assert size(s // (s // 4)) == 4
    assert size(4 * (s // 4)) == size(s)
    assert size(s // (2 * (s // 4))) == 2
    assert size(s // 4) != size(s)


def test_what_no_guard_says_is_left_open() -> None:
    s = symbol()
    assert size(s // (s // 4)) != 4
    assert bool(s % (s // 4) == 0)  # as of 5, whose fifth part of a fourth is 5
    assert size(s // (s // 4)) != 4
    assert bool(s != 25)
    assert size(s) == s.node.expr
    assert bool(s % 4 == 0)
    assert size(s // (s // 4)) == 4
