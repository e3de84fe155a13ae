"""Calls of one branch of a loop, done once for all branches: values get a leading dimension for the segments.

    transpose(x [H, L, d], 0, 1)   ->   transpose(x [S, H, L, d], -3, -2)

Register what an operator's call becomes with `@batched(target)`. Only operators whose batched form is certain are here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import getitem
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tldr_compile.passes.capture.sums import Call
from tldr_compile.passes.fx_utils import argument_names, named
from tldr_compile.passes.sizes import is_open

aten = torch.ops.aten

# Everything else would lay a result of more dimensions out otherwise.
_LAYOUTS = (None, torch.contiguous_format, torch.preserve_format)


class Apart(Exception):
    """Branches that differ, or a call whose batched form is not certain."""


class Value(NamedTuple):
    """What a value is in all branches: one for each, along a leading dimension of `node`, or the same for all."""

    node: fx.Node
    batched: bool

    @property
    def rank(self) -> int:
        """In a branch."""
        rank: int = self.node.meta["val"].ndim
        return rank - self.batched


@dataclass(frozen=True)
class Writer:
    """Writes calls into a graph, at its insertion point; `made` are all of them."""

    graph: fx.Graph
    made: list[fx.Node] = field(default_factory=list)

    def __call__(self, origin: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call in the place of `origin`, of which it tells where the model has it."""
        self.made.append(Call(self.graph, origin)(target, *args, **kwargs))
        return self.made[-1]

    def size(self, node: fx.Node, dim: int) -> Any:
        """A size as an argument: a number, or the node that reads it where it is open."""
        size = node.meta["val"].shape[dim]
        return self(node, aten.sym_size.int, node, dim) if is_open(size) else size

    def erase(self) -> None:
        """All that was written, as if it had not been."""
        while self.made:
            self.graph.erase_node(self.made.pop())


@dataclass(frozen=True)
class Step:
    """One call of a branch of `count`, with what its arguments are in all branches; `origin` is that of the first."""

    write: Writer
    count: int
    origin: fx.Node
    args: list[Any]
    kwargs: dict[str, Any]

    @property
    def given(self) -> dict[str, Any]:
        return named(self.origin, self.args, self.kwargs)

    @property
    def values(self) -> list[Value]:
        """The tensors among the arguments, and all that differs from branch to branch."""
        found = _values((self.args, self.kwargs))
        return [each for each in found if each.batched or isinstance(each.node.meta["val"], torch.Tensor)]

    @property
    def rank(self) -> int:
        """Of the operands in a branch, all of which differ from branch to branch, and have as many dimensions."""
        ranks = {each.rank for each in self.values}
        if len(ranks) != 1 or not all(each.batched for each in self.values) or ranks == {0}:
            raise Apart
        return ranks.pop()

    def again(self, **changed: Any) -> fx.Node:
        """The call, with some arguments changed."""
        names = argument_names(self.origin)
        args = [changed.pop(name, each) for name, each in zip(names, self.args, strict=False)]
        return self.write(self.origin, self.origin.target, *_nodes(args), **_nodes({**self.kwargs, **changed}))


def _values(tree: Any) -> Iterator[Value]:
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, (tuple, list, dict)):
        for each in tree.values() if isinstance(tree, dict) else tree:
            yield from _values(each)


def _nodes(tree: Any) -> Any:
    if isinstance(tree, Value):
        return tree.node
    if isinstance(tree, dict):
        return {key: _nodes(each) for key, each in tree.items()}
    return [_nodes(each) for each in tree] if isinstance(tree, (tuple, list)) else tree


_Batched: TypeAlias = Callable[[Step], fx.Node]
TABLE: dict[Any, _Batched] = {}


def batched(*targets: Any) -> Callable[[_Batched], _Batched]:
    def register(function: _Batched) -> _Batched:
        TABLE.update(dict.fromkeys(targets, function))
        return function

    return register


