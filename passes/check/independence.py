"""No merge may raise a dependence: what the dense graph keeps apart, the merged one keeps apart.

Told by running both, so that nothing of the plan is shared: the second half of an input along a dimension is changed,
and every slice of an output that the dense graph leaves bit for bit as it was has to stay as it was.

x [b, ...] -> x with other samples b/2 .. b      dense: y[0] the same      merged: y[0] has to be the same
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from tldr_compile.passes.axes import TypedGraph

Run: TypeAlias = Callable[[Sequence[Any]], list[Tensor]]


@dataclass(frozen=True)
class Raised:
    """A slice of an output that moves with a part of an input, though the dense one does not."""

    name: str
    dim: int
    output: int
    at: tuple[int, int]
    moved: float

    def __str__(self) -> str:
        dim, index = self.at
        return (
            f"entries {index} along dimension {dim} of output {self.output} move by {self.moved:.3g} when the second "
            f"half of input {self.name!r} along dimension {self.dim} changes, and in the dense model they do not"
        )


def runs(graph: fx.GraphModule) -> Run:
    """A graph as a function of its flat inputs that draws the same at every call."""

    def run(inputs: Sequence[Any]) -> list[Tensor]:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            own = [each.clone() if isinstance(each, Tensor) else each for each in inputs]  # a graph may write to them
            results = fx.Interpreter(graph).run(*own)
        return [each for each in pytree.tree_leaves(results) if isinstance(each, Tensor)]

    return run


def raised(typed: TypedGraph, dense: Run, merged: Run, inputs: Sequence[Any], bound: float = 0.0) -> Iterator[Raised]:
    """Every dependence that a merged graph has and the dense one has not, as far as `inputs` tell.

    `bound` is what counts as the same, as a part of the largest magnitude: 0 where a sum does not depend on what runs
    beside it.
    """
    before, short = dense(inputs), merged(inputs)
    for number, dim in _halves(typed, inputs):
        length = inputs[number].shape[dim]
        first, second = (_changed(inputs, number, dim, seed) for seed in (1, 2))
        apart = list(_apart(before, dense(first), (length // 2, length)))
        if not apart:
            continue
        apart = [each for each in _apart(before, dense(second), (length // 2, length)) if each in apart]
        after = merged(first) if apart else []
        for output, along, index in apart:
            one, two = short[output], after[output]
            if one.shape[along] != before[output].shape[along]:
                continue
            moved = (one.select(along, index) - two.select(along, index)).abs().max()
            if moved > bound * one.abs().max():
                yield Raised(_name(typed, number), dim, output, (along, index), float(moved))


def _halves(typed: TypedGraph, inputs: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """Inputs that vary, as numbers, and their dimensions that can be halved; what is last is no sample and no frame."""
    for number, node in enumerate(typed.captured.graph.graph.find_nodes(op="placeholder")):
        value = inputs[number]
        if node.name not in typed.captured.constants and isinstance(value, Tensor) and value.is_floating_point():
            yield from ((number, dim) for dim in range(min(3, value.ndim - 1)) if value.shape[dim] > 1)


def _changed(inputs: Sequence[Any], number: int, dim: int, seed: int) -> list[Any]:
    value = inputs[number].clone()
    half = value.narrow(dim, value.shape[dim] // 2, value.shape[dim] - value.shape[dim] // 2)
    generator = torch.Generator().manual_seed(seed)
    half.copy_(torch.randn(half.shape, generator=generator).to(half) * (half.std() if half.numel() > 1 else 1))
    return [value if k == number else each for k, each in enumerate(inputs)]


def _apart(before: Sequence[Tensor], after: Sequence[Tensor], half: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
    """Outputs, leading dimensions and indices along them that a change of the second half did not reach.

    Of a dimension that is kept apart no entry of the first half is reached; that one of them is not may be luck.
    """
    for output, (one, two) in enumerate(zip(before, after, strict=True)):
        for dim in range(max(1, one.ndim - 1) if one.is_floating_point() and one.ndim else 0):
            first = one.shape[dim] * half[0] // half[1]
            if first and torch.equal(one.narrow(dim, 0, first), two.narrow(dim, 0, first)):
                yield from ((output, dim, index) for index in range(first))


def _name(typed: TypedGraph, number: int) -> str:
    node = list(typed.captured.graph.graph.find_nodes(op="placeholder"))[number]
    return typed.captured.names.get(node.name, node.name)
