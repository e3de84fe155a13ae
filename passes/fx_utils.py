"""Small facts about the nodes of a captured graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx._lazy_graph_module import _LazyGraphModule


def operands(node: fx.Node) -> Iterator[fx.Node]:
    """Nodes among the arguments that hold a tensor, in the order of the schema, repetitions included."""
    for each in _leaves((node.args, node.kwargs)):
        if isinstance(each, fx.Node) and isinstance(each.meta.get("val"), torch.Tensor):
            yield each


def above(node: fx.Node) -> set[fx.Node]:
    """A node and all that it is made of."""
    seen, pending = {node}, [node]
    while pending:
        new = set(pending.pop().all_input_nodes) - seen
        seen |= new
        pending += new
    return seen


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


def lazy_module(root: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A graph module whose code is not written before it is called: most are passed on, and no one calls them."""
    return _LazyGraphModule(root, graph)


# What `repr` tells apart; of anything else the object itself counts.
_BY_TEXT = frozenset({int, float, complex, bool, str, type(None), torch.device})


def call_key(tree: Any, tensor: Callable[[Any], Any]) -> Any:
    """Arguments as a key, with `tensor` of each tensor or node: a call with equal ones does the same.

    Good for as long as the arguments live.
    """
    if isinstance(tree, (fx.Node, torch.Tensor)):
        return tensor(tree)
    if isinstance(tree, (tuple, list)):
        return (type(tree), *(call_key(each, tensor) for each in tree))
    if isinstance(tree, dict):
        return (dict, *((key, call_key(each, tensor)) for key, each in tree.items()))
    if isinstance(tree, slice):
        return (slice, call_key((tree.start, tree.stop, tree.step), tensor))
    return (type(tree), repr(tree) if type(tree) in _BY_TEXT else id(tree))


class Alike:
    """Gives, for a traced tensor, the first one of its kind: operators tell no two of one kind apart.

    A tensor whose sizes are open, or that is not fake, is the only one of its kind.
    """

    def __init__(self) -> None:
        self._first: dict[Any, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is not FakeTensor or x.layout != torch.strided:
            return self._first.setdefault(id(x), x)
        sizes = (*x.shape, *x.stride(), x.storage_offset(), x.untyped_storage().nbytes())
        if any(isinstance(each, torch.SymInt) for each in sizes):
            return self._first.setdefault(id(x), x)
        flags = (x.requires_grad, x.is_leaf, x.is_inference(), x.is_conj(), x.is_neg())
        return self._first.setdefault((x.dtype, x.device, sizes, flags), x)
