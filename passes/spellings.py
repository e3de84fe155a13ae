"""Operators that stand for several others: what they do, in plain operators, so that it is found, typed and merged.

my::attention(x)  ->  ... -> scaled_dot_product_attention -> ...

A spelling takes the operator's arguments and returns what it returns. It is traced in the operator's place when a model
is captured. Register one with `@spelling("my::attention")`; a higher-order operator is named without a namespace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch._ops import HigherOrderOperator, OpOverload

Spelling: TypeAlias = Callable[..., Any]
SPELLINGS: dict[str, Spelling] = {}


def spelling(*names: str) -> Callable[[Spelling], Spelling]:
    """Register what the operators `names` do; the function is called with their arguments, traced."""

    def register(function: Spelling) -> Spelling:
        SPELLINGS.update(dict.fromkeys(names, function))
        return function

    return register


def spelled(target: Any) -> Spelling | None:
    """What an operator does in plain ones, if that is known."""
    if isinstance(target, OpOverload):
        return SPELLINGS.get(target._schema.name)
    return SPELLINGS.get(target.name()) if isinstance(target, HigherOrderOperator) else None
