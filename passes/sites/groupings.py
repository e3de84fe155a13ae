"""What is grouped at a site: every clip factor of its residual stream has one part in it.

run       tokens that are grouped; the site attends along them
apart     a grouping of its own for each value: samples, frames of a per-frame model, windows
shared    one grouping for all values, which the site does not attend along: frames of divided attention
carried   one grouping for all values, which the site attends along: the places of a 2 x 2 block

stream [b, 1 + h·w·t, c], attention over h·w for each b·t
    run h·w; apart b·t              every frame is grouped by itself
    run h·w; apart b; shared t      all frames are grouped alike, and attention along t can follow
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from tldr_compile.passes.axes import UNIT, Atom, Axis, Factor, Role, product
from tldr_compile.passes.sizes import Size

TIME = frozenset({Role.TIME, Role.FOLDED, Role.SAMPLE})


@dataclass(frozen=True)
class Grouping:
    """The parts, each a product of factors of the stream."""

    run: Axis
    apart: Axis
    shared: Axis = UNIT
    carried: Axis = UNIT

    @property
    def joined(self) -> Axis:
        """All that one grouping serves all values of."""
        return product((self.shared, self.carried))

    def block(self, attended: Collection[Atom]) -> Size:
        """How many tokens that one attention sees one group of it stands for."""
        return product((self.carried, *(f for f in self.apart.factors if f in attended))).size

    def joining(self, atoms: Collection[Atom], attended: Collection[Atom]) -> Grouping | None:
        """One grouping for all values of some atoms; None if that groups whole rows or columns, or windows alike."""
        run, taken = _parted(self.run, atoms)
        apart, given = _parted(self.apart, atoms)
        shared = [f for f in given if f not in attended]
        carried = [f for f in given if f in attended]
        if not has_place(product(run)) or _places(self.run) != _places(product(run)) or has_place(product(given)):
            return None
        return Grouping(
            product(run), product(apart), product((self.shared, *shared)), product((self.carried, *taken, *carried))
        )

    def sharing(self, atoms: Collection[Atom]) -> Grouping:
        """One grouping for all values of some atoms that were apart."""
        apart, shared = _parted(self.apart, atoms)
        return Grouping(self.run, product(apart), product((self.shared, *shared)), self.carried)

    def within(self, atoms: Collection[Atom]) -> Grouping | None:
        """Only some atoms of the run are grouped, for each value of the others; None if those are no places."""
        rest, run = _parted(self.run, atoms)
        if not has_place(product(run)):
            return None
        return Grouping(product(run), product((self.apart, *rest)), self.shared, self.carried)

    def __str__(self) -> str:
        parts = (("run", self.run), ("apart", self.apart), ("shared", self.shared), ("carried", self.carried))
        return "; ".join(f"{name} {each!r}" for name, each in parts if each != UNIT)


def has_place(run: Axis) -> bool:
    """Whether a run has places of a picture, or tokens: time alone is not grouped, nor are samples."""
    return not {atom.role for atom in run.atoms} <= TIME


def _places(run: Axis) -> set[Role]:
    return {atom.role for atom in run.atoms} - TIME


def _parted(whole: Axis, atoms: Collection[Atom]) -> tuple[list[Factor], list[Factor]]:
    """The other factors, and those among some atoms."""
    return [f for f in whole.factors if f not in atoms], [f for f in whole.factors if f in atoms]
