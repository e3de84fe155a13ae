"""Find attention, fused or spelled out, and spell all of it one way.

    product -> scale -> mask -> softmax -> dropout -> product          scaled_dot_product_attention
      q  k      s        m                   p          v       ->            q k v m s p

One description with alternatives, walked up and down from the softmax. What does not fit is a near miss with its
reason. Einsum is a product too, spelled with letters; probabilities of sinks, which are no tokens, may be cut off.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from operator import getitem
from typing import Any

import torch
from torch import fx

from tldr_compile.passes.capture.canonicalize import Captured
from tldr_compile.passes.capture.heads import CUT, DROPOUT, PRODUCT, Read, onward
from tldr_compile.passes.capture.segments import stack_segments
from tldr_compile.passes.capture.sums import decompose, insert
from tldr_compile.passes.capture.varlen import spell_varlen
from tldr_compile.passes.fx_utils import lazy_module, named, operands, operator_name
from tldr_compile.passes.refusal import Refusal

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default

_SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})
_EINSUM = aten.einsum.default
_THROUGH = frozenset({aten.clone.default, aten._to_copy.default, aten.alias.default})
_TRANSPOSE = frozenset({aten.transpose.int, aten.permute.default})
# What probabilities pass on their way to the values as they are, or as heads that are laid otherwise.
_PLAIN = frozenset({*_THROUGH, CUT, DROPOUT, getitem, aten.reshape.default})
_KERNEL = "aten::_scaled_dot_product_"
# A finite fill this low leaves exactly nothing after the exponential, in every dtype that has it.
_NOTHING = -1e4


@dataclass(frozen=True)
class Attention:
    """One attention of a graph; `node` is its result.

    It is `scaled_dot_product_attention`, or spelled out where it has `probabilities [..., H, N, M]`: something else
    reads them, or something that the operator does not know stands before the softmax or cuts its result. All
    dimensions of `queries` but the last are the batch, the heads and the queries; `keys [..., H, M, d]` may be unknown
    where it is spelled out.
    """

    node: fx.Node
    queries: fx.Node
    keys: fx.Node | None
    masks: tuple[fx.Node, ...] = ()
    causal: bool = False
    probabilities: fx.Node | None = None

    @property
    def scored(self) -> fx.Node:
        """Where queries meet keys."""
        return self.probabilities or self.node


@dataclass(frozen=True)
class _Scores:
    """What was met on the way up from a softmax."""

    scale: float = 1.0
    masks: tuple[fx.Node, ...] = ()
    fills: tuple[tuple[fx.Node, float], ...] = ()
    q: fx.Node | None = None
    keys: fx.Node | None = None  # [..., d, M]


@dataclass
class _Search:
    found: list[_Match] = field(default_factory=list)
    misses: list[Refusal] = field(default_factory=list)


@dataclass(frozen=True)
class _Match:
    probabilities: fx.Node
    output: fx.Node
    scores: _Scores | None
    dropout: float


def fuse(captured: Captured) -> tuple[Captured, tuple[Attention, ...], tuple[Refusal, ...]]:
    """A copy in which every attention is one operator, with all attentions in execution order and the near misses.

    An attention that the operator cannot say (see `Attention`) stays, and is found where it stands.
    """
    graph = copy.deepcopy(captured.graph.graph)
    for node in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        graph.erase_node(node)  # facts of the capture, which hold; they would keep what is fused alive
    decompose(graph)
    for target in (aten.view.default, aten._unsafe_view.default):
        for node in graph.find_nodes(op="call_function", target=target):
            node.target = aten.reshape.default  # another attention kernel may lay its result out in another order
    for node in graph.find_nodes(op="call_function", target=_EINSUM):
        _spell_einsum(graph, node)
    for target in PRODUCT:
        for node in graph.find_nodes(op="call_function", target=target):
            _turn(graph, node)
    for node in graph.find_nodes(op="call_function", target=getitem):
        if operator_name(node.args[0]).startswith(_KERNEL) and node.args[1] == 0:
            _replace_kernel(graph, node)
    whole = spell_varlen(graph)
    search = _search(graph)
    for match in search.found:
        if match.scores is not None:
            _replace(graph, match, match.scores)
    stack_segments(graph)
    graph.eliminate_dead_code(lambda node: not _draws(node) and node.is_impure())
    kept = {match.output: match for match in search.found if match.scores is None}
    attentions = tuple(_attentions(graph, kept))
    module = lazy_module(captured.graph, graph)
    module.meta.update(captured.graph.meta)
    return replaced(captured, graph=module), attentions, (*whole, *search.misses)


def _draws(node: fx.Node) -> bool:
    """Operators that may draw random numbers, which is no reason to keep one whose result nobody reads."""
    return node.target in (DROPOUT, SDPA) or operator_name(node).startswith(_KERNEL)


def _attentions(graph: fx.Graph, kept: dict[fx.Node, _Match]) -> Iterator[Attention]:
    for node in graph.nodes:
        if node.target is SDPA:
            given = named(node)
            mask = given.get("attn_mask")
            masks = (mask,) if isinstance(mask, fx.Node) else ()
            yield Attention(node, given["query"], given["key"], masks, given.get("is_causal", False))
        elif node in kept:
            probabilities = kept[node].probabilities
            scores = _up(probabilities.args[0], _Scores())
            keys = None
            if not isinstance(scores, str):
                with graph.inserting_before(node):
                    keys = _untransposed(graph, scores.keys)
            yield Attention(node, probabilities, keys, probabilities=probabilities)


def _search(graph: fx.Graph) -> _Search:
    search = _Search()
    for softmax in graph.nodes:
        if softmax.target not in _SOFTMAX:
            continue
        rank = softmax.meta["val"].ndim
        if rank < 3 or softmax.args[1] % rank != rank - 1:
            search.misses.append(Refusal(softmax, "it does not run over the last of at least three dimensions"))
            continue
        down = _down(softmax)
        if isinstance(down, str):
            search.misses.append(Refusal(softmax, down))
            continue
        probabilities, output, dropout, escapes = down
        scores = _up(probabilities.args[0], _Scores())
        fits = probabilities is softmax and not escapes and not isinstance(scores, str)
        search.found.append(_Match(probabilities, output, scores if fits else None, dropout))  # type: ignore[arg-type]
    return search


def _up(node: Any, met: _Scores) -> _Scores | str:
    """From the softmax's argument up to the product of queries and keys; or why it is not there."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return "the scores do not come from a product of queries and keys"
    if node.target in _THROUGH:
        return _up(node.args[0], met)
    if node.target in PRODUCT:
        query, keys = operands(node)
        return replaced(met, q=query, keys=keys)
    if node.target is aten.baddbmm.default:
        given = named(node)
        mask, beta, alpha = given["self"], given.get("beta", 1), given.get("alpha", 1)
        masks = () if beta == 0 else (mask,)
        if beta not in (0, 1):
            return f"baddbmm ({node.name}) scales its mask"
        return replaced(met, q=given["batch1"], keys=given["batch2"], scale=met.scale * alpha, masks=met.masks + masks)
    factor = _scalar_factor(node)
    if factor is not None:
        return _up(node.args[0], replaced(met, scale=met.scale * factor))
    if node.target is aten.add.Tensor and not node.kwargs and met.scale == 1.0:
        return _up_either(node, met)
    if node.target is aten.masked_fill.Scalar and met.scale == 1.0 and _is_nothing(node.args[2]):
        fill: Any = (node.args[1], node.args[2])
        return _up(node.args[0], replaced(met, fills=(*met.fills, fill)))
    return f"{node.target} ({node.name}) stands between the product and the softmax"


