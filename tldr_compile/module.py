"""What `apply` returns: a captured model whose graph merges tokens, as a module that is called like the model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import TreeSpec, tree_unflatten

from tldr_compile import passes
from tldr_compile.errors import CaptureError
from tldr_compile.exporters import Preparation
from tldr_compile.passes.capture import Assertions, Captured, inherit, with_writes
from tldr_compile.passes.plan import rows_of
from tldr_compile.passes.sizes import Size
from tldr_compile.report import Report
from tldr_compile.signature import Signature


class Kept(NamedTuple):
    """Which tokens are left where outputs leave merged: one of each group, which stands for it.

    A row holds what lies in one dimension of an output: the tokens of a sample, or all frames that are packed in one
    row. A block of tokens that stay together is one place. Protected tokens are not counted. Where the model puts some
    outputs in another order at its end, the places are those of that order.
    """

    places: Tensor
    """int64 `[B, n]`: where along the row of length `N` each stood; ascending within each frame that is apart."""
    weights: Tensor
    """float32 `[B, n]`: the mass of each group."""


# So that a program that returns one can be saved.
torch.utils._pytree._register_namedtuple(Kept, serialized_type_name="tldr_compile.Kept")


@dataclass(frozen=True)
class Origin:
    """The model that a program was made of, if it is known; and what computes inputs of the program that it lacks."""

    model: nn.Module | None = None
    preparation: Preparation | None = None


UNKNOWN = Origin()


class MergedModule(nn.Module):
    """A captured model whose graph merges tokens; called with the arguments that the model was captured with.

    Parameters and buffers are the model's own, under their own names. The captured graph is in the mode (`train` or
    `eval`) that the model was in; changing the mode of this module does not change the graph. Plain attributes of the
    model, such as its `config`, can be read here too.
    """

    graph_module: fx.GraphModule
    """The merged graph: parameters, buffers and inputs in, flat outputs out."""

    def __init__(
        self,
        program: ExportedProgram,
        captured: Captured,
        merged: passes.Merged,
        report: Report,
        origin: Origin = UNKNOWN,
    ) -> None:
        super().__init__()
        self._facts = _Facts(merged, report, origin, captured.assertions)
        self._signature = Signature.of(program, captured)
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

    def __getattr__(self, name: str) -> Any:
        """What this module lacks is looked up on the model: plain values; `dtype` and `device` are those held here."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            facts = self.__dict__.get("_facts")  # not there while a copy is being made
            value = getattr(facts.origin.model, name, None) if facts and not name.startswith("_") else None
            if isinstance(value, torch.dtype):
                return next((each.dtype for each in self.parameters() if each.is_floating_point()), value)
            if isinstance(value, torch.device):
                return _device(self) or value
            if value is None or callable(value) or isinstance(value, torch.Tensor):  # a module is callable
                raise
            return value

    @property
    def tokens_out(self) -> Size:
        """How many tokens are left in each row of `Kept`: a number, or a formula of the sizes that were left open.

        It is known before anything runs, and the same for every input. Raises `OptionError` where no output leaves
        merged, or several do that are grouped differently.
        """
        return rows_of(self._merged.plan).left

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs, in the model's structure. Raises `ShapeError` before anything runs.

        With `return_places=True` a pair: the outputs, and the tokens that are left, as `Kept`; None if nothing merges.
        """
        inputs = self._inputs(args, kwargs)
        if self._facts.assertions is not None:
            self._facts.assertions(inputs)
        results = self.graph_module(*inputs)
        if not self._merged.options.return_places:
            return tree_unflatten(results, self._out_spec)
        own, kept = results[: self._out_spec.num_leaves], results[self._out_spec.num_leaves :]
        return tree_unflatten(own, self._out_spec), Kept(*kept) if kept else None

    def verify(self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        """Compare the merged graph with its definition on these inputs, on the device of the capture.

        Raises `VerificationError` with the first value that differs.
        """
        with torch.no_grad():
            passes.verify(self._merged, self._flat_inputs(args, dict(kwargs or {})))

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """What `graph_module` is called with."""
        if (preparation := self._facts.origin.preparation) is not None:
            args, kwargs = (), preparation(args, kwargs)
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
    origin: Origin
    assertions: Assertions | None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Facts:
        return self


def _out_spec(program: ExportedProgram) -> TreeSpec:
    if program.call_spec.out_spec is None:
        raise CaptureError("the exported program does not know the structure of its outputs")
    return program.call_spec.out_spec


def _source(kind: InputKind, target: str | None) -> tuple[str, ...] | None:
    return None if kind is InputKind.USER_INPUT or target is None else tuple(target.split("."))


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
