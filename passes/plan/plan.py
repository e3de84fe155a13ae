"""What to do at every node of a graph, as plain data: all decisions of the pass, and nothing but decisions.

A merge replaces a run of clip tokens by one new atom, a *resolution* of that run. Every call is done at some
resolutions: operands are brought there (`Conversion`), sums over tokens are weighed (`Weighing`), probabilities over
tokens that are read as numbers get their tokens' weight (`Scaling`), and where an operator does not commute with
merging its operands are restored first and the operator is named (`Barrier`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, TypeAlias

import torch
from torch import fx

from tldr_compile.passes.axes import Atom, Axis, TypedGraph, Use
from tldr_compile.passes.plan.resolution import Resolution, holds
from tldr_compile.passes.plan.schedule import Entry
from tldr_compile.passes.refusal import Refusal
from tldr_compile.passes.sites import AnySite, Grouping, Site
from tldr_compile.passes.sizes import Size


@dataclass(frozen=True)
class Choice:
    """How a site groups its tokens; `reasons` say why not more finely, or why no coarser than that."""

    grouping: Grouping
    reasons: tuple[str, ...] = ()


OF_ATTENTION: Final = frozenset({"sharpness", "received", "keys"})
"""What a merge may ask of its site's attention itself, told by token as the attention's scores are held."""

Choices: TypeAlias = Mapping[Site, Choice]
Pairs: TypeAlias = Callable[[int, int], int]


class How(Enum):
    """How a value comes to another resolution."""

    MERGE = "merge"
    PICK = "pick"
    RESTORE = "restore"


@dataclass(frozen=True)
class Conversion:
    """Operand number `operand` of a call goes from one resolution of `run` to another before the call reads it."""

    operand: int
    run: Axis
    source: Resolution | None
    target: Resolution | None
    how: How


@dataclass(frozen=True)
class Weight:
    """What tokens of a run weigh in a sum, once those along `gone` have been summed already.

    `held`: the sum runs over groups; otherwise over restored tokens.
    """

    resolution: Resolution
    gone: frozenset[Atom] = frozenset()
    held: bool = False


@dataclass(frozen=True)
class Weighing:
    """A sum over tokens; `counts` says that it counts tokens, and `partial` that it runs over a part of the run.

    `dtype` is that of the result, where integers are summed that are only read as floats.
    """

    use: Use
    weight: Weight
    counts: bool = False
    partial: bool = False
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Scaling:
    """Operand number `operand`, a distribution over the tokens of dimension `dim`, is multiplied by their weight."""

    operand: int
    dim: int
    weight: Weight


@dataclass(frozen=True)
class Barrier:
    """Why a call is done at full length; `together` are the atoms that one grouping would have to join for it."""

    run: Axis
    reason: str
    together: frozenset[Atom] = frozenset()


@dataclass(frozen=True)
class Step:
    """What happens at one call. `held` are the resolutions at which it is done; what it sums, its result has not."""

    held: tuple[Resolution, ...] = ()
    conversions: tuple[Conversion, ...] = ()
    weighings: tuple[Weighing, ...] = ()
    scalings: tuple[Scaling, ...] = ()
    barriers: tuple[Barrier, ...] = ()


@dataclass(frozen=True)
class Leaving:
    """Output number `operand` leaves short, as `value` is at the resolutions `held`.

    Where there is a `key`, one number for each entry along the first dimension, it leaves in the order of those.
    """

    operand: int
    value: fx.Node
    held: tuple[Resolution, ...]
    conversions: tuple[Conversion, ...]
    key: fx.Node | None = None
    key_conversions: tuple[Conversion, ...] = ()


@dataclass(frozen=True)
class Merge:
    """After `node`, `count` entries of the run go; `source` is the resolution it starts from.

    `told` is what it asks of the attention. `stream` brings the residual stream to `source`; `rows` what is told, which
    is as the site's own scores are held; `keys` the keys to that first; `before` what the attention was added to;
    `stretch` are the ends of the site's, where they are asked for, and what brings each to `source`. `held` are the
    resolutions of other runs that the stream keeps. `ordered`: the groups leave the graph, and come in the order of
    their places.
    """

    site: Site
    grouping: Grouping
    node: fx.Node
    count: Size
    source: Resolution | None
    target: Resolution
    held: tuple[Resolution, ...]
    stream: tuple[Conversion, ...]
    rows: tuple[Conversion, ...]
    keys: tuple[Conversion, ...]
    before: tuple[Conversion, ...]
    stretch: tuple[tuple[fx.Node, tuple[Conversion, ...]], ...] = ()
    told: frozenset[str] = frozenset()
    ordered: bool = False


@dataclass(frozen=True)
class Restored:
    """A value that gets its full length back: before which node, and why."""

    node: fx.Node
    value: fx.Node
    conversion: Conversion
    reason: str


@dataclass(frozen=True)
class Solved:
    """The fraction that a budget became, and the part of the dense operations that its plan costs.

    `sizes` are those that it was found for: of every input that carries the video, by name.
    """

    budget: float
    fraction: float
    part: float
    sizes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Plan:
    """Everything that the rewriter does and that the report prints.

    `leaving` are the outputs that do not get their length back; `choices` say how each site groups its tokens;
    `left_out` are the sites whose merge did not pay, `others` the attentions that are no sites, and why; `solved` what
    a budget became. `pairs` says how many pairs of tokens a merge compares, of how many there are and go; None: every
    other with every other one. `compares` are the readings that they are compared by.
    """

    typed: TypedGraph
    sites: tuple[AnySite, ...]
    misses: tuple[Refusal, ...]
    schedule: tuple[Entry, ...]
    merges: tuple[Merge, ...]
    steps: Mapping[fx.Node, Step]
    leaving: tuple[Leaving, ...] = ()
    choices: Choices = field(default_factory=dict)
    left_out: tuple[Site, ...] = ()
    others: tuple[Refusal, ...] = ()
    pairs: Pairs | None = None
    compares: tuple[str, ...] = ("tokens",)
    solved: Solved | None = None

    def held(self, node: fx.Node) -> tuple[Resolution, ...]:
        """At which resolutions a value is held, merges after it included."""
        if merges := self.merges_after(node):
            return (*merges[-1].held, merges[-1].target)
        held = self.steps.get(node, Step()).held
        return tuple(each for each in held if holds(self.typed.value(node).axes, each.run))

    def merges_after(self, node: fx.Node) -> tuple[Merge, ...]:
        return tuple(merge for merge in self.merges if merge.node is node)

    def merge_of(self, attention: fx.Node) -> Merge | None:
        return next((merge for merge in self.merges if merge.site.attention.node is attention), None)

    def restored(self) -> Iterator[Restored]:
        """Every value of the graph that gets its full length back, in execution order."""
        for node in self.typed.captured.graph.graph.nodes:
            for merge in self.merges_after(node):
                yield from _of_merge(merge)
            step, operands = self.steps.get(node, Step()), self.typed.operands(node)
            for each in step.conversions:
                if each.how is How.RESTORE:
                    yield Restored(node, operands[each.operand], each, _why_restored(node, step, each))


def _why_restored(node: fx.Node, step: Step, conversion: Conversion) -> str:
    if node.op == "output":
        return "an output over tokens gets its original length back"
    barriers = (barrier.reason for barrier in step.barriers if barrier.run == conversion.run)
    return next(barriers, "two branches that merged their tokens differently meet")


def _of_merge(merge: Merge) -> Iterator[Restored]:
    site = merge.site
    reason = f"site {site.index} groups these tokens anew, from all of them"
    told = ((merge.node, merge.stream), (site.attention.scored, merge.rows), (site.attention.keys, merge.keys))
    for value, conversions in (*told, (site.stream.before, merge.before), *merge.stretch):
        for each in conversions:
            if value is not None and each.how is How.RESTORE:
                yield Restored(merge.node, value, each, reason)
