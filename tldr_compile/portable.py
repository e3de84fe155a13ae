"""A merged graph in torch's own operators: it runs where this package is not.

group, down, attend, tldr::match, ...   ->   aten.sort, aten.gather, aten.scatter_add, ...
"""

from __future__ import annotations

import torch
from torch import fx

from tldr_compile import ops
from tldr_compile.errors import OptionError
from tldr_compile.passes.capture import retraced
from tldr_compile.passes.fx_utils import operator_name
from tldr_compile.passes.sources import where

_OF_TORCH = ("aten", "prim", "prims", "higher_order")


def decomposed(graph: fx.GraphModule, captured: fx.GraphModule) -> fx.GraphModule:
    """A merged graph in which only torch's operators are called, and those that the `captured` model calls itself.

    Raises `OptionError` for another: one that a function that users registered brings along.
    """
    with ops.decomposing():
        plain = retraced(graph)
    known = {node.target for node in captured.graph.nodes if node.op == "call_function"}
    for node in plain.graph.nodes:
        if node.op == "call_function" and node.target not in known and not _is_of_torch(node.target):
            raise OptionError(
                f"portable=True: {where(node)} calls {operator_name(node)}, which is no operator of torch, and the "
                "model does not call it: make what is registered with tldr_compile.ops of torch's functions"
            )
    return plain


def _is_of_torch(target: object) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace in _OF_TORCH
    return isinstance(target, torch._ops.HigherOrderOperator) or getattr(target, "__module__", "").split(".")[0] in (
        "_operator",
        "builtins",
        "math",
        "torch",
    )