def _up_either(node: fx.Node, met: _Scores) -> _Scores | str:
    """An addition: one side leads to the product, the other is the mask."""
    reason = f"{node.target} ({node.name}) adds no mask to a product of queries and keys"
    for side, other in ((0, 1), (1, 0)):
        mask = node.args[other]
        if isinstance(mask, fx.Node):
            above = _up(node.args[side], replaced(met, masks=(*met.masks, mask)))
            if not isinstance(above, str):
                return above
            reason = above
    return reason


def _scalar_factor(node: fx.Node) -> float | None:
    if node.target in (aten.mul.Tensor, aten.mul.Scalar) and isinstance(node.args[1], (int, float)):
        return float(node.args[1])
    if node.target in (aten.div.Tensor, aten.div.Scalar) and isinstance(node.args[1], (int, float)):
        return 1.0 / float(node.args[1])
    return None


def _is_nothing(value: Any) -> bool:
    return isinstance(value, (int, float)) and value <= _NOTHING


def _down(softmax: fx.Node) -> tuple[fx.Node, fx.Node, float, bool] | str:
    """From the softmax down to the product with the values.

    The probabilities of tokens, the product, the dropout between them, whether others read or mix heads on the way.
    """
    node: Any = softmax
    probabilities = softmax
    dropout = 0.0
    rank = softmax.meta["val"].ndim
    pair = (rank - 2, rank - 1)
    escapes = mixed = False
    while True:
        escapes = escapes or len(node.users) > 1
        if products := [user for user in node.users if Read(user, node, pair).is_product]:
            escapes = escapes or mixed or node.meta["val"].ndim != rank
            return probabilities, products[0], dropout, escapes
        ways = {user: where for user in node.users if (where := onward(user, node, pair)) is not None}
        if len(ways) != 1:
            names = ", ".join(str(user.target) for user in node.users) or "nothing"
            return f"the probabilities ({node.name}) are not multiplied with values but read by {names}"
        ((node, where),) = ways.items()
        if node.target is DROPOUT and node.args[2] is not False:
            dropout = float(named(node)["p"])
        if node.target is CUT:
            if dropout or mixed or named(node).get("dim", 0) % node.meta["val"].ndim != pair[1]:
                return f"the probabilities are cut ({node.name}) elsewhere than at the keys, before dropout"
            probabilities = node
        mixed = mixed or node.target not in _PLAIN
        pair = where


