"""The tensors of an exported program: which there are, what they were when captured, and others in their place."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram


def tensors(program: ExportedProgram) -> dict[str, Tensor]:
    """Parameters, buffers and constants, by name."""
    return {**program.state_dict, **program.constants}


def captured(program: ExportedProgram) -> dict[str, Tensor]:
    """What of these the graph reads, as it was when it was captured, without numbers: a module may be moved since."""
    values = {node.name: node.meta["val"] for node in program.graph.find_nodes(op="placeholder")}
    own = tensors(program)
    specs = program.graph_signature.input_specs
    return {spec.target: values[spec.arg.name] for spec in specs if spec.target in own}


def linear_weights(program: ExportedProgram) -> set[str]:
    """The names of the weights of linear layers."""
    names = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target is not None}
    calls = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    return {names[call.args[1].name] for call in calls if call.args[1].name in names}


def filled(program: ExportedProgram, others: Mapping[str, Tensor]) -> ExportedProgram:
    """A program with these tensors in place of its own, in the dtypes that it was captured with."""
    return _replaced(program, lambda name, own: others.get(name, own))


def saved(program: ExportedProgram) -> bytes:
    """A program without the numbers of its tensors and inputs, as `torch.export.save` writes it."""
    bare = _replaced(program, lambda _, own: own.to("meta") if isinstance(own, Tensor) else own)
    bare._example_inputs = None
    written = io.BytesIO()
    torch.export.save(bare, written)
    return written.getvalue()


def _replaced(program: ExportedProgram, other: Callable[[str, Any], Any]) -> ExportedProgram:
    new, dtypes = copy.copy(program), {name: each.dtype for name, each in captured(program).items()}
    for holder in ("_state_dict", "_constants"):
        own = getattr(program, holder)
        setattr(new, holder, {name: _cast(other(name, value), value, dtypes.get(name)) for name, value in own.items()})
    return new


def _cast(value: Any, own: Any, dtype: torch.dtype | None) -> Any:
    """A value as its holder held its own: in a dtype, and as a parameter if that was one."""
    if not isinstance(value, Tensor):
        return value
    if dtype is not None and value.dtype != dtype:
        value = value.detach().to(dtype)
    if isinstance(own, nn.Parameter) and not isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach(), requires_grad=own.requires_grad)
    return value
