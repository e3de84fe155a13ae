"""`flex_attention` in plain operators, so that it is found, typed and merged like any attention.

flex_attention(q, k, v, score_mod, mask_mod)   ->   q k' -> scale -> score_mod -> mask_mod -> softmax -> v

A modification is a graph of one score and its four numbers. Every operator in it works entry by entry or looks up a
table, so it is run once, on all scores, with the numbers laid along their dimensions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._higher_order_ops.flex_attention import flex_attention

from tldr_compile.passes.capture.decompositions import decomposition
from tldr_compile.passes.errors import CaptureError

_MASK = 4  # the argument that holds lists of blocks, and last the graph they were made from


def without_blocks(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy in which the operator keeps, of a mask, its graph alone; and nothing is left of how blocks were found.

    Finding them runs the mask under vmap, which nothing that is traced again can enter. Where there is no such
    operator, `gm` itself.
    """
    if not gm.graph.find_nodes(op="call_function", target=flex_attention):
        return gm
    result = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    finding: set[fx.Node] = set()
    for node in result.graph.find_nodes(op="call_function", target=flex_attention):
        blocks, (mask_mod,) = node.args[_MASK][:-1], node.args[_MASK][-1:]
        fx.map_arg(blocks, lambda each: finding.update(_ancestors(each)))
        node.update_arg(_MASK, (*(None for _ in blocks), mask_mod))
    reads = {node for found in finding for node in (found, *found.users)}  # writes into what is found, and checks
    result.graph.eliminate_dead_code(lambda node: node.op == "placeholder" or (node.is_impure() and node not in reads))
    return result


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, pending = {node}, [node]
    while pending:
        above = [each for each in pending.pop().all_input_nodes if each not in found and each.op != "placeholder"]
        found.update(above)
        pending += above
    return found


@decomposition("flex_attention")
def spelled_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any,
    block_mask: Sequence[Any],
    scale: float,
    kernel_options: dict[str, Any],
    score_buffers: Sequence[Any] = (),
    mask_buffers: Sequence[Any] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """What the operator returns: the output, the log-sum-exp and the maximum of the scores, both in units of ln 2.

    `query [B, H, N, d]`, `key [B, G, M, d]`, `value [B, G, M, e]` with H a multiple of G.

    Raises:
        CaptureError: a modification does not give one number for each score.
    """
    groups = query.shape[1] // key.shape[1]
    if groups != 1:
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = (query.to(wide) @ key.to(wide).transpose(-2, -1)) * scale
    places = _places(scores)
    scores = _modified(score_mod(scores, *places, *score_buffers), scores, "score_mod")
    allowed = block_mask[-1](*places, *mask_buffers)
    if allowed.ndim:  # a number for all scores is what stands there where there is no mask
        scores = scores.masked_fill(_modified(allowed, scores, "mask_mod").logical_not(), -torch.inf)
    weights = torch.ops.aten._safe_softmax.default(scores, -1)
    out = weights.to(query.dtype) @ value
    ln2 = torch.log(torch.full((), 2.0, dtype=wide, device=query.device))
    return out, scores.logsumexp(-1) / ln2, scores.amax(-1) / ln2


def _places(scores: Tensor) -> list[Tensor]:
    """The numbers of sample, head, query and key, each along its own dimension."""
    return [
        torch.arange(size, device=scores.device).reshape([-1 if d == dim else 1 for d in range(4)])
        for dim, size in enumerate(scores.shape)
    ]


def _modified(result: Any, scores: Tensor, name: str) -> Tensor:
    if not isinstance(result, Tensor) or torch.broadcast_shapes(result.shape, scores.shape) != scores.shape:
        shape = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise CaptureError(
            f"{name} of flex_attention gives {shape} where it is asked for all scores {list(scores.shape)} at once; "
            "write it with operators that work entry by entry"
        )
    return result
