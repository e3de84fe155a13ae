"""A loop over segments of one length that a tracer has unrolled, as one attention over a batch of segments.

    split(q, L)[0], split(k, L)[0], ...  ->  attention  ->  transpose  |
    split(q, L)[1], split(k, L)[1], ...  ->  attention  ->  transpose  |->  cat
    ->  q, k, v [.., S L, ..] as [S, .., L, ..]  ->  attention  ->  transpose  ->  [.., S L, ..]

Branches of a `cat` or `stack` are one where they do the same calls with the same constants on the pieces of common
tensors: all pieces, of one length, in order. Calls are done once, with a leading dimension for the segments, if their
operator is one of the few whose batched form is certain. Anything else leaves the graph as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import getitem
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tldr_compile.passes.capture.sums import Call
from tldr_compile.passes.fx_utils import argument_names, call_key, named
from tldr_compile.passes.sizes import is_open

aten = torch.ops.aten

_CUTS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default})
# Everything else would lay a result of more dimensions out otherwise.
_LAYOUTS = (None, torch.contiguous_format, torch.preserve_format)


class _Apart(Exception):
    """Branches that differ, or a call whose batched form is not certain."""


_Nodes: TypeAlias = tuple[fx.Node, ...]


class _Value(NamedTuple):
    """What a value is in all branches: one for each, along a leading dimension of `node`, or the same for all."""

    node: fx.Node
    batched: bool

    @property
    def rank(self) -> int:
        """In a branch."""
        rank: int = self.node.meta["val"].ndim
        return rank - self.batched


class _Piece(NamedTuple):
    base: fx.Node
    dim: int
    start: Any
    whole: bool  # whether it has the dimension along which it was cut, with some length; else it is one entry


def stack_segments(graph: fx.Graph) -> None:
    """Do every attention once that a loop does over segments of one length, in place."""
    for target in (aten.cat.default, aten.stack.default):
        for joined in graph.find_nodes(op="call_function", target=target):
            branches: Any = joined.args[0]
            if len(branches) > 1 and len({each.target for each in branches}) == 1:
                with graph.inserting_before(joined):
                    _Loop(graph, joined, tuple(branches)).stack()


class _Loop:
    def __init__(self, graph: fx.Graph, joined: fx.Node, branches: _Nodes) -> None:
        self.graph, self.joined, self.branches = graph, joined, branches
        self.known: dict[_Nodes, _Value] = {}
        self.replaced: set[fx.Node] = set()
        self.made: list[fx.Node] = []

    def stack(self) -> None:
        try:
            new = self._join(self._all(self.branches))
            self._check_users()
        except _Apart:
            for node in reversed(self.made):
                self.graph.erase_node(node)
            return
        self.joined.replace_all_uses_with(new)
        self.graph.erase_node(self.joined)

    def _check_users(self) -> None:
        attend = any(each.target is aten.scaled_dot_product_attention.default for each in self.replaced)
        if not attend or any(not self.replaced.union((self.joined,)).issuperset(each.users) for each in self.replaced):
            raise _Apart

    def put(self, origin: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call in the place of the first branch's `origin`."""
        self.made.append(Call(self.graph, origin)(target, *args, **kwargs))
        return self.made[-1]

    def size(self, node: fx.Node, dim: int) -> Any:
        """A size as an argument: a number, or the node that reads it where it is open."""
        size = node.meta["val"].shape[dim]
        return self.put(node, aten.sym_size.int, node, dim) if is_open(size) else size

    # --- the walk ---

    def _all(self, nodes: _Nodes) -> _Value:
        """Walk up from `nodes`, one of each branch, and do on the way down for all what each does."""
        pending = [nodes]
        while pending:
            above = [each for each in _above(pending[-1]) if not _is_one(each) and each not in self.known]
            if above:
                pending += above
            else:
                now = pending.pop()
                self.known[now] = self._once(now)
        return self.known[nodes]

    def value(self, nodes: _Nodes) -> _Value:
        if _is_one(nodes):
            return _Value(nodes[0], batched=False)
        if nodes not in self.known:
            raise _Apart
        return self.known[nodes]

    def _once(self, nodes: _Nodes) -> _Value:
        first = nodes[0]
        if any(each.op != "call_function" or each.target is not first.target for each in nodes):
            raise _Apart
        if (pieces := self._pieces(nodes)) is not None:
            return _Value(pieces, batched=True)
        args, kwargs = self._same(tuple(each.args for each in nodes)), self._same(tuple(each.kwargs for each in nodes))
        step = _Step(self, first, args, kwargs)
        if not any(each.batched for each in step.values):
            if first.is_impure() or torch.Tag.nondeterministic_seeded in getattr(first.target, "tags", ()):
                raise _Apart
            return _Value(first, batched=False)
        if first.target not in _TABLE:
            raise _Apart
        self.replaced.update(nodes)
        return _Value(_TABLE[first.target](step), batched=True)

    def _same(self, trees: tuple[Any, ...]) -> Any:
        """Arguments of all branches as those of one call."""
        first = trees[0]
        if all(isinstance(each, fx.Node) for each in trees):
            return self.value(trees)
        if any(type(each) is not type(first) for each in trees):
            raise _Apart
        if isinstance(first, (tuple, list)) and {len(each) for each in trees} == {len(first)}:
            return [self._same(each) for each in zip(*trees, strict=True)]
        if isinstance(first, dict) and all(each.keys() == first.keys() for each in trees):
            return {key: self._same(tuple(each[key] for each in trees)) for key in first}
        if len({call_key(each, id) for each in trees}) != 1:
            raise _Apart
        return first

    # --- where branches begin and end ---

    def _pieces(self, nodes: _Nodes) -> fx.Node | None:
        """Pieces `[.., L, ..]` or entries `[..]` of one tensor, all and in order, as `[S, .., L, ..]` or `[S, ..]`."""
        found = [piece for node in nodes if (piece := _piece(node)) is not None]
        if len(found) < len(nodes):
            return None
        base, count = self.value(tuple(each.base for each in found)), len(nodes)
        (_, dim, _, whole), x = found[0], base.node
        length = nodes[0].meta["val"].shape[dim] if whole else 1
        in_order = not base.batched and all(
            (each.dim, each.whole) == (dim, whole)
            and (not whole or statically_known_true(node.meta["val"].shape[dim] == length))
            and statically_known_true(each.start == k * length)
            for k, (node, each) in enumerate(zip(nodes, found, strict=True))
        )
        if not in_order or not statically_known_true(x.meta["val"].shape[dim] == count * length):
            return None
        if whole:
            before, after = ([self.size(x, d) for d in dims] for dims in (range(dim), range(dim + 1, base.rank)))
            number = -1 if is_open(length) else length
            x = self.put(nodes[0], aten.reshape.default, x, [*before, count, number, *after])
        rank = x.meta["val"].ndim
        return self.put(nodes[0], aten.permute.default, x, [dim, *(d for d in range(rank) if d != dim)])

    def _join(self, value: _Value) -> fx.Node:
        """`[S, .., L, ..]` as `[.., S L, ..]`, or for a `stack` `[S, ..]` as `[.., S, ..]`."""
        if not value.batched:
            raise _Apart
        is_cat = self.joined.target is aten.cat.default
        dim = named(self.joined).get("dim", 0) % (value.rank + (not is_cat))
        order = list(range(1, value.rank + 1))
        x = self.put(self.joined, aten.permute.default, value.node, [*order[:dim], 0, *order[dim:]])
        if not is_cat:
            return x
        before, after = ([self.size(x, d) for d in dims] for dims in (range(dim), range(dim + 2, value.rank + 1)))
        length = self.joined.meta["val"].shape[dim]
        return self.put(self.joined, aten.reshape.default, x, [*before, -1 if is_open(length) else length, *after])