def _turn(graph: fx.Graph, node: fx.Node) -> None:
    """`v p'` is `(p v')'`: probabilities on the left, as everywhere."""
    values, turned = operands(node)
    if turned.target not in _TRANSPOSE or not _swaps_last(turned, turned.meta["val"].ndim):
        return
    probabilities = next(operands(turned))
    above = probabilities
    while above.target in (*_THROUGH, DROPOUT, getitem):
        above = above.args[0]  # type: ignore[assignment]
    if above.target not in _SOFTMAX or values.meta["val"].ndim < 3:
        return
    with graph.inserting_before(node):
        across = insert(graph, aten.transpose.int, values, -2, -1)
        product = insert(graph, aten.matmul.default, probabilities, across)
        new = insert(graph, aten.transpose.int, product, -2, -1)
    node.replace_all_uses_with(new)
    for dead in (node, turned):
        if not dead.users:
            graph.erase_node(dead)


def _spell_einsum(graph: fx.Graph, node: fx.Node) -> None:
    """One operand: a permutation. Two and one letter to sum over: a product of matrices, and transposes around it."""
    letters, _, result = str(node.args[0]).replace(" ", "").partition("->")
    names, tensors = letters.split(","), list(operands(node))
    if "." in letters or not result or any(len(set(each)) < len(each) for each in names):
        return
    if len(names) == 1 and set(letters) == set(result):
        with graph.inserting_before(node):
            order = [letters.index(each) for each in result]
            _put(graph, node, insert(graph, aten.permute.default, tensors[0], order))
    if len(names) != 2:
        return
    batch = [each for each in result if each in names[0] and each in names[1]]
    (row, column), shared = ([x for x in each if x not in batch] for each in names), set(names[0]) & set(names[1])
    summed = shared - set(result)
    row, column = ([x for x in each if x not in summed] for each in (row, column))
    if len(summed) != 1 or len(row) != 1 or len(column) != 1 or not {*row, *column} <= set(result):
        return
    if result.index(row[0]) > result.index(column[0]):
        names, tensors, row, column = names[::-1], tensors[::-1], column, row
    with graph.inserting_before(node):
        one = _permuted(graph, tensors[0], names[0], [*batch, *row, *summed])
        two = _permuted(graph, tensors[1], names[1], [*batch, *summed, *column])
        product = insert(graph, aten.matmul.default, one, two)
        new = _permuted(graph, product, [*batch, *row, *column], result)
    _put(graph, node, new)


