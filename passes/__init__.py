"""Graph -> facts and graph -> graph: token merging as a compiler pass over FX graphs of functional ATen.

    capture   any traced model -> one graph in one dialect
    axes      what every dimension is
    sites     where tokens can merge, and why not elsewhere
    plan      what happens at every node, as data
    emit      the plan -> the new graph
    check     the new graph against its meaning

    captured = passes.from_export(torch.export.export(model, args))
    analysis = passes.analyse(captured, options)
    merged = passes.merge(analysis, options, operators)

`options` has the options as attributes, `operators` the functions to insert: `tldr_compile.TokenMerging` and
`tldr_compile.ops`. One analysis serves any number of schedules.

`TORCH_LOGS="+tldr_compile"` shows the typed graph, the decisions and the merged graph.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tldr_compile.passes import show
from tldr_compile.passes.axes import TypedGraph, infer
from tldr_compile.passes.capture import Attention, Captured, clip_inputs, from_dynamo, from_export, fuse
from tldr_compile.passes.check import check_shapes
from tldr_compile.passes.check import verify as _verify
from tldr_compile.passes.emit import rewrite
from tldr_compile.passes.errors import CaptureError
from tldr_compile.passes.fx_utils import tensors
from tldr_compile.passes.operators import Operators
from tldr_compile.passes.options import Options
from tldr_compile.passes.plan import Entry, Plan, Solved, check_sites, meeting
from tldr_compile.passes.plan import make_plan as _make_plan
from tldr_compile.passes.refusal import Refusal
from tldr_compile.passes.sites import AnySite, sites

__all__ = [
    "Analysis",
    "Captured",
    "Merged",
    "Operators",
    "Options",
    "Plan",
    "analyse",
    "from_dynamo",
    "from_export",
    "make_plan",
    "merge",
    "verify",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Merged:
    """A rewritten graph and the plan it was made from; `groupings` are the nodes that find each
    resolution, `options` what it was made with."""

    graph: fx.GraphModule
    plan: Plan
    groupings: dict[int, fx.Node]
    options: Options


@dataclass(frozen=True)
class Analysis:
    """What a graph is, whatever is merged in it; `misses` are what looks like attention and is none, and why."""

    captured: Captured
    typed: TypedGraph
    attentions: tuple[Attention, ...]
    misses: tuple[Refusal, ...]
    sites: tuple[AnySite, ...]


def analyse(captured: Captured, options: Options) -> Analysis:
    """Find attention, type all values, and judge the sites. Of the options it reads `clip` and `protect`.

    Raises:
        CaptureError: an example input without elements.
        OptionError: `clip` names no input.
    """
    for node in captured.graph.graph.find_nodes(op="placeholder"):
        empty = any(statically_known_true(each.numel() == 0) for each in tensors(node))
        if node.name not in captured.constants and empty:
            name = captured.names.get(node.name, node.name)
            raise CaptureError(
                f"the example input {name!r} is empty: {list(node.meta['val'].shape)} tells no size apart"
            )
    fused, attentions, misses = fuse(captured)
    protect = options.protect if isinstance(options.protect, int) else 0
    typed = infer(fused, clip_inputs(captured, options.clip), [each.queries for each in attentions], protect)
    found = sites(typed, attentions, protect)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("the typed graph:\n%s", show.types(typed))
    return Analysis(captured, typed, attentions, misses, found)


def make_plan(analysis: Analysis, options: Options, solved: Solved | None = None) -> Plan:
    """Decide what happens at every node, without rewriting. Raises as `merge` does.

    `solved`: what the budget became before, for other sizes of the same model.
    """

    def planned(schedule: Sequence[Entry] | Entry) -> Plan:
        return _make_plan(
            analysis.typed,
            analysis.sites,
            analysis.attentions,
            analysis.misses,
            schedule,
            default=options.is_default_schedule,
            grouping=options.grouping,
            merged_outputs=options.outputs == "merged",
            asks=options.asks,
            pairs=options.pairs,
            compares=options.comparison.reads,
        )

    if analysis.sites:
        check_sites(dict(options.made_for), analysis.sites)
    if options.budget is None:
        plan = planned(options.entries)
    elif solved is None:
        plan = meeting(options.budget, planned)
    else:
        plan = replace(planned(solved.fraction), solved=solved)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("the decisions:\n%s", show.decisions(plan))
    return plan


def merge(analysis: Analysis, options: Options, operators: Operators, solved: Solved | None = None) -> Merged:
    """Plan and rewrite. With nothing to merge the captured graph itself is handed on; `solved` as in `make_plan`.

    Raises:
        NothingToMerge: a positive schedule and no site that can merge.
        ScheduleError: a schedule that cannot be bound to the sites, or a budget that they do not allow.
        VerificationError: the rewritten graph is not well formed, or has outputs of other shapes.
    """
    planned = make_plan(analysis, options, solved)
    if not planned.merges:
        return Merged(analysis.captured.graph, planned, {}, options)
    new = rewrite(planned, operators, options)
    check_shapes(analysis.typed.captured.graph, new.graph, restored=options.outputs == "restore")
    if log.isEnabledFor(logging.DEBUG):
        log.debug("the merged graph:\n%s", new.graph.print_readable(print_output=False))
    return Merged(new.graph, planned, new.groupings, options)


def verify(merged: Merged, inputs: Sequence[Any]) -> None:
    """Check a merged graph against the projection law on real flat inputs. Raises `VerificationError`."""
    if merged.plan.merges:
        _verify(merged.plan, merged.graph, merged.groupings, merged.options, inputs)
