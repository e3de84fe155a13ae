"""Capture through transformers' own exporter, for models whose sizes come out of tensors.

Such a model computes tables (where segments begin, positions, windows) from a tensor of sizes, with code that no tracer
can follow. The exporter takes the tables as inputs of the program; a `Preparation` computes them at every call.
"""

from __future__ import annotations

import inspect
import io
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from tldr_compile.errors import CaptureError, ShapeError

log = logging.getLogger("tldr_compile")

HOW = (
    "    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter\n"
    "    program = DynamoExporter().export(model, inputs, config=DynamoConfig(dynamic=False)).program"
)
NEEDED = "transformers 5.23 or newer"
INSTALL = "pip install 'tldr-compile[towers]'"

# What the exporter sets on the model's configuration while it traces: they are no inputs of the program.
_FLAGS = ("return_dict", "output_hidden_states", "output_attentions", "use_cache", "return_loss")


@dataclass(frozen=True)
class Preparation:
    """What turns a call of the model into the inputs of its program: its arguments by name, and the tables."""

    model: nn.Module
    dtype: torch.dtype | None
    """What the exporter casts all floating-point inputs to."""
    flags: Mapping[str, Any]
    sizes: Mapping[str, Any]
    """The small tensors of numbers that the model was captured with, as lists: what tables are computed from."""
    shapes: Mapping[str, tuple[int, ...]]
    """The shapes of all tensors that the program reads."""
    tables: tuple[str, ...]

    @staticmethod
    def of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Preparation, dict[str, Any]]:
        """The preparation of calls like this one, and what the exporter is called with.

        Raises `TypeError` where these are not the model's arguments, and `CaptureError` where there are no tables for
        them, or segments of unequal length.
        """
        inputs = _by_name(model, args, kwargs)
        config = getattr(model, "config", None)
        flags = {flag: getattr(config, flag, None) for flag in _FLAGS}
        flags |= {flag: inputs[flag] for flag in _FLAGS if inputs.get(flag) is not None}
        plain = {name: value for name, value in inputs.items() if name not in _FLAGS}
        dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), None)
        prepared = _prepared(model, dtype, plain, CaptureError)
        shapes = {name: tuple(value.shape) for name, value in prepared.items() if isinstance(value, torch.Tensor)}
        tables = tuple(name for name in shapes if name not in plain)
        return Preparation(model, dtype, flags, _sizes(plain), shapes, tables), inputs

    @torch.compiler.disable
    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of the program; tables that are given stay as they are. Raises `ShapeError`."""
        try:
            inputs = _by_name(self.model, args, kwargs)
        except TypeError as reason:
            raise ShapeError(f"the arguments are not those of the model's forward: {reason}") from reason
        plain = {name: value for name, value in inputs.items() if not self._is_flag(name, value)}
        prepared = _prepared(self.model, self.dtype, plain, ShapeError)
        self._check_shapes(plain, prepared)
        return prepared

    def __str__(self) -> str:
        text = "captured by transformers' DynamoExporter"
        if not self.tables:
            return text
        return (
            f"{text}, which takes the tables ({', '.join(self.tables)}) as inputs; they are computed from "
            f"{', '.join(self.sizes) or 'the inputs'} at every call"
        )

    def _is_flag(self, name: str, value: Any) -> bool:
        """Whether it says which outputs there are, and is no input. Raises `ShapeError` if it asks for others."""
        if name not in _FLAGS:
            return False
        captured = self.flags[name]
        if value is not None and captured is not None and value != captured:
            raise ShapeError(f"{name}={value!r}: the model was captured with {captured!r}; apply it again with these")
        return True

    def _check_shapes(self, plain: Mapping[str, Any], prepared: Mapping[str, Any]) -> None:
        found = {name: tuple(value.shape) for name, value in prepared.items() if isinstance(value, torch.Tensor)}
        other = [name for name in self.shapes if name in found and found[name] != self.shapes[name]]
        if other:
            wanted, came = (
                ", ".join(f"{name} {list(shapes[name])}" for name in other) for shapes in (self.shapes, found)
            )
            raise ShapeError(
                f"the model was captured with {_text(self.sizes)} ({wanted}), and is called with "
                f"{_text(_sizes(plain))} ({came}): apply tldr_compile to the model again with these"
            )


def capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[ExportedProgram, Preparation]:
    """A model of transformers as its exporter captures it, and what turns a call into the program's inputs.

    Raises `ImportError` without the exporter, `CaptureError` where it has no tables for these inputs or segments are
    of unequal length, and what the exporter or the model's own code raises.
    """
    # Optional, and seconds to import.
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter  # noqa: PLC0415

    preparation, inputs = Preparation.of(model, args, kwargs)
    changed = "forward" in vars(model)
    try:
        with unheard():
            program = DynamoExporter().export(model, inputs, config=DynamoConfig(dynamic=False)).program
    finally:
        if not changed:  # the exporter puts the method back as an attribute of this one model
            vars(model).pop("forward", None)
    read = {node.name for node in program.graph.find_nodes(op="placeholder") if node.users}
    used = {spec.arg.name for spec in program.graph_signature.input_specs} & read
    preparation = replace(preparation, shapes={name: each for name, each in preparation.shapes.items() if name in used})
    log.info("%s is %s", type(model).__name__, preparation)
    return program, preparation


@contextmanager
def unheard() -> Iterator[None]:
    """Keep from stderr what is written there while the block runs, unless it succeeds.

    Where `torch.export` fails it prints the graph that it has got so far: pages, of a model that is captured after all.
    """
    written = io.StringIO()
    with redirect_stderr(written):
        yield
    sys.stderr.write(written.getvalue())


def is_pretrained(model: nn.Module) -> bool:
    """Whether `model` is one of transformers, which is imported then."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names. Raises `TypeError`."""
    signature = inspect.signature(model.forward)
    named: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise TypeError(f"{len(value)} positional arguments too many")
        named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return named


