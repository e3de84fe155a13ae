"""A loop over segments of one length that a tracer has unrolled, as one attention over a batch of segments.

    split(q, L)[0], split(k, L)[0], ...  ->  attention  ->  transpose  |
    split(q, L)[1], split(k, L)[1], ...  ->  attention  ->  transpose  |->  cat
    ->  q, k, v [.., S L, ..] as [S, .., L, ..]  ->  attention  ->  transpose  ->  [.., S L, ..]

Branches of a `cat` or `stack` are one where they do the same calls with the same constants on the pieces of common
tensors: all pieces, of one length, in order. Calls are done once, with a leading dimension for the segments, if their
operator is one of the few of `batched.py`. Anything else leaves the graph as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import getitem
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tldr_compile.passes.capture.batched import TABLE, Apart, Step, Value, Writer
from tldr_compile.passes.fx_utils import call_key, named
from tldr_compile.passes.sizes import is_open

aten = torch.ops.aten

_CUTS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default})
_Nodes: TypeAlias = tuple[fx.Node, ...]


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
        self.graph, self.joined, self.branches, self.write = graph, joined, branches, Writer(graph)
        self.known: dict[_Nodes, Value] = {}
        self.replaced: set[fx.Node] = set()

    def stack(self) -> None:
        try:
            new = self._join(self._all(self.branches))
            self._check_users()
        except Apart:
            self.write.erase()
            return
        self.joined.replace_all_uses_with(new)
        self.graph.erase_node(self.joined)

    def _check_users(self) -> None:
        attend = any(each.target is aten.scaled_dot_product_attention.default for each in self.replaced)
        readers = {*self.replaced, self.joined}
        if not attend or not all(readers.issuperset(each.users) for each in self.replaced):
            raise Apart

    # --- the walk ---

    def _all(self, nodes: _Nodes) -> Value:
        """Walk up from `nodes`, one of each branch, and do on the way down for all what each does."""
        pending = [nodes]
        while pending:
            above = [each for each in _above(pending[-1]) if not _is_one(each) and each not in self.known]
            if above:
                pending += above
            else:
                now = pending.pop()
                self.known[now] = self.known.get(now) or self._once(now)  # it may have been asked for twice
        return self.known[nodes]

    def value(self, nodes: _Nodes) -> Value:
        if _is_one(nodes):
            return Value(nodes[0], batched=False)
        if nodes not in self.known:
            raise Apart
        return self.known[nodes]

    def _once(self, nodes: _Nodes) -> Value:
        first = nodes[0]
        if (pieces := self._pieces(nodes)) is not None:
            return Value(pieces, batched=True)
        args, kwargs = self._same(tuple(each.args for each in nodes)), self._same(tuple(each.kwargs for each in nodes))
        step = Step(self.write, len(nodes), first, args, kwargs)
        if not any(each.batched for each in step.values):
            if first.is_impure() or torch.Tag.nondeterministic_seeded in getattr(first.target, "tags", ()):
                raise Apart
            return Value(first, batched=False)
        if first.target not in TABLE:
            raise Apart
        self.replaced.update(nodes)
        return Value(TABLE[first.target](step), batched=True)

    def _same(self, trees: tuple[Any, ...]) -> Any:
        """Arguments of all branches as those of one call."""
        first = trees[0]
        if all(isinstance(each, fx.Node) for each in trees):
            return self.value(trees)
        if any(type(each) is not type(first) for each in trees):
            raise Apart
        if isinstance(first, (tuple, list)) and {len(each) for each in trees} == {len(first)}:
            return [self._same(each) for each in zip(*trees, strict=True)]
        if isinstance(first, dict) and all(each.keys() == first.keys() for each in trees):
            return {key: self._same(tuple(each[key] for each in trees)) for key in first}
        if len({call_key(each, id) for each in trees}) != 1:
            raise Apart
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
            before, after = ([self.write.size(x, d) for d in dims] for dims in (range(dim), range(dim + 1, base.rank)))
            number = -1 if is_open(length) else length
            x = self.write(nodes[0], aten.reshape.default, x, [*before, count, number, *after])
        rank = x.meta["val"].ndim
        return self.write(nodes[0], aten.permute.default, x, [dim, *(d for d in range(rank) if d != dim)])

    def _join(self, value: Value) -> fx.Node:
        """`[S, .., L, ..]` as `[.., S L, ..]`, or for a `stack` `[S, ..]` as `[.., S, ..]`."""
        if not value.batched:
            raise Apart
        is_cat = self.joined.target is aten.cat.default
        dim = named(self.joined).get("dim", 0) % (value.rank + (not is_cat))
        order = list(range(1, value.rank + 1))
        x = self.write(self.joined, aten.permute.default, value.node, [*order[:dim], 0, *order[dim:]])
        if not is_cat:
            return x
        before, after = ([self.write.size(x, d) for d in dims] for dims in (range(dim), range(dim + 2, value.rank + 1)))
        length = self.joined.meta["val"].shape[dim]
        return self.write(self.joined, aten.reshape.default, x, [*before, -1 if is_open(length) else length, *after])


def _is_one(nodes: _Nodes) -> bool:
    return all(each is nodes[0] for each in nodes)


def _above(nodes: _Nodes) -> Iterator[_Nodes]:
    """What calls of one operator read."""
    alike = all(each.op == "call_function" and each.target is nodes[0].target for each in nodes)
    read = [each.all_input_nodes for each in nodes]
    if not alike or {len(each) for each in read} != {len(read[0])}:
        raise Apart
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