def _is_one(nodes: _Nodes) -> bool:
    return all(each is nodes[0] for each in nodes)


def _above(nodes: _Nodes) -> Iterator[_Nodes]:
    read = [each.all_input_nodes for each in nodes]
    if {len(each) for each in read} != {len(read[0])}:
        raise _Apart
    return zip(*read, strict=True)


def _piece(node: fx.Node) -> _Piece | None:
    """A piece of a tensor, if it is one."""
    given = named(node)
    if node.target is getitem and isinstance(node.args[0], fx.Node):
        cut, number = node.args[0], node.args[1]
        of = named(cut)
        if cut.target is aten.unbind.int:
            return _Piece(of["self"], of.get("dim", 0) % cut.args[0].meta["val"].ndim, number, False)  # type: ignore[union-attr]
        if cut.target in _CUTS:
            dim = of.get("dim", 0) % node.meta["val"].ndim
            return _Piece(of["self"], dim, sum(each.shape[dim] for each in cut.meta["val"][:number]), True)
    if node.target is aten.select.int:
        return _Piece(given["self"], given["dim"] % (node.meta["val"].ndim + 1), given["index"], False)
    if node.target is aten.slice.Tensor and given.get("step", 1) == 1:
        start = given.get("start") or 0
        return _Piece(given["self"], given.get("dim", 0) % node.meta["val"].ndim, start, True)
    return None


