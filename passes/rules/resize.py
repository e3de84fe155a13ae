"""Operators that carry sizes or offsets in their arguments: how to write those anew once an axis has become shorter.

A resizing sees the call in its original types and as it is held now, and returns the operator and arguments to emit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from passes.axes import Axes, Size, simplify, subaxis
from passes.rules.table import Typed

aten = torch.ops.aten


@dataclass(frozen=True)
class Held:
    """A call as it is done now: `given` are the arguments to emit by name, `x` and `outputs` the axes now held."""

    given: Mapping[str, Any]
    typed: Typed
    x: Axes
    outputs: tuple[Axes, ...]
    length: Callable[[Size], Any]

    def border(self, place: int) -> Size:
        """Where segment number `place` of the cut axis starts now; the original axis has as many segments or more."""
        assert self.typed.cut is not None
        full, now = self.typed.reads[0][self.typed.cut], self.x[self.typed.cut]
        lost = len(full.segments) - len(now.segments)
        at = place if place <= _first_change(full.segments, now.segments) else place - lost
        return simplify(sum((subaxis([segment]).size for segment in now.segments[:at]), 0))


Emission: TypeAlias = tuple[Any, tuple[Any, ...]]
RESIZE: dict[str, Callable[[Held], Emission]] = {}


def resize(*names: str) -> Callable[[Callable[[Held], Emission]], Callable[[Held], Emission]]:
    """Register a resizing under operator names; a plain name is ATen's."""

    def register(function: Callable[[Held], Emission]) -> Callable[[Held], Emission]:
        RESIZE.update({name if "::" in name else f"aten::{name}": function for name in names})
        return function

    return register


def _first_change(full: tuple[Any, ...], now: tuple[Any, ...]) -> int:
    return next(
        (k for k, (one, two) in enumerate(zip(full, now, strict=False)) if one != two), min(len(full), len(now))
    )


def _self(call: Held) -> Any:
    return call.given.get("self", call.given.get("input"))


@resize("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
def shape(call: Held) -> Emission:
    return aten.reshape.default, (_self(call), [call.length(axis.size) for axis in call.outputs[0]])


@resize("expand", "broadcast_to", "expand_as")
def expanded(call: Held) -> Emission:
    return aten.expand.default, (_self(call), [call.length(axis.size) for axis in call.outputs[0]])


@resize("slice")
def borders(call: Held) -> Emission:
    (place,) = call.typed.places
    if place[0] < 0:
        return aten.slice.Tensor, tuple(call.given.values())
    first, last = (call.length(call.border(border)) for border in place)
    return aten.slice.Tensor, (_self(call), call.typed.cut, first, last)


@resize("select")
def index(call: Held) -> Emission:
    (place,) = call.typed.places
    at = call.given["index"] if place[0] < 0 else call.length(call.border(place[0]))
    return aten.select.int, (_self(call), call.typed.cut, at)


@resize("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def pieces(call: Held) -> Emission:
    assert call.typed.cut is not None
    lengths = [call.length(axes[call.typed.cut].size) for axes in call.outputs]
    return aten.split_with_sizes.default, (_self(call), lengths, call.typed.cut)
