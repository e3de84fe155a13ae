"""`torch.compile(model, backend="tldr")`: merge tokens in Dynamo's graph, then hand it to Inductor."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo import list_backends, register_backend

from tldr_compile import cache, passes, pieces
from tldr_compile.api import merge
from tldr_compile.config import TokenMerging
from tldr_compile.errors import NothingToMerge, OptionError
from tldr_compile.passes.capture import Captured, from_dynamo, inherit, with_writes
from tldr_compile.pieces import Break, Call, Piece
from tldr_compile.report import Report

log = logging.getLogger("tldr_compile")

_GROUP = "torch_dynamo_backends"
_NAME = "tldr"


def tldr(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend. `options` are those of `TokenMerging.from_options`; `mode` is Inductor's.

    Raises `OptionError`, `ScheduleError`, `CaptureError`, `GraphBreakError`, `NothingToMerge` and `VerificationError`,
    which `torch.compile` hands on as the text of its `BackendCompilerFailed`. What only a whole call of a model in
    several pieces can show (`GraphBreakError`, `NothingToMerge`) is raised from that call as it is.
    """
    from torch._inductor import config as inductor  # noqa: PLC0415 - importing Inductor takes seconds
    from torch._inductor import list_mode_options  # noqa: PLC0415
    from torch._inductor.compile_fx import compile_fx  # noqa: PLC0415

    config = TokenMerging.from_options(options or {})
    if config.portable:
        raise OptionError(
            f"portable={config.portable!r}: a compiled model stays in this process; use tldr_compile.apply"
        )
    if config.return_places:
        raise OptionError("return_places=True: a compiled model returns what it did; use tldr_compile.apply")
    patches = list_mode_options(mode) if mode else dict(config.inductor)
    graph, piece = _merged(gm, example_inputs, config)
    marked = {**inductor.unsafe_marked_cacheable_functions, **cache.marks(graph)}
    with inductor.patch(unsafe_marked_cacheable_functions=marked):
        compiled = cast(Callable[..., Any], compile_fx(graph, list(example_inputs), config_patches=patches or None))
    return compiled if piece is None else piece.watched(compiled)


def register() -> None:
    """Make the backend known by name where the package is imported but not installed."""
    # Dynamo registers what an entry point names by itself, and refuses a name that is registered twice.
    if _NAME not in entry_points(group=_GROUP).names and _NAME not in list_backends(exclude_tags=None):
        register_backend(tldr, name=_NAME)


def merged_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], config: TokenMerging) -> fx.GraphModule:
    """The graph to compile: `gm` itself where nothing is to be merged."""
    return _merged(gm, example_inputs, config)[0]


def _merged(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: TokenMerging
) -> tuple[fx.GraphModule, Piece | None]:
    """The graph to compile, and the piece of the model that it is, unless it is the whole model."""
    if config.is_zero:
        return gm, None
    if any(_is_ours(node.target) for node in gm.graph.nodes):
        warnings.warn("tldr: this graph is merged already, and compiled as it is", stacklevel=2)
        pieces.settle()
        return gm, None
    captured, broken = from_dynamo(gm, example_inputs), pieces.why_piece(gm)
    call = pieces.present_call() if broken is not None else None
    analysis = passes.analyse(captured, config)
    if broken is None or call is None:
        merged = _solved(analysis, config)
        pieces.settle()
        return _emitted(merged, captured, config, gm, example_inputs), None
    found = _merged_piece(analysis, config, call, broken)
    nothing = found if isinstance(found, str) else None
    bound = config.is_of_one_graph and nothing is None
    piece = Piece(config, broken, bound, nothing)
    call.compiles(piece)
    if nothing is not None and broken.ends and not call.merges:
        call.warn_of(piece)
    return gm if isinstance(found, str) else _emitted(found, captured, config, gm, example_inputs), piece


def _is_ours(target: object) -> bool:
    """Whether a node calls one of our operators."""
    return str(target).startswith("tldr.") or str(getattr(target, "__module__", "")).startswith("tldr_compile.ops")


def _merged_piece(
    analysis: passes.Analysis, config: TokenMerging, call: Call, broken: Break
) -> passes.Merged | str:
    """A piece with its tokens merged, or why nothing is merged in it; another piece may hold the attention.

    Raises `GraphBreakError` where a sequence or a budget is not this piece's.
    """
    sites = analysis.sites
    if not sites:
        return "it has no attention over clip tokens"
    if config.is_of_one_graph:
        call.refuse_second(config, broken)
    if _is_for_more(config, len(sites)):
        pieces.refuse_piece(config, broken)
    try:
        return _solved(analysis, replace(config, on_nothing="raise"))
    except NothingToMerge as nothing:
        return str(nothing)


def _is_for_more(config: TokenMerging, sites: int) -> bool:
    """Whether somebody wrote down a schedule, or a depth, of more sites than a graph has."""
    written = config.entries if isinstance(config.entries, tuple) and not config.is_default_schedule else ()
    return any(written[sites:]) or dict(config.made_for).get("sites", 0) > sites


def _solved(analysis: passes.Analysis, config: TokenMerging) -> passes.Merged:
    """A budget is solved for once: Dynamo compiles the same code anew for other sizes, and the fraction stays."""
    merged, _ = merge(analysis, config, pieces.solved())
    if merged.plan.solved is not None:
        pieces.keep(merged.plan.solved)
    return merged


def _emitted(
    merged: passes.Merged, captured: Captured, config: TokenMerging, gm: fx.GraphModule, example_inputs: Sequence[Any]
) -> fx.GraphModule:
    if merged.graph is captured.graph:
        return gm
    report = Report(merged, default=config.is_default_schedule)
    if log.isEnabledFor(logging.INFO):
        log.info("%s", report)
    for note in report.notes:
        warnings.warn(f"tldr: {note}", stacklevel=2)
    if config.verify:
        with torch.no_grad():
            passes.verify(merged, _concrete(example_inputs))
    return inherit(with_writes(merged.graph, captured.mutated) if captured.mutated else merged.graph, gm)


def _concrete(inputs: Sequence[Any]) -> list[Any]:
    """The example inputs with sizes as plain numbers, read without specializing the graph on them."""
    return [value.node.hint if isinstance(value, torch.SymInt) else value for value in inputs]
