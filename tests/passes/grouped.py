"""A run of tokens `t·h`, grouped once for each `b`, and what a rewriter knows of it: for tests of one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tldr_compile import ops
from tldr_compile.passes.axes import Atom, Axis, axis
from tldr_compile.passes.emit.resample import Converter, Grouped
from tldr_compile.passes.emit.views import Layout
from tldr_compile.passes.plan import Resolution

B, T, H, C = (Atom(size, label, clip=True) for size, label in zip((2, 3, 4, 5), "bthc", strict=True))
RUN, SAMPLES = axis(T, H), axis(B)


def resolution(
    index: int = 0, gone: int = 4, *, run: Axis = RUN, batch: Axis = SAMPLES, parent: Resolution | None = None
) -> Resolution:
    """`gone` tokens of the run, or of its parent's groups, have joined others."""
    before = parent.groups.size if parent else run.size
    return Resolution(index, run, batch, Atom(before - gone, f"n{index}"), Atom(gone), parent)


def grouping(tokens: int = 12, gone: int = 4, before: ops.Grouping | None = None) -> ops.Grouping:
    """Groups of random tokens with a saliency, so that masses are no counts."""
    generator = torch.Generator().manual_seed(tokens)
    metric, saliency = torch.randn(2, tokens, 3, generator=generator), torch.rand(2, tokens, generator=generator)
    mass, size = (before.mass, before.size) if before else (torch.ones(2, tokens),) * 2
    return ops.group(metric, saliency, mass, size, gone)


def emitted(
    emit: Callable[[Converter, fx.Node], fx.Node], x: Tensor, groupings: Mapping[Resolution, ops.Grouping]
) -> Tensor:
    """What a step emits for `x`, run on groupings."""
    graph = fx.Graph()
    values: list[Any] = [x]
    node = graph.placeholder("x")
    converter = Converter(Layout(graph), ops)
    for each, found in groupings.items():
        fields = {name: graph.placeholder(f"{name}{each.index}") for name in found._fields}
        converter = converter.knowing(each, Grouped(node, **fields))
        values.extend(found)
    graph.output(emit(converter, node))
    return fx.GraphModule({}, graph)(*values)
