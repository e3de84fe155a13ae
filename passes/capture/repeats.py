"""Trace every call once: calls of one operator on operands of one kind become the same, in whatever layer they stand.

    linear(x0, w0)  ->  traced: aten.linear
    linear(x1, w1)  ->  written down again: aten.linear

A model repeats one layer, and tracing a call costs far more than writing down what became of it. A call is traced by
itself, so this is for graphs whose calls do nothing but read their operands and return a result. An operand may be
written to where nobody else sees it: `x = arange(n); x /= n`. Any other graph is traced as a whole (`Entangled`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.fx.proxy import GraphAppendingTracer
from torch.utils import _pytree as pytree

from tldr_compile.passes.capture.retrace import Retracer, graphs, leave_vmap
from tldr_compile.passes.fx_utils import Alike, call_key
from tldr_compile.passes.sizes import is_open

# What a tracer knows of a result that does not follow from where in the model it stands.
_OF_THE_CALL = ("val", "tensor_meta", "original_aten", "torch_fn", "eager_input_vals")


class Entangled(Exception):
    """A call does more than to read its operands and return a result, or a size is not known."""


@dataclass(frozen=True)
class _Result:
    """A tensor that a call returned, and the tracer's node for it."""

    node: fx.Node
    tensor: Tensor


@dataclass(frozen=True)
class _Traced:
    """What became of a call: the tracer's nodes for its operands, those it made in their order, and its result.

    `written` are the operands that it writes to, by number; `fresh` says that the result has memory of its own.
    """

    operands: tuple[fx.Node, ...]
    made: tuple[tuple[fx.Node, Any, Any], ...]  # with their arguments: a tracer takes them from a node that it drops
    result: Any
    written: tuple[int, ...]
    fresh: bool


