"""Axes with provenance: a small immutable algebra that says where each dimension of a tensor came from.

An *atom* is born where a dimension is born; a *segment* is a product of factors (atoms, or parenthesised sums); an
*axis* is a concatenation of segments. `1 + t·h·w` is a class token followed by the patches of a clip. A `Substitution`
solves the equations that operators pose about axes. Nothing here knows about graphs or tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from math import prod
from typing import TypeAlias, Union

import sympy

from tldr_compile.passes.sizes import Size, divide, simplify

# How firmly an atom is anchored: when two lone atoms turn out to be one, the firmer name stays.
# A constant never names what varies; a pixel of an input is no token, though tokens are made of it.
CONSTANT, UNKNOWN, BORN, PIXEL = 0, 1, 2, 3


class Role(Enum):
    """What a dimension is, by its birth. Decisions read roles; labels are for people."""

    SAMPLE = "sample"
    TIME = "time"
    HEIGHT = "height"
    WIDTH = "width"
    TOKEN = "token"  # of an input that comes as tokens
    CHANNEL = "channel"
    FOLDED = "folded"  # a part of what came as samples: frames of a clip, or samples
    UNKNOWN = "unknown"

    @property
    def part(self) -> Role:
        """The role of a factor of such a dimension."""
        return Role.FOLDED if self is Role.SAMPLE else self


PICTURE = frozenset({Role.HEIGHT, Role.WIDTH})


class Conflict(Exception):
    """Two axes cannot be the same: the operator that asked for it is a barrier, which is not an error."""


@dataclass(frozen=True, eq=False)
class Atom:
    """One dimension at its birth. Identity is the object itself, never the size.

    `label` is for people only; `clip` says that the dimension was born from the clip's own.
    """

    size: Size
    label: str = ""
    clip: bool = False
    strength: int = UNKNOWN
    role: Role = Role.UNKNOWN

    @property
    def born(self) -> bool:
        """Whether the atom is one of the clip's own dimensions, not a name for something still unknown."""
        return self.clip and self.strength >= BORN

    def part(self, size: Size, number: int) -> Atom:
        """Factor `number` of this dimension, of a size."""
        label = f"{self.label}{number}" if self.label else ""
        return Atom(size, label, self.clip, min(self.strength, BORN), self.role.part)

    def __repr__(self) -> str:
        return self.label if self.clip and self.label else str(self.size)


Factor: TypeAlias = Union[Atom, "Axis"]
Segment: TypeAlias = tuple[Factor, ...]


@dataclass(frozen=True)
class Axis:
    """A concatenation of segments, each a product of factors; the empty product has size 1.

    A factor is an atom, or an axis of at least two segments (a sum in parentheses). Build with `axis`, `product`,
    `concat`.
    """

    segments: tuple[Segment, ...]

    @cached_property
    def size(self) -> Size:
        return simplify(sum((segment_size(segment) for segment in self.segments), 0))

    @cached_property
    def atoms(self) -> frozenset[Atom]:
        return frozenset(self._atoms())

    @cached_property
    def clip(self) -> bool:
        return any(atom.clip for atom in self.atoms)

    @property
    def factors(self) -> Segment:
        """The axis as one product: its only segment, or itself in parentheses."""
        return self.segments[0] if len(self.segments) == 1 else (self,)

    @property
    def lone(self) -> Atom | None:
        """The atom, if the axis is nothing but one atom."""
        if len(self.segments) == 1 and len(self.segments[0]) == 1 and isinstance(self.segments[0][0], Atom):
            return self.segments[0][0]
        return None

    def _atoms(self) -> Iterator[Atom]:
        for segment in self.segments:
            for factor in segment:
                if isinstance(factor, Atom):
                    yield factor
                else:
                    yield from factor._atoms()

    def __repr__(self) -> str:
        return " + ".join(_segment_text(segment) for segment in self.segments) or "0"


Axes: TypeAlias = tuple[Axis, ...]
UNIT = Axis(((),))
EMPTY = Axis(())
Border: TypeAlias = tuple[int, Size]


def _segment_text(segment: Segment) -> str:
    return "·".join(f"({f!r})" if isinstance(f, Axis) else repr(f) for f in segment) or "1"


def segment_size(segment: Segment) -> Size:
    return simplify(prod((factor.size for factor in segment), start=1))


def axis(*atoms: Atom) -> Axis:
    """The product of some atoms as an axis."""
    return Axis((tuple(atoms),))


def born(atom: Atom) -> Axis:
    """The axis of a newly born dimension: of size 1 or 0 it carries no atom, for there is nothing to tell apart."""
    return UNIT if atom.size == 1 else EMPTY if atom.size == 0 else axis(atom)


def product(axes: Iterable[Axis | Factor]) -> Axis:
    """The flattening of several axes into one, the first varying slowest."""
    factors: list[Factor] = []
    for each in axes:
        if each == EMPTY:
            return EMPTY
        factors.extend(each.factors if isinstance(each, Axis) else (each,))
    if len(factors) == 1 and isinstance(factors[0], Axis):
        return factors[0]
    return Axis((tuple(factors),))


