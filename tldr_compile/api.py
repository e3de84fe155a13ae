"""`apply` and `explain`: merge tokens ahead of time, in a graph that `torch.export` captures."""

from __future__ import annotations

import inspect
import io
import logging
import os
import sys
import sysconfig
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from tldr_compile import exporters, ops, passes
from tldr_compile.config import TokenMerging
from tldr_compile.errors import CaptureError, NothingToMerge, OptionError
from tldr_compile.module import UNKNOWN, MergedModule, Origin
from tldr_compile.passes.capture import from_export
from tldr_compile.passes.plan import Solved
from tldr_compile.passes.sources import raised_at
from tldr_compile.program import filled
from tldr_compile.report import Report

log = logging.getLogger("tldr_compile")


def apply(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    config: TokenMerging | str | os.PathLike[str] | None = None,
    **options: Any,
) -> MergedModule:
    """`model` with its tokens merged, as a module that is called like `model` and shares its parameters.

    Args:
        model: an `nn.Module`, an FX `GraphModule` or an `ExportedProgram` (which needs no example inputs). A model of
            transformers that `torch.export` cannot capture, because its sizes come out of tensors, is captured by
            transformers' own exporter; the result is called like the model all the same.
        args, kwargs, dynamic_shapes: as in `torch.export.export`.
        config: the options as one value; or give them by name: `apply(model, (clip,), schedule=[600, 200, 100])`. The
            path of a file that `TokenMerging.save` wrote may have options beside it, which win; `preset=` is the name
            of a published schedule.

    Raises:
        OptionError, ScheduleError: an option does not exist, or cannot be what it is, for this model too.
        CaptureError: the model cannot be captured as one graph; the tracer's reason is the cause.
        NothingToMerge: no site can be merged (`on_nothing="warn"`: the module then computes what `model` does).
        VerificationError: `verify=True` and the merged graph is not what its definition says.
    """
    config = _config(config, options)
    program, origin = capture(model, args, kwargs, dynamic_shapes)
    result = assemble(program, passes.analyse(from_export(program), config), config, origin)
    if config.verify:
        result.verify(*(program.example_inputs or (args, dict(kwargs or {}))))
    return result


def explain(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    config: TokenMerging | str | os.PathLike[str] | None = None,
    verbose: bool = False,
    **options: Any,
) -> Report:
    """What `apply` with the same arguments would do, and why; also where there is nothing to merge.

    `verbose`: the printed report shows the typed graph around every node that something is restored or refused at.
    """
    config = _config(config, options)
    program, origin = capture(model, args, kwargs, dynamic_shapes)
    merged, nothing = _attempt(passes.analyse(from_export(program), config), config)
    return _report(merged, config, nothing, origin, verbose=verbose)


def assemble(
    program: ExportedProgram, analysis: passes.Analysis, config: TokenMerging, origin: Origin = UNKNOWN
) -> MergedModule:
    """`apply` on a program that is analysed: one analysis serves all configurations with its `clip` and `protect`."""
    merged, nothing = merge(analysis, config)
    report = _report(merged, config, nothing, origin)
    for note in report.warnings:
        warnings.warn(f"tldr: {note}", stacklevel=3)
    return MergedModule(program, analysis.captured, merged, report, origin, config=config, remake=_remade)


def _remade(
    saved: bytes, tensors: Mapping[str, torch.Tensor], config: TokenMerging, origin: Origin
) -> MergedModule:
    config = replace(config)  # looks its names up: what was registered there may not be here
    return _again(torch.export.load(io.BytesIO(saved)), tensors, config, origin)


