"""How a model is called, how it was called when it was captured, and whether a call is like that."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
    """How the model is called, by its `parameters`, and which of them it was captured with."""

    parameters: inspect.Signature
    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    in_spec: TreeSpec
    inputs: tuple[Input, ...]
    ranges: Mapping[sympy.Symbol, tuple[int, int | None]]

    @staticmethod
    def of(program: ExportedProgram, captured: Captured, forward: Callable[..., Any] | None) -> Signature:
        """`forward` is the model's own, where it is known; otherwise the program tells the names."""
        in_spec = program.call_spec.in_spec
        entry = program.module_call_graph[0].signature
        if in_spec is None or entry is None:
            raise CaptureError("the exported program does not know its own call signature")
        positional, keywords = tree_unflatten(list(range(in_spec.num_leaves)), in_spec)
        names = tuple(entry.forward_arg_names or (f"args_{index}" for index in range(len(positional))))
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
        parameters = _named(names[: len(positional)], tuple(keywords)) if forward is None else _own(forward, keywords)
        named = [name for name, each in parameters.parameters.items() if each.kind in _BY_PLACE]
        names = (*named[: len(positional)], *names[len(named) : len(positional)])
        return Signature(parameters, names, tuple(keywords), in_spec, tuple(inputs), ranges)

    def cast(self, casts: Mapping[torch.dtype, torch.dtype]) -> Signature:
        """Of the model in other dtypes."""
        dtypes = [each.dtype and casts.get(each.dtype, each.dtype) for each in self.inputs]
        inputs = (replace(each, dtype=dtype) for each, dtype in zip(self.inputs, dtypes, strict=True))
        return replace(self, inputs=tuple(inputs))

    def bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call as `flatten` takes it. Raises `TypeError` as the call does."""
        found = self.parameters.bind(*args, **kwargs)
        found.apply_defaults()
        rest: tuple[Any, ...] = ()
        given: dict[str, Any] = {}
        for name, value in found.arguments.items():
            kind = self.parameters.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                rest = value
            else:
                given.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
        return rest, given

    def asked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Of a call's arguments by name what was captured, and what is not its default."""
        captured = {*self.positional, *self.keywords}
        defaults = {name: each.default for name, each in self.parameters.parameters.items()}
        return {
            name: value
            for name, value in given.items()
            if name in captured or value is not defaults.get(name, _NOTHING)
        }

    def flatten(self, rest: tuple[Any, ...], given: Mapping[str, Any]) -> list[Any]:
        """The leaves of a call, in the order of the capture: of all that has a name, and of the `rest` by place.

        Raises `ShapeError`.
        """
        given = self.asked(given)
        self._check_names(rest, given)
        named = [name for name in self.positional if name in given]
        by_place = (*(given[name] for name in named), *rest)
        try:
            leaves = self.in_spec.flatten_up_to((by_place, {name: given[name] for name in self.keywords}))
        except ValueError as reason:
            raise ShapeError(f"the arguments are not nested as they were when captured: {reason}") from reason
        for expected, value in zip(self.inputs, leaves, strict=True):
            expected.check(value)
        if not torch.compiler.is_compiling():  # a tracer has symbols of its own
            self._check_symbols(leaves)
        return leaves

    def _check_names(self, rest: tuple[Any, ...], given: Mapping[str, Any]) -> None:
        unnamed = [name for name in self.positional if name not in given]
        missing = [*unnamed[len(rest) :], *(name for name in self.keywords if name not in given)]
        extra = [name for name in given if name not in self.positional and name not in self.keywords]
        more = len(rest) - len(unnamed)
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


_NOTHING = inspect.Parameter.empty
_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _named(positional: Sequence[str], keywords: Sequence[str]) -> inspect.Signature:
    by_place = (inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in positional)
    by_name = (inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in keywords)
    return inspect.Signature([*by_place, *by_name])


def _own(forward: Callable[..., Any], keywords: Iterable[str]) -> inspect.Signature:
    """The model's own, without its annotations, which may name what only its source knows.

    `**kwargs` are left out where none was captured: who asks a signature what a model takes gets a true answer.
    """
    own = inspect.signature(forward).parameters
    hands_on = any(name not in own for name in keywords)
    kept = (each for each in own.values() if hands_on or each.kind is not inspect.Parameter.VAR_KEYWORD)
    return inspect.Signature([each.replace(annotation=_NOTHING) for each in kept])


def method(parameters: inspect.Signature) -> Callable[..., Any]:
    """A method `forward` that is called with these, and hands them on: `self._call(rest, {name: value})`.

    It is written out, as `torch.fx` writes its graphs, so that whoever reads a signature and whoever traces a call sees
    the model's own.
    """
    own = parameters.parameters.values()
    scope = {f"default_of_{each.name}": each.default for each in own if each.default is not _NOTHING}
    shown = [
        each if each.default is _NOTHING else each.replace(default=_Text(f"default_of_{each.name}")) for each in own
    ]
    by_place = inspect.Parameter.POSITIONAL_ONLY
    first = inspect.Parameter("self", by_place if any(each.kind is by_place for each in own) else _BY_PLACE[1])
    rest = next((each.name for each in own if each.kind is inspect.Parameter.VAR_POSITIONAL), "()")
    given = ", ".join(
        f"**{each.name}" if each.kind is inspect.Parameter.VAR_KEYWORD else f"{each.name!r}: {each.name}"
        for each in own
        if each.kind is not inspect.Parameter.VAR_POSITIONAL
    )
    source = f"def forward{inspect.Signature([first, *shown])}:\n    return self._call({rest}, {{{given}}})\n"
    exec(compile(source, "<the model's own signature>", "exec"), scope)
    written: Callable[..., Any] = scope["forward"]
    return written


class _Text(str):
    """A default as it is written in a signature."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _size(size: int | torch.SymInt) -> int | sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else size
