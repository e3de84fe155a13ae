"""Which inputs of a captured graph carry the video."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from tldr_compile.passes.capture.canonicalize import Captured
from tldr_compile.passes.errors import OptionError
from tldr_compile.passes.fx_utils import operands, operator_name

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")
_PRODUCTS = frozenset(
    f"aten::{name}" for name in ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", *_CONVOLUTIONS)
)


def clip_inputs(captured: Captured, clip: str | Sequence[str] = "auto") -> frozenset[str]:
    """Names of the placeholders that carry the video: the floating-point inputs of the highest rank, 2 or more.

    Of rows, `[N, C]`, those are tables that no parameter embeds as it does patches: positions, weights, masks.

    Raises:
        OptionError: a name in `clip` is no input of the graph.
    """
    inputs = {
        node.name: captured.names.get(node.name, node.name)
        for node in captured.graph.graph.find_nodes(op="placeholder")
        if node.name not in captured.constants and isinstance(node.meta.get("val"), torch.Tensor)
    }
    if clip != "auto":
        wanted = (clip,) if isinstance(clip, str) else clip
        if unfound := [name for name in wanted if name not in inputs.values() and name not in inputs]:
            raise OptionError(
                f"clip={unfound[0]!r} is no tensor input of the model; they are {sorted(inputs.values())}"
            )
        return frozenset(node for node, name in inputs.items() if name in wanted or node in wanted)
    placeholders = [node for node in captured.graph.graph.find_nodes(op="placeholder") if node.name in inputs]
    ranks = {node.name: node.meta["val"].ndim for node in placeholders if node.meta["val"].is_floating_point()}
    if not any(rank >= 3 for rank in ranks.values()):  # pixels as they come from a decoder
        ranks = {n.name: n.meta["val"].ndim for n in placeholders if n.meta["val"].ndim >= 4} or ranks
    highest = max(ranks.values(), default=0)
    found = frozenset(name for name, rank in ranks.items() if rank == highest and rank >= 2)
    return (found & _embedded(captured) or found) if highest == 2 else found


def _embedded(captured: Captured) -> frozenset[str]:
    """The inputs that meet a parameter in a product before they meet another input."""
    made_of: dict[fx.Node, frozenset[str]] = {}
    found: set[str] = set()
    for node in captured.graph.graph.nodes:
        made_of[node] = frozenset().union(*(made_of[each] for each in node.all_input_nodes))
        if node.op == "placeholder" and node.name not in captured.constants:
            made_of[node] = frozenset({node.name})
        product = node.op == "call_function" and operator_name(node) in _PRODUCTS
        if product and len(made_of[node]) == 1 and not all(made_of[each] for each in operands(node)):
            found |= made_of[node]
    return frozenset(found)
