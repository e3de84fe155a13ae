"""What a mask does to the tokens of a site: a token that is hidden must not merge with one that is not.

What is hidden is not attended, whether a boolean says so or a number that leaves nothing of a score: the dense model
keeps apart what such a mask keeps apart (frames, samples packed in a row), and so does a merge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from tldr_compile.passes.axes import Axes, Axis, Kind, TypedGraph, touches
from tldr_compile.passes.capture import Attention

# A score so far below the largest of its row is nothing beside it: exp(-20) is 2e-9, below the rounding of float32.
_NOTHING = 20.0
_PRODUCTS = frozenset({Kind.MIX, Kind.LINEAR, Kind.CONTRACT, Kind.KEYS})
# Operators whose result is uniform where their operands are, whatever the sizes.
_UNIFORM = """
    full ones zeros new_full new_ones new_zeros ones_like zeros_like full_like scalar_tensor expand view reshape
    unsqueeze squeeze permute transpose clone _to_copy detach alias slice select index cat logical_and logical_or
    logical_not bitwise_and bitwise_or bitwise_not __and__ __or__ masked_fill where mul add sub rsub ne eq lt gt le ge
"""
_KEEPS_UNIFORM = frozenset(f"aten::{name}" for name in _UNIFORM.split())


def refusal(typed: TypedGraph, attention: Attention, run: Axis) -> str | None:
    """Why a mask forbids to merge the tokens of `run`; None if none does.

    A learned bias hides nothing, nor does one that is a product of the clip itself, as relative positions that depend
    on the query are. A mask that is made of constants is computed, and looked at.
    """
    for mask, axes in _masks(typed, attention):
        value = typed.value(mask)
        if not touches(axes, run):
            continue
        if value.varies and not (value.clip and value.floating and not _decides(typed, mask)):
            return f"its mask ({mask.name}) differs by token and by sample: a masked token must not merge with another"
        if not value.varies and (hides := _hides(typed, mask)):
            return f"its mask ({mask.name}) {hides}"
    return None


def _masks(typed: TypedGraph, attention: Attention) -> Iterator[tuple[fx.Node, Axes]]:
    """What is added to the scores, or decides on them, and does not descend from the clip itself; its axes there."""
    for mask in attention.masks:
        yield from _of_call(typed, attention.node, (mask,))
    pending = [attention.probabilities] if attention.probabilities else []
    while pending:
        node = pending.pop()
        for operand in typed.operands(node):
            value = typed.value(operand)
            if value.clip and value.axes[-2:] == typed.value(attention.queries).axes[-2:] and operand in typed.calls:
                pending.append(operand)
            elif not value.clip:
                yield from _of_call(typed, node, (operand,))


def _of_call(typed: TypedGraph, node: fx.Node, wanted: Sequence[fx.Node]) -> Iterator[tuple[fx.Node, Axes]]:
    for operand, own in zip(typed.operands(node), typed.own(node), strict=True):
        if operand in wanted:
            yield operand, own


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


def _hides(typed: TypedGraph, mask: fx.Node) -> str | None:
    """How a constant mask hides some of the tokens from others; None if it hides none, or all alike."""
    values, above = typed.captured.values, _ancestors(mask)
    if not _known(above, values) or any(map(_from_data, above)):
        unknown = any(_is_boolean(each) and not _is_uniform(each, values) for each in above)
        return "is not known here, and may hide some of its tokens from others" if unknown else None
    computed = _computed(above, values)
    sized = [node for node in above if any(map(_is_symbolic, _ancestors(node)))]
    if sized:
        read = {each for node in sized for each in (node, *node.all_input_nodes) if each in computed}
        if all(map(_keeps_uniform, sized)) and all(_alike(computed[each]) for each in read):
            return None
        return "is computed from sizes that may change: what it hides at one size says nothing of another"
    if _divides(computed[mask]):
        return "hides some of its tokens from others: the place of a token carries meaning"
    return None


def _is_uniform(node: fx.Node, values: Mapping[str, Tensor]) -> bool:
    above = _ancestors(node)
    fixed = _known(above, values) and not any(map(_is_symbolic, above))
    return fixed and not _divides(_computed(above, values)[node])


def _is_boolean(node: fx.Node) -> bool:
    traced = node.meta.get("val")
    return isinstance(traced, Tensor) and traced.dtype == torch.bool


def _is_symbolic(node: fx.Node) -> bool:
    return any(isinstance(each.meta.get("val"), torch.SymInt) for each in node.all_input_nodes)


def _from_data(node: fx.Node) -> bool:
    """Whether a size that only running tells goes into a node."""
    sizes = (each.meta.get("val") for each in node.all_input_nodes)
    return any(isinstance(each, torch.SymInt) and bool(free_unbacked_symbols(each)) for each in sizes)


def _keeps_uniform(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "get_attr") or (schema is not None and schema.name in _KEEPS_UNIFORM)


def _alike(value: Tensor) -> bool:
    return value.numel() == 0 or bool((value == value.flatten()[0]).all())


def _known(nodes: Sequence[fx.Node], values: Mapping[str, Tensor]) -> bool:
    return all(str(node.target) in values for node in nodes if node.op in ("placeholder", "get_attr"))


def _divides(mask: Tensor) -> bool:
    """Whether a mask hides some entries and not others."""
    if mask.dtype == torch.bool:
        hidden = ~mask
    elif mask.ndim and mask.numel():
        hidden = mask <= mask.amax(-1, keepdim=True) - _NOTHING
    else:
        return False
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


def _computed(nodes: Sequence[fx.Node], values: Mapping[str, Tensor]) -> dict[fx.Node, Any]:
    """The values of nodes that rest on constants; symbolic sizes as in the example."""
    found: dict[fx.Node, Any] = {}

    def value(node: fx.Node) -> Any:
        if node in found:
            return found[node]
        traced = node.meta["val"]
        return traced.node.hint if isinstance(traced, torch.SymInt) else traced

    with torch.no_grad():
        for node in nodes:
            if node.op in ("placeholder", "get_attr"):
                found[node] = values[str(node.target)]
            else:
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value)
                found[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return found
