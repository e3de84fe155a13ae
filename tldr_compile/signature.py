"""How a model was called when it was captured, and whether a call is like that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils._pytree import TreeSpec, tree_unflatten

from tldr_compile.errors import CaptureError, ShapeError
from tldr_compile.passes.capture import Captured

_MISMATCH = "the graph was captured for other inputs: apply tldr_compile again with these, or give it dynamic_shapes="


@dataclass(frozen=True)
class Input:
    """What one flat input has to be: a tensor of a `dtype` and `shape`, or exactly the `constant` of the capture.

    What the graph does not `read` may be anything.
    """

    name: str
    dtype: torch.dtype | None = None
    shape: tuple[int | sympy.Expr, ...] = ()
    constant: Any = None
    read: bool = True

    @staticmethod
    def of(name: str, placeholder: fx.Node) -> Input:
        value = placeholder.meta["val"]
        if isinstance(value, torch.Tensor) and not placeholder.users:
            return Input(name, read=False)
        if isinstance(value, torch.Tensor):
            return Input(name, value.dtype, tuple(_size(size) for size in value.shape))
        return Input(name, constant=_size(value) if isinstance(value, torch.SymInt) else value)

    def check(self, value: Any) -> None:
        """Raise `ShapeError` unless `value` is that, as far as it can be told without the sizes of other inputs."""
        if not self.read:
            return
        if self.dtype is None:
            if not isinstance(self.constant, sympy.Expr) and (
                type(value) is not type(self.constant) or value != self.constant
            ):
                raise ShapeError(f"input {self.name!r}: expected {self.constant!r}, got {value!r}; {_MISMATCH}")
            return
        if not isinstance(value, torch.Tensor):
            raise ShapeError(f"input {self.name!r}: expected a tensor {self.wanted}, got {type(value).__name__}")
        if value.dtype != self.dtype:
            raise ShapeError(f"input {self.name!r}: expected {self.dtype}, got {value.dtype}; convert the input")
        fits = len(value.shape) == len(self.shape) and all(
            not isinstance(expected, int) or expected == size
            for expected, size in zip(self.shape, value.shape, strict=True)
        )
        if not fits:
            raise ShapeError(f"input {self.name!r}: expected {self.wanted}, got {list(value.shape)}; {_MISMATCH}")

    def sizes(self, value: Any) -> Iterator[tuple[sympy.Expr, int]]:
        """The symbolic sizes of the capture with the sizes they now have."""
        if not self.read:
            return iter(())
        pairs = zip(self.shape, value.shape, strict=True) if self.dtype is not None else ((self.constant, value),)
        return ((expected, size) for expected, size in pairs if isinstance(expected, sympy.Expr))

    @property
    def wanted(self) -> str:
        return f"[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Signature:
    """How the model was called when it was captured."""

    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    in_spec: TreeSpec
    inputs: tuple[Input, ...]
    ranges: Mapping[sympy.Symbol, tuple[int, int | None]]

    @staticmethod
    def of(program: ExportedProgram, captured: Captured) -> Signature:
        in_spec = program.call_spec.in_spec
        entry = program.module_call_graph[0].signature
        if in_spec is None or entry is None:
            raise CaptureError("the exported program does not know its own call signature")
        positional, keywords = tree_unflatten(list(range(in_spec.num_leaves)), in_spec)
        names = tuple(entry.forward_arg_names or (f"args[{index}]" for index in range(len(positional))))
        placeholders = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
        inputs = [
            Input(captured.names[spec.arg.name], constant=spec.arg.value)
            if isinstance(spec.arg, ConstantArgument)
            else Input.of(captured.names[spec.arg.name], placeholders[spec.arg.name])
            for spec in program.graph_signature.input_specs
            if spec.kind is InputKind.USER_INPUT
        ]
        ranges = {
            symbol: (int(bound.lower), int(bound.upper) if isinstance(bound.upper, sympy.Integer) else None)
            for symbol, bound in program.range_constraints.items()
            if isinstance(symbol, sympy.Symbol)
        }
        return Signature(names[: len(positional)], tuple(keywords), in_spec, tuple(inputs), ranges)

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The leaves of a call, in the order of the capture. Raises `ShapeError`."""
        bound = (self._positional(args, kwargs), {name: kwargs[name] for name in self.keywords if name in kwargs})
        self._check_names(args, kwargs)
        try:
            leaves = self.in_spec.flatten_up_to(bound)
        except ValueError as reason:
            raise ShapeError(f"the arguments are not nested as they were when captured: {reason}") from reason
        for expected, value in zip(self.inputs, leaves, strict=True):
            expected.check(value)
        if not torch.compiler.is_compiling():  # a tracer has symbols of its own
            self._check_symbols(leaves)
        return leaves

    def _positional(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        return (*args, *(kwargs[name] for name in self.positional[len(args) :] if name in kwargs))

    def _check_names(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        rest = self.positional[len(args) :]
        missing = [name for name in (*rest, *self.keywords) if name not in kwargs]
        extra = [name for name in kwargs if name not in rest and name not in self.keywords]
        more = len(args) - len(self.positional)
        problems = [
            *([f"missing {', '.join(missing)}"] if missing else []),
            *([f"not captured: {', '.join(extra)}"] if extra else []),
            *([f"{more} positional too many"] if more > 0 else []),
        ]
        if problems:
            known = ", ".join((*self.positional, *(f"{name}=" for name in self.keywords)))
            raise ShapeError(f"the model was captured with the arguments ({known}); {'; '.join(problems)}")

    def _check_symbols(self, leaves: Sequence[Any]) -> None:
        found = [
            (expected, symbolic, size)
            for expected, value in zip(self.inputs, leaves, strict=True)
            for symbolic, size in expected.sizes(value)
        ]
        known: dict[sympy.Expr, int] = {}
        for expected, symbolic, size in found:
            if isinstance(symbolic, sympy.Symbol):
                low, high = self.ranges.get(symbolic, (0, None))
                if size < low or (high is not None and size > high):
                    bounds = f"at least {low}" if high is None else f"between {low} and {high}"
                    raise ShapeError(
                        f"input {expected.name!r}: expected {expected.wanted} with {symbolic} {bounds}, got {size}"
                    )
                known.setdefault(symbolic, size)
        for expected, symbolic, size in found:
            wanted = symbolic.subs(known)
            if wanted.is_number and wanted != size:
                raise ShapeError(
                    f"input {expected.name!r}: expected {expected.wanted}, where {symbolic} is {wanted} by the other "
                    f"inputs, got {size}"
                )


def _size(size: int | torch.SymInt) -> int | sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else size