def _prepared(
    model: nn.Module, dtype: torch.dtype | None, inputs: Mapping[str, Any], refusal: type[CaptureError | ShapeError]
) -> dict[str, Any]:
    """The inputs and the tables: of the model's dtype, as the exporter casts them, and where the clip lies.

    Raises `refusal` where there are no tables for these inputs, or segments of unequal length.
    """
    from transformers.exporters.utils import precompute_export_inputs  # noqa: PLC0415 - optional

    prepared = dict(inputs)
    try:
        with torch.no_grad():
            precompute_export_inputs(model, prepared)
    except Exception as reason:  # the model's own code, which can raise anything
        raise refusal(f"transformers computes no tables from {_text(_sizes(inputs))}: {reason}") from reason
    if (unequal := _unequal(prepared)) is not None:
        raise refusal(f"{_text(_sizes(inputs))}: {unequal}")
    # A table that is given counts, as in the model; what the program takes as numbers cannot stay a tensor.
    given = {
        name: value
        for name, value in inputs.items()
        if value is not None and isinstance(prepared.get(name), torch.Tensor)
    }
    device = next((value.device for value in given.values() if value.is_floating_point()), None)
    return {
        name: _as(given[name], dtype, None) if name in given else _as(value, dtype, device)
        for name, value in prepared.items()
    }


def _as(value: Any, dtype: torch.dtype | None, device: torch.device | None) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(dtype=dtype if value.is_floating_point() else None, device=device)


def _unequal(prepared: Mapping[str, Any]) -> str | None:
    """What to say where segments that attend apart are not of one length; None where they are."""
    for name, bounds in prepared.items():
        if name.startswith("cu_") and isinstance(bounds, torch.Tensor):
            lengths = bounds.diff().tolist()
            if len(set(lengths)) > 1:
                shown = ", ".join(map(str, lengths[:8])) + (", ..." if len(lengths) > 8 else "")
                return (
                    f"the segments that attend apart are {shown} tokens long by {name}, and transformers' exporter "
                    "takes segments of one length: give all frames one size (one that windows divide, where there are "
                    "any), and clips of another size, and pictures, in a call of their own"
                )
    return None


def _sizes(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.tolist()
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and not value.is_floating_point() and value.numel() <= 30
    }


def _text(sizes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in sizes.items()) or "no sizes"
