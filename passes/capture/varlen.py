"""Attention over segments that are packed one behind the other, as attention over a batch of segments of one length.

_varlen_attn(q [T, H, d], k, v, starts [S + 1], max)
                                          ->  [S, L, H, d] -> [S, H, L, d] -> scaled_dot_product_attention -> [T, H, d]

`S` segments of at most `max` tokens that have `S * max` tokens together have `max` each, whatever numbers `starts` has.
Where that is not known the operator stays whole: it runs as the model wrote it, and says why nothing merges in it.
"""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tldr_compile.passes.capture.sums import Call
from tldr_compile.passes.fx_utils import named, operator_name
from tldr_compile.passes.refusal import Refusal
from tldr_compile.passes.sizes import is_open

aten = torch.ops.aten

_VARLEN = "torch_attn::_varlen_attn"  # by its name: not every release has it
# What is understood of its arguments; splits say how a sum is done. Releases have others, such as caches of keys.
_ARGUMENTS = frozenset(
    {"query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"}
    | {"is_causal", "scale", "window_size", "enable_gqa", "num_splits"}
)
_NO_WINDOW = (-1, -1)
_CAUSAL = (-1, 0)


def spell_varlen(graph: fx.Graph) -> list[Refusal]:
    """Write the operator out wherever its segments have one length, in place; why it stays elsewhere."""
    refusals = []
    for node in list(graph.nodes):
        if node.op == "call_function" and operator_name(node) == _VARLEN:
            reason = _why_whole(node)
            if reason is None:
                _spell(graph, node)
            else:
                refusals.append(Refusal(node, reason))
    return refusals


def _spell(graph: fx.Graph, node: fx.Node) -> None:
    call, given = Call(graph, node), named(node)
    with graph.inserting_before(node):
        q, k, v = (_batched(call, given[name], given["max_q"]) for name in ("query", "key", "value"))
        causal, grouped = given.get("is_causal", False), q.meta["val"].shape[1] != k.meta["val"].shape[1]
        options = {"scale": given.get("scale"), **({"enable_gqa": True} if grouped else {})}
        attended = call(aten.scaled_dot_product_attention.default, q, k, v, None, 0.0, causal, **options)
        moved = call(aten.transpose.int, attended, 1, 2)
        packed = call(aten.reshape.default, moved, [-1, *moved.meta["val"].shape[2:]])
    for output in list(node.users):
        output.replace_all_uses_with(packed)
        graph.erase_node(output)
    graph.erase_node(node)


def _batched(call: Call, packed: fx.Node, length: Any) -> fx.Node:
    """`[S * length, H, d]` as `[S, H, length, d]`."""
    segments = call(aten.reshape.default, packed, [-1, length, *packed.meta["val"].shape[1:]])
    return call(aten.transpose.int, segments, 1, 2)


def _why_whole(node: fx.Node) -> str | None:
    """What keeps a call from being attention over a batch; None if nothing does."""
    given = named(node)
    if read := [user.name for user in node.users if user.target is not getitem or user.args[1] != 0]:
        return f"something else than its output is read ({read[0]})"
    if others := [name for name, each in given.items() if each is not None and name not in _ARGUMENTS]:
        return f"it is called with {', '.join(others)}: its keys are not just those of its segments"
    window = tuple(given.get("window_size") or _NO_WINDOW)
    if window != _NO_WINDOW and not (window == _CAUSAL and given.get("is_causal")):
        return f"a token sees only the window {list(window)} of its segment"
    queries, keys, starts = (given[name].meta["val"].shape for name in ("query", "key", "cu_seq_q"))
    if any(is_open(each) for each in (*queries[1:], *keys[1:])):
        return "the sizes of its heads are not known"
    tokens, segments, length = queries[0], starts[0] - 1, _number(given["max_q"])
    if not statically_known_true(tokens == segments * length):
        known = not any(is_open(each) for each in (tokens, segments, length))
        reason = "its segments have different lengths" if known else "its segments are not known to have one length"
        return f"{reason}: {tokens} tokens in {segments} segments of at most {length}"
    if given["cu_seq_q"] is not given["cu_seq_k"]:
        if given["cu_seq_k"] is None:
            return "the segments of its keys are not given"
        of_keys = (keys[0], given["cu_seq_k"].meta["val"].shape[0] - 1, _number(given["max_k"]))
        pairs = zip((tokens, segments, length), of_keys, strict=True)
        if not all(statically_known_true(one == other) for one, other in pairs):
            return "its keys lie in other segments than its queries"
    return None


def _number(value: Any) -> Any:
    return value.meta["val"] if isinstance(value, fx.Node) else value
