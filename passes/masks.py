"""What a mask does to the tokens of a site: a token that is hidden must not merge with one that is not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from passes.attention import Attention
from passes.axes import Axis
from passes.rules import Kind
from passes.typing import TypedGraph

# What is added to a score to leave nothing of it after the exponential.
_NOTHING = -1e4
_PRODUCTS = frozenset({Kind.MIX, Kind.CONTRACT, Kind.KEYS})


def refusal(typed: TypedGraph, attention: Attention, run: Axis) -> str | None:
    """Why a mask forbids to merge the tokens of `run`; None if none does.

    A learned bias hides nothing, nor does one that is a product of the clip itself, as relative positions that depend
    on the query are. A mask that is computed from nothing but constants is computed, and looked at.
    """
    for mask in _masks(typed, attention):
        value = typed.value(mask)
        if not any(axis.atoms & run.atoms for axis in value.axes):
            continue
        if value.varies and not (value.clip and value.floating and not _decides(typed, mask)):
            return f"its mask ({mask.name}) differs by token and by sample: a masked token must not merge with another"
        if not value.varies and _hides(typed, mask, run):
            return f"its mask ({mask.name}) hides some of its tokens from others: the place of a token carries meaning"
    return None


def _masks(typed: TypedGraph, attention: Attention) -> Iterator[fx.Node]:
    """What is added to the scores, or decides on them, and does not descend from the clip itself."""
    yield from attention.masks
    pending = [attention.probabilities] if attention.probabilities else []
    while pending:
        node = pending.pop()
        for operand in typed.operands(node):
            value = typed.value(operand)
            if value.clip and value.axes[-2:] == typed.value(attention.queries).axes[-2:] and operand in typed.calls:
                pending.append(operand)
            elif not value.clip:
                yield operand


def _decides(typed: TypedGraph, mask: fx.Node) -> bool:
    """Whether a mask rests on a comparison of what the clip holds; what is a product of it is no comparison."""
    pending, seen = [mask], {mask}
    while pending:
        node = pending.pop()
        value = typed.value(node)
        if value.varies and not value.floating:
            return True
        if node in typed.calls and not any(use.kind in _PRODUCTS for use in typed.calls[node].uses):
            above = [each for each in typed.operands(node) if each not in seen]
            pending += above
            seen.update(above)
    return False


def _hides(typed: TypedGraph, mask: fx.Node, run: Axis) -> bool:
    """Of a mask whose numbers are not known here, a boolean over the tokens hides some; a float is a bias."""
    above = _ancestors(mask)
    if _known(above):
        return _divides(above)
    return any(
        not _known(own := _ancestors(each)) or _divides(own)
        for each in above
        if isinstance(traced := each.meta.get("val"), Tensor)
        and traced.dtype == torch.bool
        and any(axis.atoms & run.atoms for axis in typed.value(each).axes)
    )


def _known(nodes: list[fx.Node]) -> bool:
    return not any(node.op in ("placeholder", "get_attr") for node in nodes)


def _divides(nodes: list[fx.Node]) -> bool:
    """Whether the last of some nodes, computed, hides some tokens and not others."""
    computed = _computed(nodes)
    hidden = ~computed if computed.dtype == torch.bool else computed <= _NOTHING
    return bool(hidden.any()) and not bool(hidden.all())


def _ancestors(node: fx.Node) -> list[fx.Node]:
    """A node and all that it is made of but sizes, in the order of the graph."""
    found, pending = {node}, [node]
    while pending:
        for each in pending.pop().all_input_nodes:
            if each not in found and not isinstance(each.meta.get("val"), (int, torch.SymInt)):
                found.add(each)
                pending.append(each)
    return [each for each in node.graph.nodes if each in found]


def _computed(nodes: list[fx.Node]) -> Tensor:
    """The value of the last of some nodes that rest on nothing but numbers; symbolic sizes as in the example."""
    values: dict[fx.Node, Any] = {}

    def value(node: fx.Node) -> Any:
        if node in values:
            return values[node]
        traced = node.meta["val"]
        return traced.node.hint if isinstance(traced, torch.SymInt) else traced

    with torch.no_grad():
        for node in nodes:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    result: Tensor = values[nodes[-1]]
    return result
