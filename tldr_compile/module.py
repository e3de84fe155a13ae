"""What `apply` returns: a captured model whose graph merges tokens, as a module that is called like the model."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import TreeSpec, tree_unflatten

from tldr_compile import passes
from tldr_compile.config import TokenMerging
from tldr_compile.errors import CaptureError
from tldr_compile.exporters import Preparation
from tldr_compile.hollow import held, hold
from tldr_compile.moving import Casts, casts, check, move, retype
from tldr_compile.passes.capture import Assertions, Captured, inherit, with_writes
from tldr_compile.passes.plan import rows_of
from tldr_compile.passes.sizes import Size
from tldr_compile.portable import decomposed
from tldr_compile.program import captured, linear_weights, saved, tensors
from tldr_compile.report import Report
from tldr_compile.signature import Signature, method


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
    training: bool = False


UNKNOWN = Origin()

Remake: TypeAlias = Callable[[bytes, Mapping[str, Tensor], TokenMerging, Origin], "MergedModule"]
"""Makes a module again: of a saved program, its tensors, the options, and what the program was made of."""


class MergedModule(nn.Module):
    """A captured model whose graph merges tokens, called as the model is: `forward` has the model's own signature.

    Parameters and buffers are the model's own, under their own names. The captured graph is in the mode (`train` or
    `eval`) that the model was in; changing the mode of this module does not change the graph, and warns. Plain
    attributes of the model, such as its `config`, can be read here too.

    It is copied, pickled (the graph is planned anew from the captured program when it is loaded) and moved as modules
    are; `.to(dtype)` raises `CaptureError` where the graph cannot follow.
    """

    graph_module: fx.GraphModule
    """The merged graph: parameters, buffers and inputs in, flat outputs out."""

    def __init__(
        self,
        program: ExportedProgram,
        graphs: Captured,
        merged: passes.Merged,
        report: Report,
        origin: Origin = UNKNOWN,
        *,
        config: TokenMerging,
        remake: Remake,
    ) -> None:
        super().__init__()
        self._facts = _Facts(program, config, merged, report, origin, graphs.assertions, remake)
        self._signature = Signature.of(program, graphs, origin.model.forward if origin.model is not None else None)
        self._out_spec = _out_spec(program)
        self._sources = [_source(spec.kind, spec.target) for spec in program.graph_signature.input_specs]
        graph = with_writes(merged.graph, graphs.mutated)
        if config.portable and merged.plan.merges:
            graph = decomposed(graph, graphs.graph, config.portable)
        self.graph_module = _open(inherit(graph, graphs.graph))
        self.__class__ = _class_of(self._signature.parameters, self.graph_module, self._out_spec)
        self._hold(tensors(program))
        super().train(origin.training)

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

    def _call(self, rest: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """`forward`: the model's outputs, in the model's structure. Raises `ShapeError` before anything runs.

        With `return_places=True` a pair: the outputs, and the tokens that are left, as `Kept`; None if nothing merges.
        What is exported of a portable module gives `(places, weights)`, a tuple.
        """
        inputs = self._inputs(rest, given)
        if self._facts.assertions is not None:
            self._facts.assertions(inputs)
        results = self.graph_module(*inputs)
        if not self._facts.config.return_places:
            return tree_unflatten(results, self._out_spec)
        own, kept = results[: self._out_spec.num_leaves], results[self._out_spec.num_leaves :]
        if kept and not (self._facts.config.portable and torch.compiler.is_exporting()):
            return tree_unflatten(own, self._out_spec), Kept(*kept)
        return tree_unflatten(own, self._out_spec), tuple(kept) or None  # a file that needs no class of ours

    def verify(self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        """Compare the merged graph with its definition on these inputs, on the device of the capture.

        Raises `VerificationError` with the first value that differs.
        """
        with torch.no_grad():
            passes.verify(self._merged, self._flat_inputs(args, dict(kwargs or {})))

    def train(self, mode: bool = True) -> MergedModule:
        """Sets `training`; the graph stays in the mode that it was captured in."""
        if mode != self._facts.origin.training:
            was, now = ("eval", "train") if mode else ("train", "eval")
            warnings.warn(
                f"tldr: this graph was captured in {was} mode and stays in it (dropout, batch normalisation); "
                f"for the other apply tldr_compile to model.{now}()",
                stacklevel=2 if mode else 3,
            )
        return super().train(mode)

    def _inputs(self, rest: tuple[Any, ...], given: Mapping[str, Any]) -> list[Any]:
        """What `graph_module` is called with."""
        if (preparation := self._facts.origin.preparation) is not None:
            rest, given = (), preparation(rest, self._signature.asked(given))
        leaves = iter(self._signature.flatten(rest, given))
        return [next(leaves) if source is None else held(self, source) for source in self._sources]

    def _flat_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """What the graphs of `_merged` are called with: the same, where and in the dtypes that it was captured."""
        examples = (node.meta["val"] for node in self._merged.graph.graph.find_nodes(op="placeholder"))
        return [
            value.to(example.device, example.dtype) if isinstance(value, torch.Tensor) else value
            for value, example in zip(self._inputs(*self._signature.bound(args, kwargs)), examples, strict=True)
        ]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> MergedModule:
        before, dtypes = _device(self), casts(fn, (*self.parameters(), *self.buffers()))
        self._cast(dtypes)
        super()._apply(fn, recurse)
        after = _device(self)
        if before is not None and after is not None and before != after:
            move(self.graph_module, before, after)
        return self

    def _cast(self, dtypes: Casts) -> None:
        """Expect these dtypes from now on. Raises `CaptureError` where the graph cannot follow."""
        if dtypes:
            check(self.graph_module, dtypes)
            retype(self.graph_module, dtypes)
            self._signature = self._signature.cast(dtypes)

    def tensors(self) -> dict[str, Tensor]:
        """What it holds now, by the names that the program has for it."""
        return {name: held(self, name) for name in tensors(self._facts.program)}

    def holding(self, others: Mapping[str, Tensor]) -> MergedModule:
        """This module, with these in place of all that it holds, on whichever device and in whichever dtypes they are.

        The program that it was made of was captured elsewhere perhaps, as a module that was moved and pickled knows.
        """
        own = captured(self._facts.program)
        read = {name: each for name, each in others.items() if name in own and each.is_floating_point()}
        pairs = [(own[name].dtype, each.dtype) for name, each in read.items()]
        self._cast({old: new for old, new in pairs if old != new})
        self._hold(others)
        before, after = next((each.device for each in own.values()), None), _device(self)
        if before is not None and after is not None and before != after:
            move(self.graph_module, before, after)
        return self

    def _hold(self, others: Mapping[str, Tensor]) -> None:
        program = self._facts.program
        hold(self, others, set(program.constants) - set(program.state_dict), linear_weights(program))

    def __deepcopy__(self, memo: dict[int, Any]) -> MergedModule:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        for each in (self._facts, self._signature, self._out_spec):  # nothing changes these
            memo[id(each)] = each
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        """The program without its tensors, the tensors as they are now, the options, and the model it was made of."""
        facts = self._facts
        made_of = saved(facts.program), self.tensors(), facts.config, facts.origin
        return facts.remake, made_of, {"training": self.training}


@dataclass(frozen=True)
class _Facts:
    """What is known about a merged graph: copies of a module share it, on whichever device."""

    program: ExportedProgram
    config: TokenMerging
    merged: passes.Merged
    report: Report
    origin: Origin
    assertions: Assertions | None
    remake: Remake


def _out_spec(program: ExportedProgram) -> TreeSpec:
    if program.call_spec.out_spec is None:
        raise CaptureError("the exported program does not know the structure of its outputs")
    return program.call_spec.out_spec


def _open(graph: fx.GraphModule) -> fx.GraphModule:
    """Linear layers as the function that models call: weights of another class (quantised ones) answer to that."""
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        node.target = torch.nn.functional.linear
    graph.recompile()
    return graph


def _source(kind: InputKind, target: str | None) -> str | None:
    return None if kind is InputKind.USER_INPUT else target


def _class_of(parameters: inspect.Signature, graph: fx.GraphModule, out_spec: TreeSpec) -> type[MergedModule]:
    """One class for all modules that compute the same, as `torch.func.stack_module_state` wants it of its models.

    Code calls functions by names, which two of them may share, and says nothing of what the model makes of its results.
    """
    said = f"{graph.code}{out_spec}"
    called = tuple(node.target for node in graph.graph.nodes if node.op == "call_function")
    try:
        return _called_like(parameters, (hashlib.sha256(said.encode()).digest(), called))
    except TypeError:  # a default that cannot be hashed
        return _called_like.__wrapped__(parameters, ())


@functools.lru_cache(maxsize=32)
def _called_like(parameters: inspect.Signature, kind: Hashable) -> type[MergedModule]:
    """As that of an `fx.GraphModule`, the class of a graph of one `kind`; `forward` has the model's signature."""
    members = {"forward": method(parameters), "__doc__": MergedModule.__doc__, "__module__": __name__}
    return type(MergedModule.__name__, (MergedModule,), members)


def _device(module: nn.Module) -> torch.device | None:
    return next((value.device for value in (*module.parameters(), *module.buffers())), None)
