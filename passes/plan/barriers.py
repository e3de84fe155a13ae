"""Barriers: why a call cannot be done on groups of tokens. One predicate each; the first that answers is the reason.

x [b, n1, C]  ->  reshape to [b, t, h, w, C]      a part of the run: restored first
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property

from tldr_compile.passes.axes import Atom, Axes, Axis, Factor, Kind, Typed, Use, touches
from tldr_compile.passes.plan.resolution import Resolution, at, holds


@dataclass(frozen=True)
class Asked:
    """A call that would be done with the tokens of `run` at the resolution `target`."""

    typed: Typed
    run: Axis
    target: Resolution
    conflict: str | None

    @cached_property
    def every(self) -> tuple[Axes, ...]:
        return (*self.typed.reads, *self.typed.outputs)

    @cached_property
    def merged(self) -> tuple[Axes, ...]:
        """The axes that hold the run, as they would be."""
        return tuple(at(axes, [self.target]) for axes in self.every if holds(axes, self.run))


@dataclass(frozen=True)
class Obstacle:
    """Why a call cannot be done on groups; `together` are the atoms that one grouping would have to join for it."""

    reason: str
    together: frozenset[Atom] = frozenset()


def obstacle(asked: Asked) -> Obstacle | None:
    """Why a call cannot be done on groups; None if it can."""
    return next((found for barrier in BARRIERS if (found := barrier(asked)) is not None), None)


def without_rule(asked: Asked) -> Obstacle | None:
    """An operator of which nothing is known, or whose equations conflict: 12 = 3·4 here, 2·6 there."""
    if asked.typed.known:
        return None
    contradicts = f"its sizes contradict each other: {asked.conflict}"
    return Obstacle(contradicts if asked.conflict else "it has no typing rule")


def mixing_tokens(asked: Asked) -> Obstacle | None:
    """A linear layer or a convolution over tokens."""
    for use in asked.typed.uses:
        mixed = _touched(asked.typed.reads[use.operand], use, asked.run)
        if mixed and use.kind in (Kind.MIX, Kind.LINEAR):
            reason = f"it mixes the tokens along {asked.run!r}, each by its place"
            return Obstacle(reason, _part(mixed, asked.run))
    return None


def meeting_across_groupings(asked: Asked) -> Obstacle | None:
    """A mean over frames that were each grouped by themselves; over frames and their groups together it is exact."""
    for use in asked.typed.uses:
        held = at(asked.typed.reads[use.operand], [asked.target])
        touched = use.part or {atom for dim in use.dims for atom in held[dim].atoms}
        over = touched & asked.target.batch.atoms
        if over and (use.kind is Kind.MIX or asked.target.groups not in touched):
            does = "mixes entries along" if use.kind is Kind.MIX else "reduces over"
            reason = f"it {does} {_names(over)}, and the tokens are grouped differently for each of it"
            return Obstacle(reason, frozenset(over))
    return None


def reducing_a_part(asked: Asked) -> Obstacle | None:
    """`[b, t, h, w]` held as one run, reduced over h and w only."""
    for use in asked.typed.uses:
        summed = _touched(asked.typed.reads[use.operand], use, asked.run)
        if part := _part(summed, asked.run):
            return Obstacle(f"it reduces over a part of {asked.run!r}, whose tokens are grouped together", part)
    return None


def holding_a_part(asked: Asked) -> Obstacle | None:
    """A grid reshape: rows and columns apart."""
    for axes in asked.every:
        if not holds(axes, asked.run):
            if touches(axes, asked.run):
                return Obstacle(f"it needs the tokens along {asked.run!r} one by one: {text(axes)}")
        elif touches(at(axes, [asked.target]), asked.run):
            return Obstacle(f"it pairs the tokens along {asked.run!r} with a part of them: {text(axes)}")
    return None


def taking_the_batch_apart(asked: Asked) -> Obstacle | None:
    """Groups without the samples or frames that they were grouped for."""
    for axes in asked.merged:
        lost = set(asked.target.batch.factors) - _told_apart(axes, asked.target.groups)
        if lost:
            reason = f"it separates the tokens from {_names(lost)}, and they are grouped differently for each of it"
            return Obstacle(reason, frozenset(f for f in lost if isinstance(f, Atom)))
    return None


def pairing_groupings(asked: Asked) -> Obstacle | None:
    """Scores between frames: the groups of one beside the number of another."""
    for axes in asked.merged:
        if (pair := _ambiguous(axes, asked.target)) is not None:
            reason = f"it pairs entries along {pair!r}, and the tokens are grouped differently for each of it"
            return Obstacle(reason, frozenset({pair}))
    return None


def pairing_on_one_axis(asked: Asked) -> Obstacle | None:
    """Pairs of tokens `[b, n, n]` flattened to `[b, n·n]`."""
    groups = asked.target.groups
    for axes in asked.merged:
        if any(segment.count(groups) > 1 for each in axes for segment in each.segments):
            return Obstacle(f"it lays pairs of tokens along {asked.run!r} on one dimension: {text(axes)}")
    return None


def nesting_too_deeply(asked: Asked) -> Obstacle | None:
    """A run within a sum within a product within a sum."""
    for axes in asked.merged:
        if any(not _reachable(each, asked.target.groups) for each in axes):
            return Obstacle(
                f"it holds the tokens along {asked.run!r} too deep inside of sums and products: {text(axes)}"
            )
    return None


BARRIERS: tuple[Callable[[Asked], Obstacle | None], ...] = (
    without_rule,
    meeting_across_groupings,
    mixing_tokens,
    reducing_a_part,
    holding_a_part,
    taking_the_batch_apart,
    pairing_groupings,
    pairing_on_one_axis,
    nesting_too_deeply,
)


def _touched(axes: Axes, use: Use, run: Axis) -> frozenset[Atom]:
    """The atoms of a run that lie on the dimensions of a use."""
    return run.atoms & (use.part or {atom for dim in use.dims for atom in axes[dim].atoms})


def _part(atoms: frozenset[Atom], run: Axis) -> frozenset[Atom]:
    """Some atoms of a run, if they are not all of it."""
    return atoms if atoms < run.atoms else frozenset()


def _told_apart(axes: Axes, groups: Atom) -> set[Factor]:
    """The factors whose values are at hand for every group: those of other axes, and of the groups' own segments."""
    beside = {f for each in axes for f in each.factors}
    own = [set(segment) for each in axes for segment in each.segments if groups in segment]
    return beside | (set.intersection(*own) if own else set())


def _ambiguous(axes: Axes, target: Resolution) -> Atom | None:
    """A dimension that the grouping depends on and that lies on several axes, none of them that of the groups."""
    for own in axes:
        beside = target.batch.atoms - own.atoms if target.groups in own.atoms else ()
        for atom in beside:
            if sum(atom in each.atoms for each in axes) > 1:
                return atom
    return None


def _reachable(axis: Axis, atom: Atom) -> bool:
    """Whether an atom stands in a segment of the axis, or of a sum that is a factor of the axis."""
    inside = [segment for segment in axis.segments if atom in segment]
    nested = [f for f in axis.factors if isinstance(f, Axis) and any(atom in segment for segment in f.segments)]
    return atom not in axis.atoms or bool(inside) or bool(nested)


def _names(atoms: Collection[Factor]) -> str:
    return ", ".join(sorted(map(repr, atoms)))


def text(axes: Axes) -> str:
    return " x ".join(map(repr, axes))
