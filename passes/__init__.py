"""Graph -> facts and graph -> graph: token merging as a compiler pass over FX graphs of functional ATen.

    captured = passes.from_export(torch.export.export(model, args))
    merged = passes.merge(captured, policy, operators)

`policy` has the options as attributes, `operators` the functions to insert: `tldr_compile.TokenMerging` and
`tldr_compile.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tldr_compile.passes.attention import fuse
from tldr_compile.passes.canonicalize import Captured, from_dynamo, from_export
from tldr_compile.passes.errors import CaptureError
from tldr_compile.passes.nodes import tensors
from tldr_compile.passes.plan import Plan
from tldr_compile.passes.planner import make_plan
from tldr_compile.passes.rewrite import Policy, rewrite
from tldr_compile.passes.schedule import Entry
from tldr_compile.passes.sites import sites
from tldr_compile.passes.typing import infer
from tldr_compile.passes.verify import check_shapes
from tldr_compile.passes.verify import verify as _verify

__all__ = ["Captured", "Merged", "Options", "Plan", "from_dynamo", "from_export", "merge", "plan", "verify"]


class Options(Policy, Protocol):
    """What `merge` reads of a configuration."""

    @property
    def entries(self) -> Entry | Sequence[Entry]: ...
    @property
    def is_default_schedule(self) -> bool: ...

    @property
    def protect(self) -> str | int: ...
    @property
    def clip(self) -> str | Sequence[str]: ...
    @property
    def outputs(self) -> str: ...


@dataclass(frozen=True)
class Merged:
    """A rewritten graph and the plan it was made from; `groupings` are the nodes that find each
    resolution, `options` what it was made with."""

    graph: fx.GraphModule
    plan: Plan
    groupings: dict[int, fx.Node]
    options: Options


def plan(captured: Captured, options: Options) -> Plan:
    """Find, type and plan, without rewriting. Raises as `merge` does."""
    for node in captured.graph.graph.find_nodes(op="placeholder"):
        empty = any(statically_known_true(each.numel() == 0) for each in tensors(node))
        if node.name not in captured.constants and empty:
            name = captured.names.get(node.name, node.name)
            raise CaptureError(
                f"the example input {name!r} is empty: {list(node.meta['val'].shape)} tells no size apart"
            )
    fused, attentions, misses = fuse(captured)
    protect = options.protect if isinstance(options.protect, int) else 0
    typed = infer(fused, options.clip, attentions, protect)
    found = sites(typed, attentions, protect)
    return make_plan(
        typed,
        found,
        attentions,
        misses,
        options.entries,
        default=options.is_default_schedule,
        merged_outputs=options.outputs == "merged",
        asks=options.asks,
    )


def merge(captured: Captured, options: Options, operators: ModuleType) -> Merged:
    """The whole pass. With nothing to merge the captured graph itself is handed on.

    Raises:
        NothingToMerge: a positive schedule and no site that can merge.
        ScheduleError: a schedule that cannot be bound to the sites.
        OptionError: `clip` names no input.
        VerificationError: the rewritten graph is not well formed, or has outputs of other shapes.
    """
    planned = plan(captured, options)
    if not planned.merges:
        return Merged(captured.graph, planned, {}, options)
    new = rewrite(planned, operators, options)
    check_shapes(planned.typed.captured.graph, new.graph, restored=options.outputs == "restore")
    return Merged(new.graph, planned, new.groupings, options)


def verify(merged: Merged, inputs: Sequence[Any]) -> None:
    """Check a merged graph against the projection law on real flat inputs. Raises `VerificationError`."""
    if merged.plan.merges:
        _verify(merged.plan, merged.graph, merged.groupings, merged.options, inputs)