def portable(merged: MergedModule, *, native: bool = False) -> MergedModule:
    """A merged module that computes the same in torch's own operators alone, and shares its parameters.

    What `torch.export.save`, AOTInductor and `torch.onnx.export` make of it runs where this package is not. It is
    slower than `merged` on devices for which this package has operators of its own. With `native` attention stays as
    fast on CPUs: it is left to two operators in C++, without gradients. A program of `torch.export.save` or AOTInductor
    then runs where the library that `write_library` writes was loaded first.

    Raises:
        OptionError: a function that was registered with `tldr_compile.ops` calls another operator; or attention is not
            what the operators in C++ compute: on a CPU, not in float64, masses that only differ by key.
        WriteError: with `native`, no C++ compiler works.
    """
    facts = merged._facts
    config = replace(facts.config, portable="native" if native else True)
    return _again(facts.program, merged.tensors(), config, facts.origin)


def _again(
    program: ExportedProgram, tensors: Mapping[str, torch.Tensor], config: TokenMerging, origin: Origin
) -> MergedModule:
    """`assemble` on a program with these tensors in place of its own; its warnings were given the first time."""
    program = filled(program, tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        module = assemble(program, passes.analyse(from_export(program), config), config, origin)
    return module.holding(tensors)


def _report(
    merged: passes.Merged, config: TokenMerging, nothing: str | None, origin: Origin, *, verbose: bool = False
) -> Report:
    default, how = config.is_default_schedule, str(origin.preparation or "")
    return Report(merged, default=default, nothing=nothing, asked=config.asked, how=how, verbose=verbose)


def merge(
    analysis: passes.Analysis, config: TokenMerging, solved: Solved | None = None
) -> tuple[passes.Merged, str | None]:
    """Plan and rewrite as `config.on_nothing` says; `solved` is what the budget became before, for other sizes.

    Where there is nothing to merge the merged graph is the captured one itself, and the second value says why.
    """
    if config.is_default_schedule:
        log.info("no schedule is given: the default %s is bound to the first sites that can merge", config.entries)
    merged, nothing = _attempt(analysis, config, solved)
    if nothing is not None:
        if config.on_nothing == "raise":
            raise NothingToMerge(nothing)
        warnings.warn(f"tldr: {nothing}; the model runs as it is", stacklevel=3)
    return merged, nothing


def _attempt(
    analysis: passes.Analysis, config: TokenMerging, solved: Solved | None = None
) -> tuple[passes.Merged, str | None]:
    try:
        return passes.merge(analysis, config, ops, solved), None
    except NothingToMerge as nothing:
        return passes.merge(analysis, replace(config, schedule=(), budget=None), ops), str(nothing)


def _config(config: TokenMerging | str | os.PathLike[str] | None, options: Mapping[str, Any]) -> TokenMerging:
    if config is None or isinstance(config, (str, os.PathLike)):
        return TokenMerging.from_options({**options, "config": config})
    if options:
        raise OptionError(f"config= is given together with {', '.join(options)}; give one or the other")
    if not isinstance(config, TokenMerging):
        raise OptionError(f"config={config!r}: config is a TokenMerging, or the path of a file that one was saved in")
    return config


def capture(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> tuple[ExportedProgram, Origin]:
    """`model` as one graph, as `apply` takes it, and what it was made of.

    Raises `CaptureError`; its cause is what the tracer that was tried last raised.
    """
    if isinstance(model, MergedModule) or (isinstance(model, ExportedProgram) and _is_of_merged(model)):
        raise CaptureError("this model is merged already: apply tldr_compile to the model that it was made of")
    if isinstance(model, ExportedProgram):
        if dynamic_shapes is not None:
            raise OptionError("dynamic_shapes= belongs to torch.export.export, and this program is already exported")
        return model, UNKNOWN
    if not isinstance(model, nn.Module):
        raise CaptureError(f"the model is {type(model).__name__}, not an nn.Module or an ExportedProgram")
    if not isinstance(args, tuple):
        raise CaptureError(f"args is {type(args).__name__}, not a tuple: for one input write (input,)")
    kwargs = dict(kwargs or {})
    _warn_of_hooks(model)
    try:
        with exporters.unheard() if exporters.is_pretrained(model) else nullcontext():
            program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
            return program, Origin(model, training=model.training)
    except Exception as reason:  # the tracer runs the model's own code, which can raise anything
        exported = _export_pretrained(model, args, kwargs, dynamic_shapes, reason)
        if exported is not None:
            return exported
        if any(type(each).__name__ == "DTensor" for each in model.parameters()):
            raise CaptureError(
                f"{_cannot(model, reason)} The model's parameters are sharded (DTensor): apply tldr_compile to the "
                "model before it is sharded, and shard the merged module as one (fully_shard(merged))"
            ) from reason
        raise CaptureError(
            f"{_cannot(model, reason)} Write that so that it can be traced, or try "
            'torch.compile(model, backend="tldr"), which leaves to Python what it cannot trace, or apply on what '
            "torch.export.export(..., strict=True) gives"
        ) from reason


def _is_of_merged(program: ExportedProgram) -> bool:
    """Whether a merged module was exported: a portable one shows no operator of ours, and programs know their class."""
    ours = f"{MergedModule.__module__}.{MergedModule.__qualname__}"
    stacks = (node.meta.get("nn_module_stack") for node in program.graph.nodes)
    outermost = (next(iter(stack.values())) for stack in stacks if stack)
    return any(kind == ours for _, kind in outermost)


def _warn_of_hooks(model: nn.Module) -> None:
    """Say that hooks, but for those that came with the model's library, run for the last time."""
    hooked = [
        name or type(model).__name__
        for name, module in model.named_modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if not _of_library(hook, module)
    ]
    if hooked:
        warnings.warn(
            f"tldr: there are hooks on {', '.join(dict.fromkeys(hooked))}: they run once, while the model is captured; "
            "what they do to tensors becomes part of the graph, and anything else will not be done at later calls",
            stacklevel=4,
        )


def _of_library(hook: object, module: nn.Module) -> bool:
    """Whether a hook is of the installed library that the module is of: transformers collects hidden states by some."""
    package, *_ = (getattr(hook, "__module__", None) or "").split(".")
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return package == type(module).__module__.split(".")[0] and file.startswith(sysconfig.get_path("purelib"))


def _export_pretrained(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, reason: Exception
) -> tuple[ExportedProgram, Origin] | None:
    """`model` as transformers exports it; None where it is not one of transformers. Raises `CaptureError`."""
    if not exporters.is_pretrained(model):
        return None
    if dynamic_shapes is not None:
        raise CaptureError(
            f"{_cannot(model, reason)} transformers' exporter, which may, makes a graph for fixed sizes: leave "
            "dynamic_shapes= out, and apply tldr_compile once for each size"
        ) from reason
    try:
        program, preparation = exporters.capture(model, args, kwargs)
    except CaptureError:
        raise
    except TypeError as wrong:
        given = ", ".join((*(f"args[{k}]" for k in range(len(args))), *kwargs)) or "nothing"
        raise CaptureError(
            f"{type(model).__name__}.forward takes {inspect.signature(model.forward)}, and the example inputs are "
            f"{given}: {wrong}"
        ) from reason
    except ImportError as missing:
        raise CaptureError(
            f"{_cannot(model, reason)} transformers' exporter may capture it, and is not there ({missing}): it needs "
            f"{exporters.NEEDED} ({exporters.INSTALL})\n"
            f"apply then does this by itself, or takes the program:\n{exporters.HOW}"
        ) from reason
    except Exception as second:  # as above
        raise CaptureError(
            f"{_cannot(model, reason)}\ntransformers' exporter cannot, either: {type(second).__name__}: {second}\n"
            f"It has to be that of {exporters.NEEDED}\napply takes the program that these lines make, if other inputs "
            f"help:\n{exporters.HOW}"
        ) from second
    return program, Origin(model, preparation, model.training)


def _cannot(model: nn.Module, reason: Exception) -> str:
    return (
        f"torch.export cannot capture {type(model).__name__} as one graph: {type(reason).__name__}: {reason}\n"
        f"It stopped at {raised_at(reason) or 'the arguments'}."
    )
