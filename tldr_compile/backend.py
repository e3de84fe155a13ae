"""`torch.compile(model, backend="tldr")`: merge tokens in Dynamo's graph, then hand it to Inductor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import fx

import passes
from passes.canonicalize import from_dynamo, inherit, with_writes
from tldr_compile.api import merge
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
    graph = _merged(gm, example_inputs, config)
    compiled: Callable[..., Any] = compile_fx(graph, example_inputs, config_patches=patches or None)  # type: ignore[arg-type]
    return compiled


def register() -> None:
    """Make the backend known by name where the package is imported but not installed."""
    # Dynamo registers what an entry point names by itself, and refuses a name that is registered twice.
    if _NAME not in entry_points(group=_GROUP).names:
        from torch._dynamo import list_backends, register_backend  # noqa: PLC0415 - importing Dynamo takes seconds

        if _NAME not in list_backends(exclude_tags=None):
            register_backend(tldr, name=_NAME)


def _merged(gm: fx.GraphModule, example_inputs: Sequence[Any], config: TokenMerging) -> fx.GraphModule:
    """The graph to compile: `gm` itself where nothing is to be merged."""
    if config.is_zero:
        return gm
    captured = from_dynamo(gm, example_inputs)
    if not passes.has_attention(captured):
        return gm
    _refuse_piece(gm, config)
    merged = merge(captured, config)
    if merged.graph is captured.graph:
        return gm
    if config.verify:
        passes.verify(captured, merged, _concrete(example_inputs))
    return with_writes(inherit(merged.graph, captured.graph), captured.mutated)


def _refuse_piece(gm: fx.GraphModule, config: TokenMerging) -> None:
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break or isinstance(config.entries, float):
        return
    where = "".join(f"\n  {frame.filename}:{frame.lineno} in {frame.name}" for frame in reason.user_stack[-1:])
    given = "the default schedule" if config.is_default_schedule else "schedule"
    raise GraphBreakError(
        f"{given} {list(config.entries)} has one entry per attention site of one graph, and this graph is only a piece "
        f"of the model: Dynamo broke it, because {reason.reason}{where}\n"
        "Either compile the model as one graph (fullgraph=True names every break), or give one fraction for all sites, "
        'such as options={"schedule": 0.1}'
    )


def _concrete(inputs: Sequence[Any]) -> list[Any]:
    """The example inputs with sizes as plain numbers, read without specializing the graph on them."""
    return [value.node.hint if isinstance(value, torch.SymInt) else value for value in inputs]
