"""What the pass saw and what it decided, as text, a line for each node: for whoever asks why.

layer_norm       aten.layer_norm.default                [b x t·h·w x 768]
linear           aten.linear.default                    [b x t·h·w x 2304]
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from tldr_compile.passes.axes import Axes, TypedGraph
from tldr_compile.passes.fx_utils import operator_name
from tldr_compile.passes.plan import Conversion, Plan, Step
from tldr_compile.passes.sites import RefusedSite


def types(typed: TypedGraph) -> str:
    """Every value with its axes; a call whose rule contradicts them with the conflict."""
    nodes = [node for node in typed.captured.graph.graph.nodes if node in typed.values]
    width = max((len(node.name) for node in nodes), default=0)
    return "\n".join(f"{node.name:<{width}}  {_called(node):<44}  {_typed(typed, node)}" for node in nodes)


def decisions(plan: Plan) -> str:
    """The sites, then every call at which something is merged, converted, weighed or done at full length."""
    sites = [
        f"site {site.index}: {site.attention.node.name} over {site.tokens!r}"
        + (f": nothing merges: {site.reason}" if isinstance(site, RefusedSite) else "")
        for site in plan.sites
    ]
    others = [f"no site: {each}" for each in plan.others]
    steps = [
        line
        for node in plan.typed.captured.graph.graph.nodes
        for line in (*_step(plan, node, plan.steps.get(node, Step())), *_merges(plan, node))
    ]
    return "\n".join((*sites, *others, *steps))


def around(typed: TypedGraph, node: fx.Node) -> Iterator[str]:
    """A node with what it reads and what reads it, as the typed graph has them."""
    near = [*node.all_input_nodes, node, *node.users]
    width = max(len(each.name) for each in near)
    for each in dict.fromkeys(near):
        shown = _typed(typed, each) if each in typed.values else ""
        yield f"{'>' if each is node else ' '} {each.name:<{width}}  {_called(each):<44}  {shown}".rstrip()


def _called(node: fx.Node) -> str:
    return operator_name(node) if node.op == "call_function" else node.op


def _typed(typed: TypedGraph, node: fx.Node) -> str:
    conflict = f"  conflict: {typed.conflicts[node]}" if node in typed.conflicts else ""
    return ", ".join(_axes(value.axes) for value in typed.values[node]) + conflict


def _axes(axes: Axes) -> str:
    return f"[{' x '.join(map(repr, axes))}]"


def _step(plan: Plan, node: fx.Node, step: Step) -> Iterator[str]:
    for each in step.conversions:
        operands = plan.typed.operands(node)
        yield f"{node.name}: {_conversion(each, operands[each.operand])}"
    for weighing in step.weighings:
        yield f"{node.name}: {weighing.use.kind.value} weighed along {weighing.weight.resolution.run!r}"
    for barrier in step.barriers:
        yield f"{node.name}: full length along {barrier.run!r}: {barrier.reason}"


def _merges(plan: Plan, node: fx.Node) -> Iterator[str]:
    for merge in plan.merges_after(node):
        yield f"{node.name}: site {merge.site.index} merges {merge.count} of {merge.grouping}"


def _conversion(conversion: Conversion, value: fx.Node) -> str:
    return f"{conversion.how.name.lower()} {value.name} along {conversion.run!r}"
