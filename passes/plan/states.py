"""What is known of a value in a graph: how it is held, what sums over it weigh, along what it is a distribution."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tldr_compile.passes.axes import Axes, Axis, Factor, Value
from tldr_compile.passes.plan.plan import Conversion, How, Weight
from tldr_compile.passes.plan.resolution import Resolution, holds, of_run


@dataclass(frozen=True)
class State:
    """What is known of a value: how it is held, and what sums over it weigh.

    `shares` are the dimensions along which it is a distribution, by run; along the runs in `scaled` it was one, and has
    the weights of its tokens in it.
    """

    held: tuple[Resolution, ...] = ()
    weighed: tuple[Weight, ...] = ()
    shares: tuple[tuple[Axis, int], ...] = ()
    scaled: frozenset[Axis] = frozenset()

    def weight(self, run: Axis) -> Weight | None:
        return next((each for each in self.weighed if each.resolution.run == run), None)

    def dims(self, run: Axis) -> tuple[int, ...]:
        return tuple(dim for each, dim in self.shares if each == run)


PLAIN = State()


def bring(
    axes: Axes, have: Sequence[Resolution], wanted: Sequence[Resolution], how: How, operand: int = 0
) -> Iterator[Conversion]:
    """From the resolutions at which a value is held to those that are wanted, of the runs that it has."""
    for source in have:
        aim = of_run(wanted, source.run)
        if aim is None or source not in aim.chain:
            yield Conversion(operand, source.run, source, None, How.RESTORE)
    for target in wanted:
        held = of_run(have, target.run)
        start = held if held is not None and held in target.chain else None
        if start is not target and (start is not None or holds(axes, target.run)):
            yield Conversion(operand, target.run, start, target, how)


def how_down(value: Value) -> How:
    """Floats that descend from the clip's pixels are merged; everything else is picked at the representative."""
    return How.MERGE if value.floating and value.clip else How.PICK


def joined(one: State, other: State) -> State:
    return State(
        one.held + other.held, one.weighed + other.weighed, one.shares + other.shares, one.scaled | other.scaled
    )


def of_rows(scored: Iterable[Resolution], target: Resolution, source: Resolution | None) -> Iterator[Conversion]:
    """What a site says of its tokens `[batch, tokens]`, from how its scores are held to where the merge starts."""
    held = of_run(scored, target.run)
    for each in scored:
        if each.run != target.run and each.meets(target):
            yield Conversion(0, each.run, each, None, How.RESTORE)
    if held is not None and (source is None or held not in source.chain):
        yield Conversion(0, held.run, held, None, How.RESTORE)
        held = None
    if held is not source:
        yield Conversion(0, target.run, held, source, How.MERGE)


def told_apart(axes: Axes, run: Axis) -> set[Factor]:
    """The factors that every token has a value of: a sum of batches as a whole, no part of it."""
    inside = [s for each in axes for s in each.segments if len(each.segments) > 1 and set(s) & run.atoms]
    return {factor for factors in (*inside, *(each.factors for each in axes)) for factor in factors}


def twice(axes: Axes, run: Axis) -> bool:
    """Whether pairs of tokens lie on one axis."""
    return any(segment.count(atom) > 1 for each in axes for segment in each.segments for atom in run.atoms)


def doubled(axes: Axes, resolution: Resolution, dims: Sequence[int]) -> bool:
    """Whether a dimension that the grouping depends on lies on several axes, none of them one that is summed over.

    Such entries are of pairs of samples, and no sample's tokens say what they weigh.
    """
    summed = {atom for dim in dims for atom in axes[dim].atoms}
    return any(sum(atom in each.atoms for each in axes) > 1 for atom in resolution.batch.atoms - summed)
