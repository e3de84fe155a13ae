"""Resolutions: how a run of tokens is grouped, and along which axes a value is held then.

[b, 1 + t·h·w, C]   -- merged -->   [b, 1 + n1, C],   n1 grouped for each b
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tldr_compile.passes.axes import Atom, Axes, Axis, axis, gathered, replace


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

    The groups lie where the first factor of the run lay, and its others are gone: `b x h1·h2 x w1·w2` is held as
    `b x n1·h2 x w2` where `h1·w1` is grouped.
    """
    for resolution in resolutions:
        run, groups = resolution.run, resolution.groups
        axes = tuple(replace(each, run, groups) for each in gathered(axes, run))
    return axes


def holds(axes: Axes, run: Axis) -> bool:
    """Whether some axis holds the whole run, or some do together."""
    probe = Atom(run.size)
    return any(probe in replace(each, run, probe).atoms for each in gathered(axes, run))


def of_run(resolutions: Iterable[Resolution], run: Axis) -> Resolution | None:
    return next((each for each in resolutions if each.run == run), None)


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
