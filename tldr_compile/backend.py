"""`torch.compile(model, backend="tldr")`: merge tokens in Dynamo's graph, then hand it to Inductor."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from types import FrameType
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo import convert_frame, eval_frame, list_backends, register_backend, trace_rules

import passes
from passes.canonicalize import from_dynamo, inherit, with_writes
from tldr_compile.api import merge, nothing_of
from tldr_compile.config import TokenMerging
from tldr_compile.errors import GraphBreakError

_GROUP = "torch_dynamo_backends"
_NAME = "tldr"


def tldr(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend. `options` are the fields of `TokenMerging`; `mode` is Inductor's.

    Raises `OptionError`, `ScheduleError`, `CaptureError`, `GraphBreakError`, `NothingToMerge` and `VerificationError`,
    which `torch.compile` hands on as the text of its `BackendCompilerFailed`.
    """
    from torch._inductor import list_mode_options  # noqa: PLC0415 - importing Inductor takes seconds
    from torch._inductor.compile_fx import compile_fx  # noqa: PLC0415

    config = TokenMerging.from_options(options or {})
    patches = list_mode_options(mode) if mode else dict(config.inductor)
    graph = merged_graph(gm, example_inputs, config)
    compiled = compile_fx(graph, list(example_inputs), config_patches=patches or None)
    return cast(Callable[..., Any], compiled)


def register() -> None:
    """Make the backend known by name where the package is imported but not installed."""
    # Dynamo registers what an entry point names by itself, and refuses a name that is registered twice.
    if _NAME not in entry_points(group=_GROUP).names and _NAME not in list_backends(exclude_tags=None):
        register_backend(tldr, name=_NAME)


def merged_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], config: TokenMerging) -> fx.GraphModule:
    """The graph to compile: `gm` itself where nothing is to be merged."""
    if config.is_zero:
        return gm
    captured = from_dynamo(gm, example_inputs)
    piece = _why_piece(gm)
    if piece is not None:
        if not passes.plan(captured, nothing_of(config)).sites:
            return gm
        _refuse_sequence(config, piece)
    merged, _ = merge(captured, config)
    if merged.graph is captured.graph:
        return gm
    if config.verify:
        with torch.no_grad():
            passes.verify(merged, _concrete(example_inputs))
    return inherit(with_writes(merged.graph, captured.mutated), gm)


def _why_piece(gm: fx.GraphModule) -> str | None:
    """Why this graph is only a piece of what the user compiled; None for the whole of it."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        places = [f"\n  {frame.filename}:{frame.lineno} in {frame.name}" for frame in reason.user_stack[-1:]]
        return f"Dynamo broke it, because {reason.reason}{''.join(places)}"
    caller = _caller_in_python()
    if caller is None:
        return None
    code = caller.f_code
    return (
        f"Dynamo left {code.co_qualname if hasattr(code, 'co_qualname') else code.co_name} "
        f"({code.co_filename}:{caller.f_lineno}) to Python, and TORCH_LOGS=graph_breaks says why"
    )


def _caller_in_python() -> FrameType | None:
    """The user's function that runs in Python between the compiled callable and the one that is being compiled.

    Dynamo compiles the outermost function that it can. Where one above it runs in Python, it was broken or
    skipped, and what it calls comes to the backend graph by graph, each with a complete function's `return_value`.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != convert_frame.__file__:
        frame = frame.f_back
    while frame is not None and frame.f_code.co_filename == convert_frame.__file__:
        frame = frame.f_back
    found: FrameType | None = None
    while frame is not None:
        if frame.f_code.co_filename == eval_frame.__file__ and frame.f_code.co_name == "compile_wrapper":
            return found
        if found is None and not trace_rules.check(frame.f_code):
            found = frame
        frame = frame.f_back
    return None


def _refuse_sequence(config: TokenMerging, piece: str) -> None:
    if isinstance(config.entries, float):
        return
    given = "the default schedule" if config.is_default_schedule else "the schedule"
    raise GraphBreakError(
        f"{given} {list(config.entries)} has one entry per attention site of one graph, and this graph is only a piece "
        f"of the model: {piece}\n"
        "Either compile the model as one graph (fullgraph=True names every break), or give one fraction for all sites, "
        'such as options={"schedule": 0.1}'
    )


def _concrete(inputs: Sequence[Any]) -> list[Any]:
    """The example inputs with sizes as plain numbers, read without specializing the graph on them."""
    return [value.node.hint if isinstance(value, torch.SymInt) else value for value in inputs]
