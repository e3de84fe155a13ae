"""A merged graph in torch's own operators: it runs where this package is not.

group, down, attend, tldr::match, ...   ->   aten.sort, aten.gather, aten.scatter_add, ...
attend, attend_and_sharpness            ->   tldr_native::attend, tldr_native::attend_and_sharpness, if that is wanted
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from tldr_compile import ops
from tldr_compile.errors import OptionError, WriteError
from tldr_compile.passes.capture import retraced
from tldr_compile.passes.fx_utils import operator_name
from tldr_compile.passes.sources import where

_OF_TORCH = ("aten", "prim", "prims", "higher_order")


def decomposed(graph: fx.GraphModule, captured: fx.GraphModule, portable: bool | str = True) -> fx.GraphModule:
    """A merged graph in which only torch's operators are called, and those that the `captured` model calls itself.

    With "native" attention is left to operators in C++ that have no gradients.

    Raises `OptionError` for another operator, which a function that users registered brings along, and for attention
    that the operators in C++ do not compute; `WriteError` where these do not compile.
    """
    stay = native_operators() if portable == "native" else {}
    # Where gradients are wanted, `ops.attend` is torch's own attention.
    with ops.decomposing(stay), torch.set_grad_enabled(torch.is_grad_enabled() and not stay):
        plain = retraced(graph)
    known = {*stay.values(), *(node.target for node in captured.graph.nodes if node.op == "call_function")}
    for node in plain.graph.nodes:
        if node.target in stay.values():
            _check_native(node)
        if node.op == "call_function" and node.target not in known and not _is_of_torch(node.target):
            raise OptionError(
                f"{portable=}: {where(node)} calls {operator_name(node)}, which is no operator of torch, and the "
                "model does not call it: make what is registered with tldr_compile.ops of torch's functions"
            )
    return plain


def needs_compiler(what: str, reason: BaseException) -> WriteError:
    """The error of all that no C++ compiler compiles."""
    return WriteError(
        f"{what} needs a C++ compiler that works: install one, or name one in the environment variable CXX. "
        f"The reason: {reason}"
    )


def native_operators() -> Mapping[str, Callable[..., Any]]:
    """The operators in C++ by the names of those that they compute. Raises `WriteError` where they do not compile."""
    # Importing Inductor takes seconds.
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler  # noqa: PLC0415

    try:
        return ops.native.operators()
    except (CppCompileError, InvalidCxxCompiler, OSError) as reason:
        raise needs_compiler("portable='native'", reason) from reason


def _check_native(node: fx.Node) -> None:
    """Raise `OptionError` for attention that the operators in C++ would refuse."""
    arguments: Any = fx.map_arg(node.args, lambda each: each.meta["val"])
    reason = ops.native.refusal(arguments[0], arguments[-1])
    if reason is not None:
        raise OptionError(
            f"portable='native': the operator in C++ cannot compute {where(node)}: {reason}: use portable=True"
        )


def _is_of_torch(target: object) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace in _OF_TORCH
    return isinstance(target, torch._ops.HigherOrderOperator) or getattr(target, "__module__", "").split(".")[0] in (
        "_operator",
        "builtins",
        "math",
        "torch",
    )
