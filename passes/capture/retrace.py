"""Run a traced graph again, to be traced in one dialect: what is entered, what is spelled out, and what is refused.

Whatever fails names the node, its operator, the line of the model's source and a way out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.flat_apply import flat_apply
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._higher_order_ops.wrap import tag_activation_checkpoint, wrap_with_autocast, wrap_with_set_grad_enabled
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, PropagateUnbackedSymInts
from torch.utils.checkpoint import CheckpointPolicy

from tldr_compile.passes.capture.decompositions import decomposition_of
from tldr_compile.passes.errors import CaptureError
from tldr_compile.passes.fx_utils import operator_name
from tldr_compile.passes.sources import where

# Their bodies are traced in place, with the mode that they stand for.
_ENTERED = frozenset(
    {tag_activation_checkpoint, wrap_with_autocast, wrap_with_set_grad_enabled, flat_apply, invoke_subgraph}
)
_OUTSIDE = 'keep that part out of the graph with torch.compiler.disable and compile with torch.compile(backend="tldr")'
_INSTEAD = {
    "cond": "decide in Python, before the model is called, which branch it takes",
    "map_impl": "call the function on the whole batch, or write a Python loop",
    "scan": "write a Python loop over a known number of steps",
    "associative_scan": "write a Python loop over a known number of steps",
    "while_loop": "write a Python loop over a known number of steps",
}
_FROM_DATA = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
# What torch raises for a graph that it cannot trace, of whatever kind.
FAILURES = (RuntimeError, LookupError, TypeError, ValueError, AttributeError, AssertionError, ArithmeticError)


class Retracer(PropagateUnbackedSymInts):
    """Runs a graph whose tensor attributes are arguments (an attribute is a real tensor, all others are fake).

    `attributes` has them by their path from the outermost graph, in which `path` is where this graph stands. Graphs
    inside are run in place. `open_modes` closes what a failing graph leaves open.

    Raises:
        CaptureError: a node cannot be traced; the reason of torch is the cause.
    """

    def __init__(
        self, gm: fx.GraphModule, attributes: Mapping[str, Any], open_modes: ExitStack, path: str = ""
    ) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self._attributes, self._open_modes, self._path = attributes, open_modes, path

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except CaptureError as reason:
            if n.target in _ENTERED:  # a node of the body has said where
                raise
            raise CaptureError(f"{where(n)}: {_operator(n)}: {reason}") from reason
        except FAILURES as reason:
            raise CaptureError(
                f"{where(n)}: {_operator(n)} cannot be traced: {said(reason)}; {_way_out(reason)}"
            ) from reason
        refuse_nested(n, result)
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        path = f"{self._path}{target}"
        if path in self._attributes:
            return self._attributes[path]
        value = super().get_attr(target, args, kwargs)
        return _Body(value, self, f"{path}.") if isinstance(value, fx.GraphModule) else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is tag_activation_checkpoint:
            return self._checkpoint(*args, **kwargs)
        if target is invoke_subgraph:
            body, _, *operands = args
            return body(*operands)
        if (function := decomposition_of(target)) is not None:
            return function(*args, **kwargs)
        # A tracer records these two and does not do them: the values between would have the wrong dtype.
        if target is torch.amp.autocast_mode._enter_autocast:
            region = self._open_modes.enter_context(ExitStack())
            region.enter_context(torch.autocast(*args))
            return region
        if target is torch.amp.autocast_mode._exit_autocast:
            return args[0].close()
        return super().call_function(target, args, kwargs)

    def _checkpoint(self, body: _Body, *operands: Any, **kwargs: Any) -> Any:
        _, keywords = tag_activation_checkpoint.divide_kwargs(kwargs)
        for node in body.graph.graph.nodes:  # the tag by which the partitioner knows what to compute again in backward
            node.meta.update(recompute=CheckpointPolicy.PREFER_RECOMPUTE, ac_graph_id=id(body.graph))
        return body(*operands, **keywords)


def leave_vmap(open_modes: ExitStack) -> None:
    """Let `open_modes` close the levels of vmap that a failing graph leaves open."""
    functorch = torch._C._functorch

    def depth() -> int:
        return len(functorch.get_interpreter_stack() or ())

    def leave(wanted: int) -> None:
        while depth() > wanted:
            functorch.pop_dynamic_layer_stack()

    open_modes.callback(leave, depth())


@dataclass(frozen=True)
class _Body:
    """A graph inside a graph: where it is called, it is run as the graph around it is."""

    graph: fx.GraphModule
    around: Retracer
    path: str

    def __call__(self, *operands: Any, **keywords: Any) -> Any:
        inside = Retracer(self.graph, self.around._attributes, self.around._open_modes, self.path)
        return inside.run(*operands, *keywords.values())


def graphs(gm: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """A graph and those inside it, each with its path and a dot; the outermost has no path."""
    for name, module in gm.named_modules(remove_duplicate=False):
        if isinstance(module, fx.GraphModule):
            yield f"{name}." if name else "", module


def refuse_higher_order(gm: fx.GraphModule) -> None:
    """Raise `CaptureError` for the first higher-order operator that is neither entered nor spelled out."""
    for node in (node for _, each in graphs(gm) for node in each.graph.nodes):
        if (
            isinstance(node.target, HigherOrderOperator)
            and node.target not in _ENTERED
            and not decomposition_of(node.target)
        ):
            name = node.target.name()
            instead = _INSTEAD.get(name, "call the model without it")
            raise CaptureError(
                f"{where(node)} is the higher-order operator {name!r}, which tldr-compile does not enter; {instead}, "
                f"or {_OUTSIDE}"
            )


def refuse_nested(node: fx.Node, value: Any) -> None:
    """Raise `CaptureError` where the value of a node is a nested tensor."""
    if isinstance(value, torch.Tensor) and value.is_nested:
        raise CaptureError(
            f"{where(node)}: {_operator(node)} is a nested tensor, whose samples have their own lengths, which "
            "tldr-compile does not merge; pad them to one length"
        )


def said(reason: BaseException) -> str:
    """What an exception says, in one line."""
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    return f"{type(reason).__name__}: {lines[0]}" if lines else type(reason).__name__


def _operator(node: fx.Node) -> str:
    return f"input {node.name!r}" if node.op == "placeholder" else operator_name(node)


def _way_out(reason: BaseException) -> str:
    if isinstance(reason, _FROM_DATA):
        return f"a size depends on data there: pad to a known size, say what is known with torch._check, or {_OUTSIDE}"
    return f"write that line with other operators, or {_OUTSIDE}"
