"""What every dimension of every value is: axes with provenance.

In: a captured graph, and which of its inputs carry the video. Out: `TypedGraph`, the axes of all values and how every
call uses them.

    video [2, 3, 16, 224, 224]     b x 3 x t x h x w
      -> patches [2, 1568, 768]    b x t·h·w x 768

`algebra` is pure: atoms, segments, axes, and the substitution that solves equations between them. `rules` has one rule
for each operator. `infer` walks a graph with them. Nothing here knows what attention is or which tokens merge, and no
dimension is told from another by its size.
"""

from tldr_compile.passes.axes.algebra import (
    CONSTANT,
    PICTURE,
    UNIT,
    Atom,
    Axes,
    Axis,
    Factor,
    Role,
    Segment,
    axis,
    border,
    find,
    gathered,
    product,
    products,
    replace,
    segment_size,
    subaxis,
    touches,
)
from tldr_compile.passes.axes.infer import TypedGraph, Value, infer
from tldr_compile.passes.axes.rules import Kind, Typed, Use, rule

__all__ = [
    "CONSTANT",
    "PICTURE",
    "UNIT",
    "Atom",
    "Axes",
    "Axis",
    "Factor",
    "Kind",
    "Role",
    "Segment",
    "Typed",
    "TypedGraph",
    "Use",
    "Value",
    "axis",
    "border",
    "find",
    "gathered",
    "infer",
    "product",
    "products",
    "replace",
    "rule",
    "segment_size",
    "subaxis",
    "touches",
]