def concat(axes: Iterable[Axis]) -> Axis:
    """One axis after the other."""
    return Axis(tuple(segment for each in axes for segment in each.segments))


def subaxis(segments: Sequence[Segment]) -> Axis:
    """Some segments as an axis of their own, in normal form."""
    return product([Axis(tuple(segments))])


def products(whole: Axis) -> list[Segment]:
    """All products of an axis, those of sums inside of it too: `1 + n` and `n` of `b·(1 + n)`."""
    inner = [each for segment in whole.segments for f in segment if isinstance(f, Axis) for each in products(f)]
    return [*whole.segments, *inner]


def find(whole: Axis, run: Axis) -> tuple[int, int] | None:
    """Where the segments of `run` stand, as `[first, last)`, among the segments of `whole`; None if they do not."""
    span = len(run.segments)
    for first in range(len(whole.segments) - span + 1):
        if whole.segments[first : first + span] == run.segments:
            return first, first + span
    return None


def border(whole: Axis, offset: Size) -> Border | None:
    """Where an offset falls: the number of the segment and how far into it; None if that cannot be told."""
    at: Size = 0
    for number, segment in enumerate(whole.segments):
        if at == offset:
            return number, 0
        after = simplify(at + segment_size(segment))
        if isinstance(offset, int) and isinstance(at, int) and isinstance(after, int) and at < offset < after:
            return number, offset - at
        at = after
    return (len(whole.segments), 0) if at == offset else None


def gathered(axes: Axes, run: Axis) -> Axes:
    """The same factors, with those of every whole run brought together where its first one lies.

    A run may lie in any order in one product, or over several dimensions: `b x h1·h2·w1·w2` becomes `b x h1·w1·h2·w2`
    for `h1·w1`, and `b·t x h·w` becomes `b·t·h x w` for `t·h`. One that lies half inside of a sum is not held whole.
    """
    inner, dims = run.factors, [dim for dim, each in enumerate(axes) if touches((each,), run)]
    if len(run.segments) != 1 or not dims:
        return axes
    found = {dim: _together([axes[dim].factors], inner)[0] for dim in dims}
    partial = [dim for dim in dims if len({found[dim].count(f) for f in inner}) > 1]
    found.update(zip(partial, _together([found[dim] for dim in partial], inner), strict=True))
    whole = {dim: product(_gathered_inside(f, run) for f in factors) for dim, factors in found.items()}
    return tuple(whole.get(dim, each) for dim, each in enumerate(axes))


def _gathered_inside(factor: Factor, run: Axis) -> Factor:
    if isinstance(factor, Atom):
        return factor
    segments = (_together([segment], run.factors)[0] for segment in factor.segments)
    return Axis(tuple(tuple(_gathered_inside(f, run) for f in segment) for segment in segments))


def _together(products: Sequence[Segment], inner: Segment) -> list[Segment]:
    """Every whole occurrence of some factors over some products, moved to where the first of them is."""
    found: dict[Factor, tuple[int, int]] = {}
    heads: set[tuple[int, int]] = set()
    moved: set[tuple[int, int]] = set()
    for number, segment in enumerate(products):
        for place, factor in enumerate(segment):
            if factor in inner:
                found = {factor: (number, place)} if factor in found else {**found, factor: (number, place)}
            if len(found) == len(inner):
                heads.add(found[inner[0]])
                moved.update(found.values())
                found = {}

    def held(number: int, place: int, factor: Factor) -> Segment:
        return inner if (number, place) in heads else () if (number, place) in moved else (factor,)

    return [
        tuple(f for place, factor in enumerate(segment) for f in held(number, place, factor))
        for number, segment in enumerate(products)
    ]


def touches(axes: Iterable[Axis], run: Axis) -> bool:
    """Whether any axis has an atom of the run."""
    return any(each.atoms & run.atoms for each in axes)


def replace(whole: Axis, run: Axis, by: Atom) -> Axis:
    """`whole` with every whole occurrence of `run` replaced by one atom: a merge is a substitution."""
    if not run.atoms <= whole.atoms:
        return whole
    if (place := find(whole, run)) is not None:
        rest = replace(Axis(whole.segments[place[1] :]), run, by).segments if place[1] < len(whole.segments) else ()
        return Axis((*whole.segments[: place[0]], (by,), *rest))
    return concat(_replace_factors(segment, run, by) for segment in whole.segments)


def _replace_factors(segment: Segment, run: Axis, by: Atom) -> Axis:
    inner = run.factors
    for first in range(len(segment) - len(inner) + 1):
        if segment[first : first + len(inner)] == inner:
            after = _replace_factors(segment[first + len(inner) :], run, by).segments[0]
            return Axis(((*segment[:first], by, *after),))
    return Axis((tuple(replace(f, run, by) if isinstance(f, Axis) else f for f in segment),))