def _put(graph: fx.Graph, node: fx.Node, new: fx.Node) -> None:
    """Another node in the place of one, with what is known of that."""
    node.replace_all_uses_with(new)
    new.meta = {**node.meta, "val": new.meta["val"]}
    graph.erase_node(node)


def _permuted(graph: fx.Graph, node: fx.Node, have: Sequence[str], wanted: Sequence[str]) -> fx.Node:
    order = [list(have).index(each) for each in wanted]
    return node if order == sorted(order) else insert(graph, aten.permute.default, node, order)


def _replace_kernel(graph: fx.Graph, output: fx.Node) -> None:
    """One of the kernels that the operator is dispatched to, where a tracer looked below it."""
    kernel: Any = output.args[0]
    given = named(kernel)
    mask = given.get("attn_mask", given.get("attn_bias"))
    with graph.inserting_before(output):
        arguments = (given["query"], given["key"], given["value"], mask, given.get("dropout_p", 0.0))
        options = {"is_causal": given.get("is_causal", False), "scale": given.get("scale")}
        fused = graph.call_function(SDPA, arguments, options)
    fused.meta.update(output.meta)
    output.replace_all_uses_with(fused)


def _replace(graph: fx.Graph, match: _Match, scores: _Scores) -> None:
    output = match.output
    with graph.inserting_before(output):
        key = _untransposed(graph, scores.keys)
        mask = None
        for each in _masks(graph, scores):
            mask = each if mask is None else insert(graph, aten.add.Tensor, mask, each)
        while mask is not None and mask.meta["val"].ndim < 2:  # the operator wants rows and columns
            mask = insert(graph, aten.unsqueeze.default, mask, 0)
        query = scores.q
        assert query is not None
        query, key = (_narrow(each, output.args[1]) for each in (query, key))
        if mask is not None and mask.meta["val"].dtype != query.meta["val"].dtype:
            mask = insert(graph, aten._to_copy.default, mask, dtype=query.meta["val"].dtype)
        fused = graph.call_function(SDPA, (query, key, output.args[1], mask, match.dropout), {"scale": scores.scale})
    fused.meta.update(output.meta)
    output.replace_all_uses_with(fused)
    fused.name = f"attention_{output.name}" if not output.name.startswith("attention") else output.name


def _narrow(node: fx.Node, value: Any) -> fx.Node:
    """Queries and keys as they were before they were widened beside the values: the operator widens by itself."""
    while node.target is aten._to_copy.default and node.meta["val"].dtype != value.meta["val"].dtype:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _masks(graph: fx.Graph, scores: _Scores) -> Iterator[fx.Node]:
    yield from scores.masks
    for where, value in scores.fills:
        zeros = insert(graph, aten.zeros_like.default, where, dtype=scores.q.meta["val"].dtype)  # type: ignore[union-attr]
        yield insert(graph, aten.masked_fill.Scalar, zeros, where, value)


def _untransposed(graph: fx.Graph, keys: fx.Node | None) -> fx.Node:
    """Keys `[..., M, d]` of `[..., d, M]`: what was transposed, or a transpose of it."""
    assert keys is not None
    rank = keys.meta["val"].ndim
    if keys.target in _TRANSPOSE and _swaps_last(keys, rank):
        return keys.args[0]  # type: ignore[return-value]
    return insert(graph, aten.transpose.int, keys, -2, -1)


def _swaps_last(node: fx.Node, rank: int) -> bool:
    given = named(node)
    if "dims" in given:
        return [dim % rank for dim in given["dims"]] == [*range(rank - 2), rank - 1, rank - 2]
    return {given.get("dim0", -2) % rank, given.get("dim1", -1) % rank} == {rank - 2, rank - 1}
