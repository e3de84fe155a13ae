"""Any traced module -> the one dialect: a flat graph of functional pre-dispatch ATen.

Both roads, Dynamo's graph and an exported program, are retraced by the same function under the fake mode they were
traced with, so the same model gives the same operators on either road: `scaled_dot_product_attention`, `linear`,
`layer_norm`, `matmul`, `softmax.int` and every other functional composite stay whole, views and in-place operators
are resolved by functionalization, dropout becomes what it does in the model's mode.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext, detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.export import ExportedProgram
from torch.export.exported_program import (
    _override_composite_implicit_decomp,
    _split_decomp_table_to_cia_and_python_decomp,
)
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tldr_compile.passes.capture import composites  # noqa: F401 - spells out what it names
from tldr_compile.passes.capture.assertions import Assertions, without_assertions
from tldr_compile.passes.capture.flex import without_blocks
from tldr_compile.passes.capture.input_names import export_paths, is_of_module, shortest_names, source_path
from tldr_compile.passes.capture.repeats import Entangled, separable, traced_by_calls
from tldr_compile.passes.capture.retrace import (
    FAILURES,
    Retracer,
    graphs,
    leave_vmap,
    refuse_higher_order,
    refuse_nested,
    said,
)
from tldr_compile.passes.errors import CaptureError
from tldr_compile.passes.fx_utils import lazy_module
from tldr_compile.passes.sources import where

log = logging.getLogger(__name__)

_CONSTANT_KINDS = frozenset({InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR})
_MUTATION_KINDS = frozenset({OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION, OutputKind.USER_INPUT_MUTATION})
# What Dynamo leaves on its graph module for AOTAutograd and Inductor: without it they forget which inputs are static.
_DYNAMO_ATTRIBUTES = ("_param_name_to_source", "_source_to_user_stacks", "_backend_id", "compile_subgraph_reason")


@dataclass(frozen=True)
class Captured:
    """A model as one flat graph.

    `graph` has the tracer's placeholders, one to one and in order, and one output tuple; every node has `meta["val"]`.
    Its first `len(mutated)` outputs are the values to write back to the placeholders named in `mutated`; the
    rest are the tracer's own outputs. `constants` names the placeholders that hold parameters, buffers or other
    attributes of a module (`get_attr` nodes are constants too); `names` gives the other placeholders' names as the
    user wrote them. `values` has the constants whose numbers are at hand, by the target of their node. `assertions` are
    what the tracer's graph asserts of the data of its inputs, and this one does not.
    """

    graph: fx.GraphModule
    constants: frozenset[str]
    names: Mapping[str, str]
    mutated: tuple[str, ...] = ()
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    assertions: Assertions | None = None


def from_export(program: ExportedProgram) -> Captured:
    """The one dialect of an exported program. Raises `CaptureError` for what has no place in it."""
    signature = program.graph_signature
    _refuse_script_objects(program)
    placeholders = program.graph.find_nodes(op="placeholder")
    values = [node.meta["val"] for node in placeholders]
    mode = detect_fake_mode(values) or FakeTensorMode(shape_env=ShapeEnv())
    already = tuple(
        spec.target for spec in signature.output_specs if spec.kind in _MUTATION_KINDS and spec.target is not None
    )
    plain, assertions = without_assertions(program.graph_module)
    graph, mutated = _retrace(plain, values, mode)
    by_target = {spec.target: spec.arg.name for spec in signature.input_specs if spec.target is not None}
    kinds = {spec.arg.name: spec.kind for spec in signature.input_specs}
    tensors = {**program.state_dict, **program.constants}
    return Captured(
        graph=graph,
        constants=frozenset(name for name, kind in kinds.items() if kind in _CONSTANT_KINDS),
        names=shortest_names(export_paths(program)),
        mutated=mutated + tuple(by_target.get(target, target) for target in already),
        values=_numbers(graph, {spec.arg.name: tensors.get(spec.target) for spec in signature.input_specs}),
        assertions=assertions,
    )


def from_dynamo(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Captured:
    """The one dialect of the graph that a Dynamo backend is called with, traced under the ambient grad mode.

    Raises `CaptureError` for what has no place in it.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    context = TracingContext.try_get()
    mode = (context and context.fake_mode) or detect_fake_mode(example_inputs) or FakeTensorMode(shape_env=ShapeEnv())
    _refuse_quantised(placeholders, example_inputs)
    values = [_fake(value, node, mode) for node, value in zip(placeholders, example_inputs, strict=True)]
    graph, mutated = _retrace(gm, values, mode)
    sources = {node.name: getattr(node, "_dynamo_source", None) for node in placeholders}
    constants = frozenset(name for name, source in sources.items() if source is not None and is_of_module(source))
    paths = {
        node.name: source_path(sources[node.name], node.name)
        for node, value in zip(placeholders, values, strict=True)
        if node.name not in constants and isinstance(value, torch.Tensor)
    }
    given = {node.name: value for node, value in zip(placeholders, example_inputs, strict=True)}
    numbers = _numbers(graph, {name: given[name] for name in constants})
    return Captured(graph=graph, constants=constants, names=shortest_names(paths), mutated=mutated, values=numbers)


