"""Schedule x sites x types -> what to do at every node, as plain data.

A merge replaces a run of clip segments by one new atom, a *resolution* of that run. The plan walks the graph once
and decides for every call at which resolution it is done: operands are brought there (`Conversion`), sums over tokens
are weighed (`Weighing`), and where an operator does not commute with merging the operands are restored first and the
operator is named (`Barrier`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from torch import fx

from passes.attention import Attention
from passes.axes import UNIT, Atom, Axes, Axis, Size, axis, replace, simplify, spread
from passes.errors import NothingToMerge
from passes.rules import Kind, Typed, Use
from passes.schedule import Entry, bind_schedule, removed
from passes.sites import Site, why_nothing
from passes.typing import TypedGraph


@dataclass(frozen=True, eq=False)
class Resolution:
    """One grouping of a run: its tokens are the new atom `groups`, found separately for each entry of `batch`.

    `gone` are the tokens of the parent that no longer stand for themselves.
    """

    index: int
    run: Axis
    batch: Axis
    groups: Atom
    gone: Atom
    parent: Resolution | None

    def meets(self, other: Resolution) -> bool:
        """Whether the two cannot be held at once: one groups what the other groups, or depends on."""
        mine, theirs = self.run.atoms, other.run.atoms
        return bool(mine & theirs or mine & other.batch.atoms or self.batch.atoms & theirs)

    @property
    def chain(self) -> tuple[Resolution, ...]:
        """This resolution and those it was made from, the coarsest first."""
        return (self, *(self.parent.chain if self.parent else ()))

    @property
    def axis(self) -> Axis:
        return axis(self.groups)

    def __repr__(self) -> str:
        return f"n{self.index}"


def tokens_at(run: Axis, resolution: Resolution | None) -> Axis:
    """The run as an axis at a resolution; None is the full one."""
    return resolution.axis if resolution else run


def at(axes: Axes, resolutions: Iterable[Resolution]) -> Axes:
    """Axes of the original graph as they are held at some resolutions.

    A run that lies on several dimensions is held on the first of them, and the others have length 1.
    """
    for resolution in resolutions:
        axes = tuple(replace(each, resolution.run, resolution.groups) for each in axes)
        while (dims := spread(axes, resolution.run)) is not None:
            first, last = dims
            axes = (*axes[:first], resolution.axis, *(UNIT,) * (last - first - 1), *axes[last:])
    return axes


def meet(resolutions: Sequence[Resolution]) -> Resolution | None:
    """Where values of one run meet: the coarsest of a chain, else the last resolution that all have in common."""
    common = list(resolutions[0].chain) if resolutions else []
    for each in resolutions[1:]:
        if not common:
            return None
        if common[0] in each.chain:
            common = list(each.chain)
        elif each not in common:
            common = [one for one in common if one in each.chain]
    return common[0] if common else None


class How(Enum):
    """How an operand comes to another resolution."""

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
class Weighing:
    """A sum over tokens of `resolution`; `held` says whether it runs over the groups or over restored tokens."""

    use: Use
    resolution: Resolution
    held: bool


@dataclass(frozen=True)
class Barrier:
    """Why a call is done at full length."""

    run: Axis
    reason: str


@dataclass(frozen=True)
class Step:
    """What happens at one call. `held` are the resolutions at which it is done."""

    held: tuple[Resolution, ...] = ()
    conversions: tuple[Conversion, ...] = ()
    weighings: tuple[Weighing, ...] = ()
    barriers: tuple[Barrier, ...] = ()


@dataclass(frozen=True)
class Merge:
    """After `site.stream.node`, `count` tokens of the run go; `source` is the resolution it starts from."""

    site: Site
    count: Size
    source: Resolution | None
    target: Resolution

    @property
    def node(self) -> fx.Node:
        assert self.site.stream is not None
        return self.site.stream.node


@dataclass(frozen=True)
class Plan:
    """Everything that the rewriter does and that the report prints."""

    typed: TypedGraph
    sites: tuple[Site, ...]
    misses: tuple[tuple[fx.Node, str], ...]
    schedule: tuple[Entry, ...]
    merges: tuple[Merge, ...]
    steps: Mapping[fx.Node, Step]

    def held(self, node: fx.Node) -> tuple[Resolution, ...]:
        """At which resolutions a value is held, merge after it included."""
        merge, step = self.merge_after(node), self.steps.get(node, Step())
        kept = tuple(r for r in step.held if merge is None or not r.meets(merge.target))
        return (*kept, merge.target) if merge else kept

    def merge_after(self, node: fx.Node) -> Merge | None:
        return next((merge for merge in self.merges if merge.node is node), None)

    def merge_of(self, attention: fx.Node) -> Merge | None:
        return next((merge for merge in self.merges if merge.site.attention.node is attention), None)


def make_plan(
    typed: TypedGraph,
    sites: tuple[Site, ...],
    attentions: tuple[Attention, ...],
    misses: tuple[tuple[fx.Node, str], ...],
    schedule: Sequence[Entry] | Entry,
    *,
    default: bool = False,
    merged_outputs: bool = False,
) -> Plan:
    """Decide everything. Raises `ScheduleError`, or `NothingToMerge` if a positive schedule would remove nothing."""
    positive = any(schedule) if isinstance(schedule, Sequence) else schedule > 0
    if positive and not any(site.reason is None for site in sites):
        raise NothingToMerge(why_nothing(sites, misses, attentions))
    entries = bind_schedule(schedule, sites, default=default)
    scheduled = {s.stream.node: (s, e) for s, e in zip(sites, entries, strict=True) if e and s.stream}
    walk = _Walk(typed, scheduled, merged_outputs)
    for node in typed.captured.graph.graph.nodes:
        walk.visit(node)
    if positive and not walk.merges:
        raise NothingToMerge(
            f"the schedule {list(entries)} removes no token: at every site its fraction of the tokens rounds down to "
            "0. Give larger entries, or a schedule of zeros to leave the model as it is."
        )
    return Plan(typed, sites, misses, entries, tuple(walk.merges), walk.steps)


class _Walk:
    """One pass over the graph: at which resolutions each value is `held`, and by which sums over it are `weighed`."""

    def __init__(
        self, typed: TypedGraph, scheduled: Mapping[fx.Node, tuple[Site, Entry]], merged_outputs: bool
    ) -> None:
        self.typed, self.scheduled, self.merged_outputs = typed, scheduled, merged_outputs
        self.held: dict[fx.Node, tuple[Resolution, ...]] = {}
        self.weighed: dict[fx.Node, tuple[Resolution, ...]] = {}
        self.steps: dict[fx.Node, Step] = {}
        self.merges: list[Merge] = []

    def visit(self, node: fx.Node) -> None:
        if node.op == "output":
            self.steps[node] = self._output(node)
            return
        if node in self.typed.calls:
            step = self._step(node, self.typed.calls[node])
            self.steps[node] = step
            weighed = self._weighed(node)
            self.held[node] = step.held
            self.weighed[node] = tuple({**{r.run: r for r in weighed}, **{r.run: r for r in step.held}}.values())
        elif node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
            self.held[node] = self.held.get(node.args[0], ())
            self.weighed[node] = self.weighed.get(node.args[0], ())
        if node in self.scheduled:
            self._merge(node, *self.scheduled[node])

    def _merge(self, node: fx.Node, site: Site, entry: Entry) -> None:
        assert site.stream is not None
        run = site.stream.run
        source = _of(self.weighed[node], run)
        count = removed(entry, tokens_at(run, source).size)
        if count == 0:
            return
        groups = Atom(simplify(tokens_at(run, source).size - count), f"n{len(self.merges) + 1}", clip=True)
        target = Resolution(len(self.merges) + 1, run, site.stream.batch, groups, Atom(count), source)
        self.merges.append(Merge(site, count, source, target))
        for state in (self.held, self.weighed):
            state[node] = (*(r for r in state[node] if not r.meets(target)), target)

    def _step(self, node: fx.Node, typed: Typed) -> Step:
        operands = self.typed.operands(node)
        runs = {
            r.run: None for operand in operands for r in (*self.held.get(operand, ()), *self.weighed.get(operand, ()))
        }
        held: list[Resolution] = []
        conversions: list[Conversion] = []
        weighings: list[Weighing] = []
        barriers: list[Barrier] = []
        for run in runs:
            target = meet([r for operand in operands for r in self.held.get(operand, ()) if r.run == run])
            if target is not None:
                reason = self._obstacle(node, typed, run, target)
                if reason is not None:
                    barriers.append(Barrier(run, reason))
                    target = None
            if target is not None:
                held.append(target)
            conversions.extend(self._conversions(operands, typed.reads, run, target))
            weighings.extend(self._weighings(operands, typed, run, target))
        return Step(tuple(held), tuple(conversions), tuple(weighings), tuple(barriers))

    def _conversions(
        self, operands: Sequence[fx.Node], reads: Sequence[Axes], run: Axis, target: Resolution | None
    ) -> Iterator[Conversion]:
        for number, operand in enumerate(operands):
            value = self.typed.value(operand)
            source = _of(self.held.get(operand, ()), run)
            touches = any(axis.atoms & run.atoms for axis in value.axes)
            if source is target or not touches or (source is None and not _holds(reads[number], run)):
                continue
            if target is None or (source is not None and source not in target.chain):
                yield Conversion(number, run, source, None, How.RESTORE)
                source = None
            if target is not None:
                how = How.MERGE if value.floating and value.clip else How.PICK
                yield Conversion(number, run, source, target, how)

    def _weighings(
        self, operands: Sequence[fx.Node], typed: Typed, run: Axis, target: Resolution | None
    ) -> Iterator[Weighing]:
        for use in typed.uses:
            if use.kind in (Kind.MIX, Kind.INVARIANT):
                continue
            axes = typed.reads[use.operand]
            resolution = target or _of(self.weighed.get(operands[use.operand], ()), run)
            touches = any(axes[dim].atoms & run.atoms for dim in use.dims)
            indexed = run.atoms <= frozenset().union(*(each.atoms for each in axes)) if axes else False
            if resolution is not None and touches and indexed and not _doubled(axes, resolution, use.dims):
                yield Weighing(use, resolution, target is not None)

    def _obstacle(self, node: fx.Node, typed: Typed, run: Axis, target: Resolution) -> str | None:
        """Why a call cannot be done on groups; None if it can."""
        if not typed.known:
            conflict = self.typed.conflicts.get(node)
            return f"its axes conflict: {conflict}" if conflict else "it has no rule"
        for use in typed.uses:
            touched = at(typed.reads[use.operand], [target])
            for dim in use.dims:
                if touched[dim].atoms & target.batch.atoms:
                    return f"it meets entries along {touched[dim]!r}, over which {target!r} was grouped"
                if use.kind is Kind.MIX and typed.reads[use.operand][dim].atoms & run.atoms:
                    return f"it mixes the tokens along {run!r}"
            dims = set(range(*(spread(typed.reads[use.operand], run) or (0, 0))))
            if dims & set(use.dims) and not dims <= set(use.dims):
                return f"it meets entries along a part of {run!r}"
        for axes in (*typed.reads, *typed.outputs):
            if not _holds(axes, run):
                if any(each.atoms & run.atoms for each in axes):
                    return f"it holds a part of {run!r}: {_text(axes)}"
                continue
            merged = at(axes, [target])
            if any(each.atoms & run.atoms for each in merged):
                return f"it holds a part of {run!r} beside the whole: {_text(axes)}"
            lost = target.batch.atoms - _free_atoms(merged)
            if lost:
                return (
                    f"it takes apart {', '.join(map(repr, sorted(lost, key=repr)))}, over which {target!r} was grouped"
                )
            if (pair := _ambiguous(merged, target)) is not None:
                return f"it pairs entries along {pair!r}, over which {target!r} was grouped"
            if any(not _reachable(each, target.groups) for each in merged):
                return f"it nests {run!r} too deeply: {_text(axes)}"
        return None

    def _weighed(self, node: fx.Node) -> tuple[Resolution, ...]:
        """Sums over a value weigh by what its operands descend from, as long as every entry is one token."""
        found: dict[Axis, list[Resolution]] = {}
        for operand in self.typed.operands(node):
            for resolution in self.weighed.get(operand, ()):
                found.setdefault(resolution.run, []).append(resolution)
        atoms = {atom for axes in self.typed.calls[node].outputs for each in axes for atom in each.atoms}
        met = (meet(each) for each in found.values())
        return tuple(r for r in met if r is not None and r.run.atoms | r.batch.atoms <= atoms)

    def _output(self, node: fx.Node) -> Step:
        results = self.typed.operands(node)
        writes = len(self.typed.captured.mutated)
        keep = self.merged_outputs
        return Step(
            conversions=tuple(
                Conversion(number, resolution.run, resolution, None, How.RESTORE)
                for number, result in enumerate(results)
                for resolution in self.held.get(result, ())
                if _holds(self.typed.value(result).axes, resolution.run) and not (keep and number >= writes)
            )
        )


def _of(resolutions: Iterable[Resolution], run: Axis) -> Resolution | None:
    return next((r for r in resolutions if r.run == run), None)


def _holds(axes: Axes, run: Axis) -> bool:
    """Whether some axis holds the whole run, or some neighbouring ones together."""
    probe = Atom(run.size)
    return spread(axes, run) is not None or any(probe in replace(each, run, probe).atoms for each in axes)


def _free_atoms(axes: Axes) -> set[Atom]:
    return {factor for each in axes for factor in each.factors if isinstance(factor, Atom)}


def _doubled(axes: Axes, resolution: Resolution, dims: Sequence[int]) -> bool:
    """Whether a dimension that the grouping depends on lies on several axes, none of them one that is summed over.

    Such entries are of pairs of samples, and no sample's tokens say what they weigh.
    """
    summed = {atom for dim in dims for atom in axes[dim].atoms}
    return any(sum(atom in each.atoms for each in axes) > 1 for atom in resolution.batch.atoms - summed)


def _ambiguous(axes: Axes, target: Resolution) -> Atom | None:
    """A dimension that the grouping depends on and that lies on several axes, none of them that of the groups."""
    for own in axes:
        beside = target.batch.atoms - own.atoms if target.groups in own.atoms else ()
        for atom in beside:
            if sum(atom in each.atoms for each in axes) > 1:
                return atom
    return None


def _reachable(axis: Axis, atom: Atom) -> bool:
    """Whether an atom stands alone in a segment, or is a factor of the axis or of a sum that is one."""
    return atom not in axis.atoms or any(
        atom is factor or (isinstance(factor, Axis) and (atom,) in factor.segments) for factor in axis.factors
    )


def _text(axes: Axes) -> str:
    return " x ".join(map(repr, axes))