# --- calls, done for all segments at once ---


@dataclass(frozen=True)
class _Step:
    """One call of a branch, with what its arguments are in all branches; `origin` is that of the first."""

    loop: _Loop
    origin: fx.Node
    args: list[Any]
    kwargs: dict[str, Any]

    @property
    def count(self) -> int:
        return len(self.loop.branches)

    @property
    def given(self) -> dict[str, Any]:
        return named(self.origin, self.args, self.kwargs)

    @property
    def values(self) -> list[_Value]:
        """The tensors among the arguments, and all that differs from branch to branch."""
        found = _values((self.args, self.kwargs))
        return [each for each in found if each.batched or isinstance(each.node.meta["val"], torch.Tensor)]

    @property
    def rank(self) -> int:
        """Of the operands in a branch, all of which differ from branch to branch, and have as many dimensions."""
        ranks = {each.rank for each in self.values}
        if len(ranks) != 1 or not all(each.batched for each in self.values) or ranks == {0}:
            raise _Apart
        return ranks.pop()

    def again(self, **changed: Any) -> fx.Node:
        """The call, with some arguments changed."""
        names = argument_names(self.origin)
        args = [changed.pop(name, each) for name, each in zip(names, self.args, strict=False)]
        return self.loop.put(self.origin, self.origin.target, *_nodes(args), **_nodes({**self.kwargs, **changed}))


def _values(tree: Any) -> Iterator[_Value]:
    if isinstance(tree, _Value):
        yield tree
    elif isinstance(tree, (tuple, list, dict)):
        for each in tree.values() if isinstance(tree, dict) else tree:
            yield from _values(each)


def _nodes(tree: Any) -> Any:
    if isinstance(tree, _Value):
        return tree.node
    if isinstance(tree, dict):
        return {key: _nodes(each) for key, each in tree.items()}
    return [_nodes(each) for each in tree] if isinstance(tree, (tuple, list)) else tree


_Batched: TypeAlias = Callable[[_Step], fx.Node]
_TABLE: dict[Any, _Batched] = {}


def _batched(*targets: Any) -> Callable[[_Batched], _Batched]:
    def register(function: _Batched) -> _Batched:
        _TABLE.update(dict.fromkeys(targets, function))
        return function

    return register