@batched(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.add.Tensor, aten.sub.Tensor)
@batched(aten.clone.default, aten._to_copy.default, aten.alias.default, aten.detach.default, aten.neg.default)
@batched(aten.gelu.default)
def _pointwise(step: Step) -> fx.Node:
    """What differs has all dimensions of the result, so that what is common is broadcast against the last ones."""
    rank = step.origin.meta["val"].ndim
    wrong = any(each.rank > rank or (each.batched and each.rank != rank) for each in step.values)
    if rank == 0 or wrong or step.given.get("memory_format") not in _LAYOUTS:
        raise Apart
    return step.again()


@batched(aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
@batched(aten.select.int, aten.squeeze.dim, aten.cat.default)
def _along(step: Step) -> fx.Node:
    """A dimension counted from the last."""
    return step.again(dim=step.given.get("dim", 0) % step.rank - step.rank)


@batched(aten.unsqueeze.default)
def _unsqueezed(step: Step) -> fx.Node:
    return step.again(dim=step.given["dim"] % (step.rank + 1) - step.rank - 1)


@batched(aten.transpose.int)
def _transposed(step: Step) -> fx.Node:
    return step.again(**{name: step.given[name] % step.rank - step.rank for name in ("dim0", "dim1")})


@batched(aten.permute.default)
def _permuted(step: Step) -> fx.Node:
    return step.again(dims=[0, *(each % step.rank + 1 for each in step.given["dims"])])


@batched(aten.reshape.default)
def _reshaped(step: Step) -> fx.Node:
    if not step.given["self"].batched:
        raise Apart
    return step.again(shape=[step.count, *step.given["shape"]])


@batched(aten.expand.default)
def _expanded(step: Step) -> fx.Node:
    """Along dimensions that are there."""
    size = step.given["size"]
    if not step.given["self"].batched or len(size) != step.given["self"].rank:
        raise Apart
    return step.again(size=[step.count, *size])


@batched(getitem)
def _taken(step: Step) -> fx.Node:
    return step.again()


@batched(aten.linear.default, aten.layer_norm.default)
def _over_last(step: Step) -> fx.Node:
    """Over the last dimensions, with weights that are common."""
    x, *others = step.values
    if not x.batched or any(each.batched for each in others):
        raise Apart
    return step.again()


@batched(aten.scaled_dot_product_attention.default)
def _attended(step: Step) -> fx.Node:
    """`[S, B, H, L, d]` as `[S B, H, L, d]`; `[S, H, L, d]` as it is."""
    given, rank = step.given, step.origin.meta["val"].ndim
    inputs = [given[name] for name in ("query", "key", "value")]
    mask = given.get("attn_mask")
    differ = [*inputs, *([mask] if mask is not None and mask.batched else [])]
    fits = rank in (3, 4) and all(each.batched and each.rank == rank for each in differ)
    if not fits or given.get("dropout_p", 0.0) != 0.0 or (mask is not None and mask.rank > rank):
        raise Apart
    if rank == 3:
        return step.again()
    batch = inputs[0].node.meta["val"].shape[1]
    broadcast = mask is not None and not mask.batched and mask.rank == 4 and mask.node.meta["val"].shape[0] != 1
    if broadcast or not all(statically_known_true(each.node.meta["val"].shape[1] == batch) for each in differ):
        raise Apart
    folded = {name: _folded(step, each) for name, each in given.items() if isinstance(each, Value) and each.batched}
    attended = step.again(**folded)
    shape = [step.count, -1 if is_open(batch) else batch, *(step.write.size(attended, d) for d in (1, 2, 3))]
    return step.write(step.origin, aten.reshape.default, attended, shape)


def _folded(step: Step, value: Value) -> fx.Node:
    """Segments and samples `[S, B, ..]` as one batch `[S B, ..]`."""
    x = value.node
    batch = x.meta["val"].shape[1]
    shape = [-1 if is_open(batch) else step.count * batch, *(step.write.size(x, d) for d in (2, 3, 4))]
    return step.write(step.origin, aten.reshape.default, x, shape)
