"""Small facts about the nodes of a captured graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx


def operands(node: fx.Node) -> Iterator[fx.Node]:
    """Nodes among the arguments that hold a tensor, in the order of the schema, repetitions included."""
    for each in _leaves((node.args, node.kwargs)):
        if isinstance(each, fx.Node) and isinstance(each.meta.get("val"), torch.Tensor):
            yield each


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, (tuple, list)):
        for each in tree:
            yield from _leaves(each)
    elif isinstance(tree, dict):
        for each in tree.values():
            yield from _leaves(each)
    else:
        yield tree


def tensors(node: fx.Node) -> tuple[torch.Tensor, ...]:
    """The traced tensors that a node produces."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return (value,)
    return tuple(each for each in value if isinstance(each, torch.Tensor)) if isinstance(value, (tuple, list)) else ()


def operator_name(node: fx.Node) -> str:
    """The qualified name of what a node calls, as rules are registered under: "aten::view"."""
    target: Any = node.target
    schema = getattr(target, "_schema", None)
    return schema.name if schema else getattr(target, "__name__", str(target))


def argument_names(node: fx.Node) -> list[str]:
    """The names of a call's positional arguments, by its schema where it has one."""
    schema = getattr(node.target, "_schema", None)
    return [each.name for each in schema.arguments] if schema else [str(k) for k in range(len(node.args))]


def named(node: fx.Node, args: Any = None, kwargs: Any = None) -> dict[str, Any]:
    """The arguments of a call, or those to replace them, by name."""
    args, kwargs = (node.args, node.kwargs) if args is None else (args, kwargs)
    return {**dict(zip(argument_names(node), args, strict=False)), **kwargs}
