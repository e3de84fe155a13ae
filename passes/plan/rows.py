"""Which tokens are left of outputs that leave merged, and how many: known before anything runs.

x [s·n·4, C], frames s packed in one row, n blocks of 4 -- merged to n2 -->  one row of s·n2 blocks, B = 1
x [b, 1 + t·h·w, C]                                     -- merged to n1 -->  b rows of n1 tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from tldr_compile.passes.axes import UNIT, Axes, Axis, product, products, touches
from tldr_compile.passes.errors import OptionError
from tldr_compile.passes.fx_utils import above
from tldr_compile.passes.plan.plan import Leaving, Plan
from tldr_compile.passes.plan.resolution import Resolution, at
from tldr_compile.passes.refusal import Refusal
from tldr_compile.passes.sizes import Size


@dataclass(frozen=True)
class Rows:
    """How the tokens of an output lie at full length, `[batch, tokens]`, and the resolution at which it leaves.

    A row has what lies in one product with the groups: what one grouping is apart for, or serves all values of. What is
    carried is in no row: all of a block is where its group is.
    """

    leaving: Leaving
    resolution: Resolution
    batch: Axis
    tokens: Axis

    @property
    def left(self) -> Size:
        """How many tokens are left in each."""
        return at((self.tokens,), [self.resolution])[0].size


def rows_of(plan: Plan) -> Rows:
    """The rows of what leaves merged; of outputs that are put in order, where there are any.

    Raises `OptionError` where none leaves merged, several are grouped differently, or only a part of a row is grouped.
    """
    found = {each: leaving for leaving in reversed(plan.leaving) for each in leaving.held}
    found |= {each: leaving for leaving in plan.leaving if leaving.key is not None for each in leaving.held}
    if len(found) != 1:
        raise OptionError(_why_none(plan, found))
    ((resolution, leaving),) = found.items()
    axes = plan.typed.value(leaving.value).axes
    (shared,) = {merge.grouping.shared for merge in plan.merges if merge.target is resolution}
    rows = Rows(leaving, resolution, *_in_rows(axes, resolution, shared))
    ordered = leaving.key is None or (rows.batch == UNIT and rows.tokens == axes[0])
    if not ordered or _has_others(axes, resolution):
        raise OptionError(
            f"{leaving.value.name} leaves merged, and only a part of its row ({' + '.join(map(repr, axes))}) is "
            "grouped as one: which of its tokens are left has no one answer. Leave return_places out"
        )
    return rows


def _in_rows(axes: Axes, resolution: Resolution, shared: Axis) -> tuple[Axis, Axis]:
    short, *_ = (each for axis in at(axes, [resolution]) for each in products(axis) if resolution.groups in each)
    known = {resolution.groups, *resolution.batch.factors, *shared.factors}
    inside = [f for f in short if f in known]
    tokens = product(resolution.run if f is resolution.groups else f for f in inside)
    return product(f for f in resolution.batch.factors if f not in inside), tokens


def _has_others(axes: Axes, resolution: Resolution) -> bool:
    """Whether other tokens of the clip lie behind or before those that are grouped."""
    segments = [product(each) for axis in axes if axis.atoms & resolution.run.atoms for each in axis.segments]
    return any(each.clip and not each.atoms & resolution.run.atoms for each in segments)


def _why_none(plan: Plan, found: Mapping[Resolution, Leaving]) -> str:
    if found:
        several = " and ".join(f"{leaving.value.name} along {each.run!r}" for each, leaving in found.items())
        return (
            f"{several} leave merged, and are grouped differently: which are left has no one answer. Give one of them "
            "entries of 0 in the schedule, or leave return_places out"
        )
    whys = [f": {why}" for _, why in stay_long(plan)]
    return (
        f"no output leaves merged{whys[-1] if whys else ''}; with outputs='merged' those stay short that are over "
        "merged tokens and that no operator needs at full length"
    )


def stay_long(plan: Plan) -> Iterator[tuple[fx.Node, Refusal]]:
    """The outputs over merged tokens that an operator before them needs at full length, and that operator."""
    (output,) = plan.typed.captured.graph.graph.find_nodes(op="output")
    short = {each.operand for each in plan.leaving}
    inside = [each for each in plan.restored() if each.node is not output]
    for number, node in enumerate(plan.typed.operands(output)):
        tokens = any(touches(plan.typed.value(node).axes, merge.target.run) for merge in plan.merges)
        if number >= len(plan.typed.captured.mutated) and number not in short and tokens:
            whole = above(node)
            if forced := [each for each in inside if each.node in whole]:
                yield node, Refusal(forced[-1].node, forced[-1].reason)
