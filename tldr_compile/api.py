"""`apply` and `explain`: merge tokens ahead of time, in a graph that `torch.export` captures."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils._pytree import TreeSpec, tree_unflatten

from tldr_compile import ops, passes
from tldr_compile.config import TokenMerging
from tldr_compile.errors import CaptureError, NothingToMerge, OptionError, ShapeError
from tldr_compile.passes.capture import Captured, from_export, inherit, raised_at, with_writes
from tldr_compile.report import Report

log = logging.getLogger("tldr_compile")

_MISMATCH = "the graph was captured for other inputs: apply tldr_compile again with these, or give it dynamic_shapes="


def apply(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    config: TokenMerging | None = None,
    **options: Any,
) -> MergedModule:
    """`model` with its tokens merged, as a module that is called like `model` and shares its parameters.

    Args:
        model: an `nn.Module`, an FX `GraphModule` or an `ExportedProgram` (which needs no example inputs).
        args, kwargs, dynamic_shapes: as in `torch.export.export`.
        config: the options as one value; or give them by name: `apply(model, (clip,), schedule=[600, 200, 100])`.

    Raises:
        OptionError, ScheduleError: an option does not exist, or cannot be what it is.
        CaptureError: the model cannot be captured as one graph; the tracer's reason is the cause.
        NothingToMerge: no site can be merged (`on_nothing="warn"`: the module then computes what `model` does).
        VerificationError: `verify=True` and the merged graph is not what its definition says.
    """
    config = _config(config, options)
    program = _export(model, args, kwargs, dynamic_shapes)
    result = assemble(program, passes.analyse(from_export(program), config), config)
    if config.verify:
        result.verify(*(program.example_inputs or (args, dict(kwargs or {}))))
    return result


def explain(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    config: TokenMerging | None = None,
    **options: Any,
) -> Report:
    """What `apply` with the same arguments would do, and why; also where there is nothing to merge."""
    config = _config(config, options)
    captured = from_export(_export(model, args, kwargs, dynamic_shapes))
    merged, nothing = _attempt(passes.analyse(captured, config), config)
    return _report(merged, config, nothing)


def assemble(program: ExportedProgram, analysis: passes.Analysis, config: TokenMerging) -> MergedModule:
    """`apply` on a program that is analysed: one analysis serves all configurations with its `clip` and `protect`."""
    merged, nothing = merge(analysis, config)
    report = _report(merged, config, nothing)
    for note in report.little:
        warnings.warn(f"tldr: {note}", stacklevel=3)
    return MergedModule(program, analysis.captured, merged, report)


def _report(merged: passes.Merged, config: TokenMerging, nothing: str | None) -> Report:
    return Report(merged, default=config.is_default_schedule, nothing=nothing, asked=config.entries)


def merge(analysis: passes.Analysis, config: TokenMerging) -> tuple[passes.Merged, str | None]:
    """Plan and rewrite as `config.on_nothing` says.

    Where there is nothing to merge the merged graph is the captured one itself, and the second value says why.
    """
    if config.is_default_schedule:
        log.info("no schedule is given: the default %s is bound to the first sites that can merge", config.entries)
    merged, nothing = _attempt(analysis, config)
    if nothing is not None:
        if config.on_nothing == "raise":
            raise NothingToMerge(nothing)
        warnings.warn(f"tldr: {nothing}; the model runs as it is", stacklevel=3)
    return merged, nothing


def _attempt(analysis: passes.Analysis, config: TokenMerging) -> tuple[passes.Merged, str | None]:
    try:
        return passes.merge(analysis, config, ops), None
    except NothingToMerge as nothing:
        return passes.merge(analysis, replace(config, schedule=()), ops), str(nothing)


class MergedModule(nn.Module):
    """A captured model whose graph merges tokens; called with the arguments that the model was captured with.

    Parameters and buffers are the model's own, under their own names. The captured graph is in the mode (`train` or
    `eval`) that the model was in; changing the mode of this module does not change the graph.
    """

    graph_module: fx.GraphModule
    """The merged graph: parameters, buffers and inputs in, flat outputs out."""

    def __init__(self, program: ExportedProgram, captured: Captured, merged: passes.Merged, report: Report) -> None:
        super().__init__()
        self._facts = _Facts(merged, report)
        self._signature = _Signature.of(program, captured)
        self._out_spec = _out_spec(program)
        self._sources = [_source(spec.kind, spec.target) for spec in program.graph_signature.input_specs]
        self.graph_module = inherit(with_writes(merged.graph, captured.mutated), captured.graph)
        for name, value in {**program.state_dict, **program.constants}.items():
            _register(self, name, value, persistent=name in program.state_dict)

    @property
    def report(self) -> Report:
        """What was merged, and why."""
        return self._facts.report

    @property
    def _merged(self) -> passes.Merged:
        return self._facts.merged

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs, in the model's structure. Raises `ShapeError` before anything runs."""
        return tree_unflatten(self.graph_module(*self._inputs(args, kwargs)), self._out_spec)

    def verify(self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        """Compare the merged graph with its definition on these inputs, on the device of the capture.

        Raises `VerificationError` with the first value that differs.
        """
        with torch.no_grad():
            passes.verify(self._merged, self._flat_inputs(args, dict(kwargs or {})))

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """What `graph_module` is called with."""
        leaves = iter(self._signature.flatten(args, kwargs))
        return [next(leaves) if source is None else functools.reduce(getattr, source, self) for source in self._sources]

    def _flat_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """What the graphs of `_merged` are called with: the same, where the model was captured."""
        examples = (node.meta["val"] for node in self._merged.graph.graph.find_nodes(op="placeholder"))
        return [
            value.to(example.device) if isinstance(value, torch.Tensor) else value
            for value, example in zip(self._inputs(args, kwargs), examples, strict=True)
        ]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> MergedModule:
        before = _device(self)
        super()._apply(fn, recurse)
        after = _device(self)
        if before is not None and after is not None and before != after:
            _move(self.graph_module, before, after)
        return self


@dataclass(frozen=True)
class _Facts:
    """What is known about a merged graph. Nothing changes it: copies of a module share it, on whichever device."""

    merged: passes.Merged
    report: Report

    def __deepcopy__(self, memo: dict[int, Any]) -> _Facts:
        return self


@dataclass(frozen=True)
class _Input:
    """What one flat input has to be: a tensor of a `dtype` and `shape`, or exactly the `constant` of the capture."""

    name: str
    dtype: torch.dtype | None = None
    shape: tuple[int | sympy.Expr, ...] = ()
    constant: Any = None

    @staticmethod
    def of(name: str, value: Any) -> _Input:
        if isinstance(value, torch.Tensor):
            return _Input(name, value.dtype, tuple(_size(size) for size in value.shape))
        return _Input(name, constant=_size(value) if isinstance(value, torch.SymInt) else value)

    def check(self, value: Any) -> None:
        """Raise `ShapeError` unless `value` is that, as far as it can be told without the sizes of other inputs."""
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
        pairs = zip(self.shape, value.shape, strict=True) if self.dtype is not None else ((self.constant, value),)
        return ((expected, size) for expected, size in pairs if isinstance(expected, sympy.Expr))

    @property
    def wanted(self) -> str:
        return f"[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class _Signature:
    """How the model was called when it was captured."""

    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    in_spec: TreeSpec
    inputs: tuple[_Input, ...]
    ranges: Mapping[sympy.Symbol, tuple[int, int | None]]

    @staticmethod
    def of(program: ExportedProgram, captured: Captured) -> _Signature:
        in_spec = program.call_spec.in_spec
        entry = program.module_call_graph[0].signature
        if in_spec is None or entry is None:
            raise CaptureError("the exported program does not know its own call signature")
        positional, keywords = tree_unflatten(list(range(in_spec.num_leaves)), in_spec)
        names = tuple(entry.forward_arg_names or (f"args[{index}]" for index in range(len(positional))))
        values = {node.name: node.meta["val"] for node in program.graph.find_nodes(op="placeholder")}
        inputs = [
            _Input(captured.names[spec.arg.name], constant=spec.arg.value)
            if isinstance(spec.arg, ConstantArgument)
            else _Input.of(captured.names[spec.arg.name], values[spec.arg.name])
            for spec in program.graph_signature.input_specs
            if spec.kind is InputKind.USER_INPUT
        ]
        ranges = {
            symbol: (int(bound.lower), int(bound.upper) if isinstance(bound.upper, sympy.Integer) else None)
            for symbol, bound in program.range_constraints.items()
            if isinstance(symbol, sympy.Symbol)
        }
        return _Signature(names[: len(positional)], tuple(keywords), in_spec, tuple(inputs), ranges)

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


def _config(config: TokenMerging | None, options: Mapping[str, Any]) -> TokenMerging:
    if config is None:
        return TokenMerging.from_options(options)
    if options:
        raise OptionError(f"config= is given together with {', '.join(options)}; give one or the other")
    if not isinstance(config, TokenMerging):
        raise OptionError(f"config={config!r}: config is a TokenMerging")
    return config


def _export(
    model: nn.Module | ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, dynamic_shapes: Any
) -> ExportedProgram:
    if isinstance(model, MergedModule):
        raise CaptureError("this model is merged already: apply tldr_compile to the model that it was made of")
    if isinstance(model, ExportedProgram):
        if dynamic_shapes is not None:
            raise OptionError("dynamic_shapes= belongs to torch.export.export, and this program is already exported")
        return model
    if not isinstance(model, nn.Module):
        raise CaptureError(f"the model is {type(model).__name__}, not an nn.Module or an ExportedProgram")
    if not isinstance(args, tuple):
        raise CaptureError(f"args is {type(args).__name__}, not a tuple: for one input write (input,)")
    try:
        return torch.export.export(model, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
    except Exception as reason:  # the tracer runs the model's own code, which can raise anything
        raise CaptureError(
            f"torch.export cannot capture {type(model).__name__} as one graph: {type(reason).__name__}: {reason}\n"
            f"It stopped at {raised_at(reason) or 'the arguments'}. Write that so that it can be traced, or try "
            'torch.compile(model, backend="tldr"), which leaves to Python what it cannot trace, or apply on what '
            "torch.export.export(..., strict=True) gives"
        ) from reason


def _out_spec(program: ExportedProgram) -> TreeSpec:
    if program.call_spec.out_spec is None:
        raise CaptureError("the exported program does not know the structure of its outputs")
    return program.call_spec.out_spec


def _source(kind: InputKind, target: str | None) -> tuple[str, ...] | None:
    return None if kind is InputKind.USER_INPUT or target is None else tuple(target.split("."))


def _size(size: int | torch.SymInt) -> int | sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _register(root: nn.Module, name: str, value: torch.Tensor, *, persistent: bool) -> None:
    *path, leaf = name.split(".")
    if (first := name.split(".")[0]) not in root._modules and hasattr(root, first):
        raise CaptureError(
            f"the model's attribute {first!r} has the name of an attribute that every merged module has; rename it, or "
            'compile the model with torch.compile(model, backend="tldr")'
        )
    module = root
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    if isinstance(value, nn.Parameter):
        module.register_parameter(leaf, value)
    else:
        module.register_buffer(leaf, value, persistent=persistent)


def _device(module: nn.Module) -> torch.device | None:
    return next((value.device for value in (*module.parameters(), *module.buffers())), None)


def _move(graph: fx.GraphModule, before: torch.device, after: torch.device) -> None:
    """Let what `graph` makes by itself (position ids, tables) be born on the new device, where strides may differ."""

    def moved(value: Any) -> Any:
        return after if value == before and isinstance(value, torch.device) else value

    for node in graph.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, moved)
        node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
        if node.op == "get_attr":
            setattr(graph, node.target, getattr(graph, node.target).to(after))
    graph.recompile()