@_batched(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.add.Tensor, aten.sub.Tensor)
@_batched(aten.clone.default, aten._to_copy.default, aten.alias.default, aten.detach.default, aten.neg.default)
@_batched(aten.gelu.default)
def _pointwise(step: _Step) -> fx.Node:
    """What differs has all dimensions of the result, so that what is common is broadcast against the last ones."""
    rank = step.origin.meta["val"].ndim
    wrong = any(each.rank > rank or (each.batched and each.rank != rank) for each in step.values)
    if rank == 0 or wrong or step.given.get("memory_format") not in _LAYOUTS:
        raise _Apart
    return step.again()


@_batched(aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
@_batched(aten.select.int, aten.squeeze.dim, aten.cat.default)
def _along(step: _Step) -> fx.Node:
    """A dimension counted from the last."""
    return step.again(dim=step.given.get("dim", 0) % step.rank - step.rank)


@_batched(aten.unsqueeze.default)
def _unsqueezed(step: _Step) -> fx.Node:
    return step.again(dim=step.given["dim"] % (step.rank + 1) - step.rank - 1)


@_batched(aten.transpose.int)
def _transposed(step: _Step) -> fx.Node:
    return step.again(**{name: step.given[name] % step.rank - step.rank for name in ("dim0", "dim1")})


@_batched(aten.permute.default)
def _permuted(step: _Step) -> fx.Node:
    return step.again(dims=[0, *(each % step.rank + 1 for each in step.given["dims"])])


@_batched(aten.reshape.default)
def _reshaped(step: _Step) -> fx.Node:
    if not step.given["self"].batched:
        raise _Apart
    return step.again(shape=[step.count, *step.given["shape"]])


@_batched(aten.expand.default)
def _expanded(step: _Step) -> fx.Node:
    """Along dimensions that are there."""
    size = step.given["size"]
    if not step.given["self"].batched or len(size) != step.given["self"].rank:
        raise _Apart
    return step.again(size=[step.count, *size])


@_batched(getitem)
def _taken(step: _Step) -> fx.Node:
    return step.again()


@_batched(aten.linear.default, aten.layer_norm.default)
def _over_last(step: _Step) -> fx.Node:
    """Over the last dimensions, with weights that are common."""
    x, *others = step.values
    if not x.batched or any(each.batched for each in others):
        raise _Apart
    return step.again()


@_batched(aten.scaled_dot_product_attention.default)
def _attended(step: _Step) -> fx.Node:
    """`[S, B, H, L, d]` as `[S B, H, L, d]`; `[S, H, L, d]` as it is."""
    given, rank = step.given, step.origin.meta["val"].ndim
    inputs = [given[name] for name in ("query", "key", "value")]
    mask = given.get("attn_mask")
    differ = [*inputs, *([mask] if mask is not None and mask.batched else [])]
    fits = rank in (3, 4) and all(each.batched and each.rank == rank for each in differ)
    if not fits or given.get("dropout_p", 0.0) != 0.0 or (mask is not None and mask.rank > rank):
        raise _Apart
    if rank == 3:
        return step.again()
    batch = inputs[0].node.meta["val"].shape[1]
    broadcast = mask is not None and not mask.batched and mask.rank == 4 and mask.node.meta["val"].shape[0] != 1
    if broadcast or not all(statically_known_true(each.node.meta["val"].shape[1] == batch) for each in differ):
        raise _Apart
    folded = {name: _folded(step, each) for name, each in given.items() if isinstance(each, _Value) and each.batched}
    attended = step.again(**folded)
    shape = [step.count, -1 if is_open(batch) else batch, *(step.loop.size(attended, d) for d in (1, 2, 3))]
    return step.loop.put(step.origin, aten.reshape.default, attended, shape)


def _folded(step: _Step, value: _Value) -> fx.Node:
    """Segments and samples `[S, B, ..]` as one batch `[S B, ..]`."""
    x = value.node
    batch = x.meta["val"].shape[1]
    shape = [-1 if is_open(batch) else step.count * batch, *(step.loop.size(x, d) for d in (2, 3, 4))]
    return step.loop.put(step.origin, aten.reshape.default, x, shape)