def retraced(gm: fx.GraphModule) -> fx.GraphModule:
    """`gm`, whose nodes have `meta["val"]`, with all functions that it calls spelled out in the operators they call."""
    values = [node.meta["val"] for node in _placeholders(gm)]
    mode = detect_fake_mode(values) or FakeTensorMode(shape_env=ShapeEnv())
    graph, written = _retrace(gm, values, mode)
    return with_writes(graph, written)


def _numbers(graph: fx.GraphModule, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The constants that are real tensors, by the target of their node."""
    inputs = {str(node.target): given.get(node.name) for node in _placeholders(graph)}
    found = {**inputs, **_tensor_attributes(graph)}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) and value.device.type != "meta"
    }


def inherit(new: fx.GraphModule, old: fx.GraphModule) -> fx.GraphModule:
    """Give `new` the identity of `old`: its placeholders' names, metadata and sources, and what a tracer left on it.

    The placeholders of both correspond one to one. `meta["val"]` stays the new graph's own. Returns `new`.
    """
    for ours, theirs in zip(_placeholders(new), _placeholders(old), strict=True):
        ours.meta = {**theirs.meta, **{key: ours.meta[key] for key in ("val",) if key in ours.meta}}
        if ours.name != theirs.name:
            ours._rename(theirs.name)
        ours.target = theirs.target
        if hasattr(theirs, "_dynamo_source"):
            ours._dynamo_source = theirs._dynamo_source
    # A graph module registers every tensor constant as a buffer, and AOTAutograd wants a source for every buffer.
    for name in dict(new.named_buffers()).keys() - dict(old.named_buffers()).keys():
        _set_attribute(new, name, _pop_buffer(new, name))
    new.meta = {**old.meta}
    for name in _DYNAMO_ATTRIBUTES:
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    new.recompile()
    return new


def with_writes(graph: fx.GraphModule, mutated: Sequence[str]) -> fx.GraphModule:
    """A copy of `graph` with its first `len(mutated)` outputs turned into writes to the placeholders of those names.

    The result has the calling convention of the tracer's own graph.
    """
    result = inherit(fx.GraphModule(graph, _copy(graph.graph)), graph)
    if not mutated:
        return result
    output = result.graph.output_node()
    values = list(output.args[0])  # type: ignore[arg-type]
    placeholders = {node.name: node for node in _placeholders(result)}
    with result.graph.inserting_before(output):
        for name, value in zip(mutated, values, strict=False):
            target = placeholders[name]
            if target.meta["val"].requires_grad:  # a leaf cannot be written in place under autograd
                target = result.graph.call_function(torch.ops.aten.detach.default, (target,))
            result.graph.call_function(torch.ops.aten.copy_.default, (target, value))
    output.args = (tuple(values[len(mutated) :]),)
    result.recompile()
    return result


def _retrace(gm: fx.GraphModule, values: Sequence[Any], mode: FakeTensorMode) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """`gm` on `values` in the one dialect, and the names of the placeholders it writes to."""
    refuse_higher_order(gm)
    for node, value in zip(_placeholders(gm), values, strict=True):
        refuse_nested(node, value)
    old, gm = gm, without_blocks(gm)
    attributes = _tensor_attributes(gm)
    fakes = [mode.from_tensor(value, static_shapes=True) for value in attributes.values()]
    whole, _ = _split_decomp_table_to_cia_and_python_decomp({})
    ambient = torch.set_grad_enabled(torch.is_grad_enabled())  # a graph that fails may leave its own behind
    dialect = _override_composite_implicit_decomp(whole)
    lazy = _use_lazy_graph_module(True)  # nobody calls what a tracer makes
    with ambient, mode, dialect, lazy, enable_python_dispatcher(), fx.traceback.preserve_node_meta():
        try:
            graph = _traced(gm, attributes, values, fakes)
        except FAILURES as reason:  # no node's own failure: those say where
            raise CaptureError(f"the graph that was captured cannot be traced again: {said(reason)}") from reason
    for node, value in zip(_placeholders(graph), (*values, *fakes), strict=True):
        node.meta["val"] = value  # the tracer's own copy is detached, and does not know what requires grad
    written = _split_outputs(graph, len(values) + len(attributes))
    _restore_attributes(graph, attributes, written)
    inherit(graph, old)
    return graph, tuple(node.name for node in written)


def _traced(
    gm: fx.GraphModule, attributes: Mapping[str, Any], values: Sequence[Any], fakes: Sequence[Any]
) -> fx.GraphModule:
    """`gm` on fake inputs and attributes, which come first in its outputs, as they are in the end."""
    if separable(gm, values):
        try:
            return _traced_by_calls(gm, attributes, values, fakes)
        except Entangled as reason:
            log.debug("the graph is traced as a whole: %s", reason)
        except (CaptureError, *FAILURES) as reason:  # traced as a whole it may not fail, or says why
            log.debug("the graph is traced as a whole, since by calls it failed: %s", said(reason))
    return _traced_as_a_whole(gm, attributes, values, fakes)


def _traced_by_calls(
    gm: fx.GraphModule, attributes: Mapping[str, Any], values: Sequence[Any], fakes: Sequence[Any]
) -> fx.GraphModule:
    graphs: list[fx.Graph] = []

    def run(*args: Any) -> None:
        inputs, lifted = args[: len(values)], args[len(values) :]
        graphs.append(traced_by_calls(gm, inputs, dict(zip(attributes, lifted, strict=True))))

    make_fx(run, pre_dispatch=True)(*values, *fakes)
    return lazy_module(torch.nn.Module(), graphs[0])


def _traced_as_a_whole(
    gm: fx.GraphModule, attributes: Mapping[str, Any], values: Sequence[Any], fakes: Sequence[Any]
) -> fx.GraphModule:
    def run(*args: Any) -> tuple[Any, ...]:
        inputs, lifted = args[: len(values)], args[len(values) :]
        with ExitStack() as open_modes:
            leave_vmap(open_modes)
            outputs = Retracer(gm, dict(zip(attributes, lifted, strict=True)), open_modes).run(*inputs)
        # Under functionalization an input that was written to now holds its new value.
        return (*args, *_flat(outputs))

    functional = dispatch_functionalize(run, FunctionalTensorMode(pre_dispatch=True))
    return make_fx(functional, pre_dispatch=True)(*values, *fakes)


def _split_outputs(graph: fx.GraphModule, count: int) -> list[fx.Node]:
    """Keep, of the first `count` outputs (every input's last value), those of inputs that were written to."""
    output = graph.graph.output_node()
    values: Sequence[Any] = output.args[0]  # type: ignore[assignment]
    inputs = _placeholders(graph)
    written = [
        (node, value)
        for node, value in zip(inputs, values[:count], strict=True)
        if node is not value and isinstance(node.meta.get("val"), torch.Tensor)
    ]
    for node, value in written:
        if node.meta["val"].shape != value.meta["val"].shape:
            raise CaptureError(f"{where(node)} is resized in place, which a merged graph cannot express")
    output.args = (tuple(value for _, value in written) + tuple(values[count:]),)
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    return [node for node, _ in written]


def _restore_attributes(graph: fx.GraphModule, attributes: Mapping[str, Any], written: Sequence[fx.Node]) -> None:
    placeholders = _placeholders(graph)
    lifted = placeholders[len(placeholders) - len(attributes) :]
    for node, (target, value) in zip(lifted, attributes.items(), strict=True):
        if node in written:
            raise CaptureError(f"the module's attribute {target!r} is written to; make it a buffer")
        if node.users:  # a graph inside may not be called at all
            _set_attribute(graph, target, value)
            with graph.graph.inserting_before(node):
                attribute = graph.graph.create_node("get_attr", target)
            attribute.meta = node.meta
            node.replace_all_uses_with(attribute)
        graph.graph.erase_node(node)


def _copy(graph: fx.Graph) -> fx.Graph:
    new = fx.Graph()
    old_output = graph.output_node()
    new.output(new.graph_copy(graph, {}))
    new.output_node().meta = dict(old_output.meta)
    return new


def _refuse_script_objects(program: ExportedProgram) -> None:
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.CUSTOM_OBJ, InputKind.TOKEN):
            raise CaptureError(f"the exported program's input {spec.arg.name!r} is a {spec.kind.name}, not a tensor")


def _refuse_quantised(placeholders: Sequence[fx.Node], values: Sequence[Any]) -> None:
    """Raise `CaptureError` for weights of a class that computes with them in functions of its own."""
    for node, value in zip(placeholders, values, strict=True):
        plain = not isinstance(value, torch.Tensor) or value.is_nested or type(value).__name__ == "DTensor"
        if not plain and is_traceable_wrapper_subclass(value):
            name = getattr(getattr(node, "_dynamo_source", None), "name", node.name)
            raise CaptureError(
                f"{name} is a {type(value).__name__}, which "
                "computes in functions of its own that this graph does not show: merge ahead of time, "
                "merged = tldr_compile.apply(model, ...), and quantise the layers of that, which are found by their "
                "names (torchao.quantization.quantize_(merged, config))"
            )


def _fake(value: Any, node: fx.Node, mode: FakeTensorMode) -> Any:
    """`value` as AOTAutograd makes it fake, so that its symbols are the ones that Dynamo guards on."""
    if not isinstance(value, torch.Tensor) or (isinstance(value, FakeTensor) and value.fake_mode is mode):
        return value
    context = TracingContext.try_get()
    return mode.from_tensor(
        value,
        symbolic_context=context.tensor_to_context.get(value) if context else None,
        source=getattr(node, "_dynamo_source", None),
    )


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def _flat(outputs: Any) -> tuple[Any, ...]:
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def _tensor_attributes(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    """The tensors that `gm` and the graphs inside it read as attributes, by path."""
    targets = [f"{path}{node.target}" for path, each in graphs(gm) for node in each.graph.find_nodes(op="get_attr")]
    values = {target: _get_attribute(gm, target) for target in targets}
    return {target: value for target, value in values.items() if isinstance(value, torch.Tensor)}


def _get_attribute(gm: fx.GraphModule, target: str) -> Any:
    value: Any = gm
    for name in target.split("."):
        value = getattr(value, name)
    return value


def _set_attribute(gm: fx.GraphModule, target: str, value: torch.Tensor) -> None:
    *parents, name = target.split(".")
    module: torch.nn.Module = gm
    for parent in parents:
        if not hasattr(module, parent):
            module.add_module(parent, torch.nn.Module())
        module = getattr(module, parent)
    setattr(module, name, value)


def _pop_buffer(gm: fx.GraphModule, target: str) -> torch.Tensor:
    parent, _, name = target.rpartition(".")
    value = gm.get_submodule(parent)._buffers.pop(name)
    assert value is not None
    return value
