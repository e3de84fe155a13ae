"""Operators that carry sizes or offsets in their arguments: how to write those anew once an axis has become shorter.

A resizing sees the call in its original types and as it is held now, and returns the operator and arguments to emit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from tldr_compile.passes.axes import Axes, Typed, border, segment_size
from tldr_compile.passes.sizes import Size, simplify

aten = torch.ops.aten


@dataclass(frozen=True)
class Held:
    """A call of `target` as it is done now.

    `given` are the arguments to emit by name, `x` and `outputs` the axes now held.
    """

    target: Any
    given: Mapping[str, Any]
    typed: Typed
    x: Axes
    outputs: tuple[Axes, ...]
    length: Callable[[Size], Any]

    def offset(self, offset: Size) -> Size:
        """Where an offset of the cut axis lies now. Whole segments have become one, and it is inside none of those."""
        assert self.typed.cut is not None
        whole, now = self.typed.reads[0][self.typed.cut], self.x[self.typed.cut].segments
        at = border(whole, offset)
        assert at is not None
        number, inside = at
        changed = next(
            (k for k, (one, two) in enumerate(zip(whole.segments, now, strict=False)) if one != two), len(now)
        )
        number = number if number <= changed else number - (len(whole.segments) - len(now))
        return simplify(sum((segment_size(segment) for segment in now[:number]), inside))


Emission: TypeAlias = tuple[Any, ...]
"""The operator, its arguments, and its keywords where it has any."""
RESIZE: dict[str, Callable[[Held], Emission]] = {}


def resize(*names: str) -> Callable[[Callable[[Held], Emission]], Callable[[Held], Emission]]:
    """Register a resizing under operator names; a plain name is ATen's."""

    def register(function: Callable[[Held], Emission]) -> Callable[[Held], Emission]:
        RESIZE.update({name if "::" in name else f"aten::{name}": function for name in names})
        return function

    return register


def _self(call: Held) -> Any:
    return call.given.get("self", call.given.get("input"))


@resize("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze")
def shape(call: Held) -> Emission:
    return aten.reshape.default, (_self(call), [call.length(axis.size) for axis in call.outputs[0]])


@resize("expand")
def expanded(call: Held) -> Emission:
    return aten.expand.default, (_self(call), [call.length(axis.size) for axis in call.outputs[0]])


@resize("new_zeros", "new_ones", "new_full", "new_empty")
def made(call: Held) -> Emission:
    """What is made as long as other values are is as long as they are now."""
    filled = (call.given["fill_value"],) if "fill_value" in call.given else ()
    lengths = [call.length(axis.size) for axis in call.outputs[0]]
    options = {name: value for name, value in call.given.items() if name not in ("self", "size", "fill_value")}
    return call.target, (_self(call), lengths, *filled), options


@resize("slice")
def borders(call: Held) -> Emission:
    (span,) = call.typed.spans
    if span is None:
        return aten.slice.Tensor, tuple(call.given.values())
    first, last = (call.length(call.offset(each)) for each in span)
    return aten.slice.Tensor, (_self(call), call.typed.cut, first, last)


@resize("select")
def index(call: Held) -> Emission:
    (span,) = call.typed.spans
    at = call.given["index"] if span is None else call.length(call.offset(span[0]))
    return aten.select.int, (_self(call), call.typed.cut, at)


@resize("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def pieces(call: Held) -> Emission:
    assert call.typed.cut is not None
    lengths = [call.length(axes[call.typed.cut].size) for axes in call.outputs]
    return aten.split_with_sizes.default, (_self(call), lengths, call.typed.cut)


@resize("native_group_norm")
def counted(call: Held) -> Emission:
    return aten.native_group_norm.default, tuple({**call.given, "N": call.length(call.x[0].size)}.values())
