"""Operators that stand for several others: what they do, in plain operators, so that it is found, typed and merged.

my::attention(x)  ->  ... -> scaled_dot_product_attention -> ...

A decomposition takes the operator's arguments and returns what it returns. It is traced in the operator's place when a
model is captured, whatever way the tracer wrote the call down. Register one with `@decomposition("my::attention")`; a
higher-order operator is named without a namespace.
"""

from __future__ import annotations

from collections.abc import Callable
from types import BuiltinFunctionType
from typing import Any, TypeAlias

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

Decomposition: TypeAlias = Callable[..., Any]
DECOMPOSITIONS: dict[str, Decomposition] = {}


def decomposition(*names: str) -> Callable[[Decomposition], Decomposition]:
    """Register what the operators `names` do; the function is called with their arguments, traced."""

    def register(function: Decomposition) -> Decomposition:
        DECOMPOSITIONS.update(dict.fromkeys(names, function))
        return function

    return register


def decomposition_of(target: Any) -> Decomposition | None:
    """What an operator does in plain ones, if that is known."""
    return DECOMPOSITIONS.get(_name(target) or "")


def _name(target: Any) -> str | None:
    """The name of an operator as its schema has it: of an overload, of all overloads, or of a function of torch."""
    if isinstance(target, OpOverload):
        return target._schema.name
    if isinstance(target, OpOverloadPacket):
        return target._qualified_op_name
    if isinstance(target, HigherOrderOperator):
        return target.name()
    name = getattr(target, "__name__", None)
    is_torchs = isinstance(target, BuiltinFunctionType) and getattr(torch, str(name), None) is target
    return f"aten::{name}" if is_torchs else None