def separable(gm: fx.GraphModule, values: Sequence[Any]) -> bool:
    """Whether every call of a graph may be traced by itself, as far as its tracer noted what calls return."""
    calls = [node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    noted = (node.meta.get("example_value", node.meta.get("val")) for node in calls)
    alone = len(list(graphs(gm))) == 1 and all(map(_is_told, values))
    return alone and all(leaves and all(map(_is_told, leaves)) for leaves in map(pytree.tree_leaves, noted))


def _is_told(value: Any) -> bool:
    """A tensor or a number, of known size."""
    return isinstance(value, (Tensor, int, float)) and not is_open(value)


def traced_by_calls(gm: fx.GraphModule, inputs: Sequence[Tensor], attributes: Mapping[str, Tensor]) -> fx.Graph:
    """`gm` in the dialect that is traced around this call, on tensors that the tracer knows.

    The graph has a placeholder for every input and attribute, and returns them before the outputs of `gm`.

    Raises:
        Entangled: a call cannot be traced by itself.
        CaptureError: a call cannot be traced.
    """
    with ExitStack() as open_modes:
        leave_vmap(open_modes)
        return _ByCalls(gm, Retracer(gm, attributes, open_modes)).run(inputs, attributes)


class _ByCalls:
    def __init__(self, gm: fx.GraphModule, retracer: Retracer) -> None:
        self.gm, self.retracer = gm, retracer
        self.graph = fx.Graph()
        self.writer = GraphAppendingTracer(self.graph)
        self.env: dict[fx.Node, Any] = {}  # a new node for every tensor
        self.tensors: dict[fx.Node, Tensor] = {}  # by new node; one stands for all of its kind
        self.fresh: set[fx.Node] = set()
        self.traced: dict[Any, _Traced] = {}
        self.alike = Alike()

    def run(self, inputs: Sequence[Tensor], attributes: Mapping[str, Tensor]) -> fx.Graph:
        given = [self._input(number, each) for number, each in enumerate((*inputs, *attributes.values()))]
        feed, lifted = iter(given), dict(zip(attributes, given[len(inputs) :], strict=True))
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = next(feed)
            elif node.op == "get_attr":
                if node.target not in lifted:
                    raise Entangled(f"{node.name} is no tensor")
                self.env[node] = lifted[node.target]
            elif node.op == "output":
                (outputs,) = self._read(node.args)
                self.graph.output((*given, *(outputs if isinstance(outputs, (tuple, list)) else (outputs,))))
            elif node.target is getitem and isinstance(self.env[node.args[0]], (tuple, list)):
                self.env[node] = self.env[node.args[0]][node.args[1]]
            else:
                self.env[node] = self._call(node)
        return self.graph

    def _input(self, number: int, value: Tensor) -> fx.Node:
        node = self.graph.placeholder(f"arg{number}_1")
        self.tensors[node] = self._known(value)
        return node

    def _known(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, FakeTensor) or tensor.constant is not None:  # a call may ask for its numbers
            raise Entangled("a tensor whose numbers are known")
        return self.alike(tensor)

    def _read(self, tree: Any) -> Any:
        return fx.map_arg(tree, self.env.__getitem__)

    def _call(self, node: fx.Node) -> Any:
        arguments = self._read((node.args, dict(node.kwargs)))
        operands: dict[fx.Node, tuple[int, int]] = {}
        fx.map_arg(arguments, lambda each: operands.setdefault(each, (len(operands), id(self.tensors[each]))))
        key = (node.op, node.target, call_key(arguments, operands.__getitem__))
        if key not in self.traced:
            self.traced[key] = self._trace(node, tuple(operands))
        traced = self.traced[key]
        if traced.written and not all(each in self.fresh and len(each.users) == 1 for each in node.all_input_nodes):
            raise Entangled(f"{node.name} writes to what others may see")
        if traced.fresh:
            self.fresh.add(node)
        return self._written(node, traced, tuple(operands))

    def _trace(self, node: fx.Node, operands: Sequence[fx.Node]) -> _Traced:
        """Run one call on what stands for its operands, told apart where one tensor stands for two."""
        mode = get_proxy_mode()
        assert mode is not None
        tensors: list[Tensor] = []
        for each in operands:
            tensor = self.tensors[each]
            again = any(tensor is other for other in tensors)
            tensors.append(torch.ops.aten.alias.default(tensor) if again else tensor)
        def node_of(tensor: Tensor) -> fx.Node:
            slot = get_proxy_slot(tensor, mode.tracer, None)
            if slot is None:
                raise Entangled("a tensor that the tracer did not see")
            return slot.proxy.node

        read = tuple(map(node_of, tensors))  # before it: a tensor that is returned as it is gets a new node
        before = len(mode.tracer.graph.nodes)

        def run(*functional: Tensor) -> Any:
            live = dict(zip(operands, functional, strict=True))
            self.retracer.env = {each: fx.map_arg(self.env[each], live.__getitem__) for each in node.all_input_nodes}
            return functional, self.retracer.run_node(node)

        after, result = dispatch_functionalize(run, FunctionalTensorMode(pre_dispatch=True))(*tensors)
        made = tuple(mode.tracer.graph.nodes)[before:]
        leaves = pytree.tree_leaves(result)
        of_operands = operands and isinstance(result, (int, float))
        if not (of_operands or (leaves and all(isinstance(each, Tensor) for each in leaves))):
            raise Entangled(f"{node.name} is called for what it does")
        if any(each.op != "call_function" for each in made):
            raise Entangled(f"{node.name} has a constant of its own")

        memory = {each.untyped_storage()._cdata for each in tensors}
        return _Traced(
            operands=read,
            made=tuple((each, each.args, each.kwargs) for each in made),
            result=pytree.tree_map_only(Tensor, lambda each: _Result(node_of(each), self._known(each)), result),
            written=tuple(k for k, (one, other) in enumerate(zip(tensors, after, strict=True)) if one is not other),
            fresh=isinstance(result, Tensor) and result.untyped_storage()._cdata not in memory,
        )

    def _written(self, node: fx.Node, traced: _Traced, operands: Sequence[fx.Node]) -> Any:
        """What became of a call, once more."""
        new = dict(zip(traced.operands, operands, strict=True))
        with fx.traceback.set_current_meta(node):
            for made, args, kwargs in traced.made:
                args, kwargs = fx.map_arg((args, kwargs), new.__getitem__)
                name = self.graph._target_to_str(packet.__name__) if (packet := _packet(made)) else None
                new[made] = self.writer.create_node("call_function", made.target, args, kwargs, name)
                new[made].meta.update({key: made.meta[key] for key in _OF_THE_CALL if key in made.meta})

        def result(each: _Result) -> fx.Node:
            self.tensors[new[each.node]] = each.tensor
            return new[each.node]

        return pytree.tree_map_only(_Result, result, traced.result)


def _packet(node: fx.Node) -> Any:
    """All overloads of an operator, after which a tracer names its node."""
    return node.target.overloadpacket if isinstance(node.target, OpOverload) else None