@dataclass(frozen=True)
class Substitution:
    """What the equations have established so far. Persistent: every method returns a new one."""

    bindings: Mapping[Atom, Axis] = field(default_factory=dict)

    def resolve(self, axis: Axis) -> Axis:
        """The axis with every bound atom replaced, in normal form."""
        if self.bindings.keys().isdisjoint(axis.atoms):
            return axis
        return concat(product(self._resolve_factor(factor) for factor in segment) for segment in axis.segments)

    def _resolve_factor(self, factor: Factor) -> Axis:
        if isinstance(factor, Axis):
            return self.resolve(factor)
        return self.resolve(self.bindings[factor]) if factor in self.bindings else Axis(((factor,),))

    def bind(self, atom: Atom, to: Axis) -> Substitution:
        """`atom := to`, after the occurs check."""
        if atom.born and not to.lone and any(other.born for other in to.atoms):
            raise Conflict(f"{atom!r} and {to!r} were born apart: that their sizes agree is a coincidence")
        solved = self.assign(atom, to)
        for each in to.atoms if atom.born else ():
            if not each.clip:  # what a dimension of the clip is told to be is of the clip
                role = atom.role if to.lone else atom.role.part
                solved = solved.assign(each, axis(Atom(each.size, each.label or atom.label, True, BORN, role)))
        return solved

    def assign(self, atom: Atom, to: Axis) -> Substitution:
        """`atom := to`, whatever it was: whoever asks for it knows what no equation says."""
        if atom in self.resolve(to).atoms:
            raise Conflict(f"{atom!r} would contain itself: {to!r}")
        return Substitution({**self.bindings, atom: to})

    def identify(self, keep: Axis, other: Axis) -> Substitution:
        """The two axes are one. Of two lone atoms the firmer one stays, then the clip's, then the first."""
        keep, other = self.resolve(keep), self.resolve(other)
        if keep == other:
            return self
        if keep.size != other.size:
            raise Conflict(f"{keep!r} has size {keep.size}, {other!r} has size {other.size}")
        mine, theirs = keep.lone, other.lone
        if theirs and (not mine or (mine.strength, mine.clip) >= (theirs.strength, theirs.clip)):
            return self.bind(theirs, keep)
        if mine:
            return self.bind(mine, other)
        if len(keep.segments) == 1 and len(other.segments) == 1:
            return self._identify_products(keep.factors, other.factors)
        return self._identify_sums(keep, other)

    def _identify_products(self, keep: Segment, other: Segment) -> Substitution:
        size = min(
            (keep[0].size, other[0].size), key=lambda s: (not isinstance(s, int), s if isinstance(s, int) else 0)
        )
        solved, head, rest = self.take(keep, size)
        solved, other_head, other_rest = solved.take(other, size)
        return solved.identify(head, other_head).identify(product(rest), product(other_rest))

    def _identify_sums(self, keep: Axis, other: Axis) -> Substitution:
        solved, left, right = self, list(keep.segments), list(other.segments)
        while left and right:
            one, two = Axis((left.pop(0),)), Axis((right.pop(0),))
            if one.size != two.size:
                longer, shorter, rest = (one, two, left) if _larger(one.size, two.size) else (two, one, right)
                if longer.lone is None:
                    raise Conflict(f"{keep!r} and {other!r} are joined at different places")
                tail = dataclasses.replace(longer.lone, size=simplify(longer.size - shorter.size))
                solved = solved.bind(longer.lone, concat([shorter, axis(tail)]))
                rest.insert(0, (tail,))
            else:
                solved = solved.identify(subaxis(one.segments), subaxis(two.segments))
        if left or right:
            raise Conflict(f"{keep!r} and {other!r} have different segments")
        return solved

    def take(self, factors: Segment, size: Size) -> tuple[Substitution, Axis, Segment]:
        """Factors off the front whose product is `size`; an atom that is too large is split."""
        solved, taken, rest = self, [], list(factors)
        while size != 1:
            if not rest:
                raise Conflict(f"nothing of size {size} is left")
            head = rest.pop(0)
            if (left := divide(size, head.size)) is not None:
                taken.append(head)
                size = left
            elif (over := divide(head.size, size)) is not None and isinstance(head, Atom):
                first, second = head.part(size, 1), head.part(over, 2)
                solved = Substitution({**solved.bindings, head: axis(first, second)})
                taken.append(first)
                rest.insert(0, second)
                size = 1
            else:
                raise Conflict(f"{head!r} of size {head.size} has no part of size {size}")
        return solved, product(taken), tuple(rest)


def _larger(one: Size, two: Size) -> bool:
    difference = sympy.sympify(one - two)
    if difference.is_number:
        return bool(difference > 0)
    raise Conflict(f"which is larger, {one} or {two}, is not known")
