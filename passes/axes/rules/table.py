"""The rule table: what one call of an operator says about the axes it reads and writes.

A rule is a function from a `Call` to a `Typed`. It sees types, never tensors, and it poses equations by calling `same`
and `absorb`; it does not solve them. A constant's dimensions are anonymous: every call that reads one sees them new, so
that a table of 8 rows that meets height here and width there says nothing about height and width. Register a rule with
`@rule("add", "mul")` for ATen, or with a qualified name ("my::op").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeAlias

from tldr_compile.passes.axes.algebra import (
    BORN,
    PIXEL,
    UNIT,
    UNKNOWN,
    Atom,
    Axes,
    Axis,
    Conflict,
    Role,
    Substitution,
    born,
    product,
)
from tldr_compile.passes.sizes import Size, divide


class Kind(Enum):
    """What an operator does along an axis that it does not simply map, entry by entry."""

    MEAN = "mean"
    SUM = "sum"
    SOFTMAX = "softmax"
    KEYS = "keys"  # attended over: a softmax and the sum it weighs
    CONTRACT = "contract"  # summed in a product of two activations
    INVARIANT = "invariant"  # the same over groups as over tokens: min, max, the second factor of a weighed sum
    LINEAR = "linear"  # summed with the factors of a parameter
    MIX = "mix"  # anything else: entries meet in a way that merging does not commute with


Span: TypeAlias = tuple[Size, Size]


@dataclass(frozen=True)
class Use:
    """An operand's dimensions that the operator does not map; of them only the atoms `part`, where it has any."""

    kind: Kind
    operand: int
    dims: tuple[int, ...]
    part: frozenset[Atom] = frozenset()


@dataclass(frozen=True)
class Typed:
    """One call, typed: `reads` are the operands' axes as broadcast for this call (`[operand][dim]`).

    `own` are the operands' axes before that; those of a constant are what it stands for in this call alone. `spans` is
    where a slice, selection or split took its pieces: between two offsets of the dimension `cut`; None where that is
    not known.
    """

    outputs: tuple[Axes, ...]
    reads: tuple[Axes, ...]
    own: tuple[Axes, ...] = ()
    uses: tuple[Use, ...] = ()
    cut: int | None = None
    spans: tuple[Span | None, ...] = ()
    known: bool = True


@dataclass(frozen=True)
class Operand:
    """A tensor argument: its axes, whether it varies with the inputs and whether it descends from the clip."""

    index: int
    axes: Axes
    varies: bool
    clip: bool


@dataclass
class Call:
    """One operator call in types. `given` maps the schema's argument names to values, with `Operand`s for tensors."""

    name: str
    given: Mapping[str, Any]
    operands: tuple[Operand, ...]
    sizes: tuple[tuple[Size, ...], ...]
    solved: Substitution
    births: list[Atom] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    channels: list[Atom] = field(default_factory=list)
    _born: int = 0

    @property
    def clip(self) -> bool:
        return any(operand.clip for operand in self.operands)

    def axes(self, operand: Operand) -> Axes:
        return tuple(self.solved.resolve(each) for each in operand.axes)

    def fresh(
        self,
        size: Size,
        *,
        label: str = "",
        strength: int = UNKNOWN,
        clip: bool | None = None,
        role: Role = Role.UNKNOWN,
    ) -> Axis:
        """A newly born dimension.

        A call that is typed again bears the same atoms in the same order: `births` remembers them.
        """
        self._born += 1
        clip = self.clip if clip is None else clip
        strength = strength if clip else max(strength, BORN)  # no constant that it meets later gives it its name
        if self._born > len(self.births) or self.births[self._born - 1].size != size:
            del self.births[self._born - 1 :]
            self.births.append(Atom(size, label, clip, strength, role))
        return born(self.births[self._born - 1])

    def same(self, *axes: Axis) -> Axis:
        """All axes are one, up to broadcasting. Axes with nothing of the clip may disagree: nothing rests on them.

        A dimension of the clip that was born whole is not one that was joined out of parts: those were shifted.
        """
        result = UNIT
        for each in axes:
            if result == UNIT:
                result = each
            elif each != UNIT:
                try:
                    self._unjoined(result, each)
                    self.solved = self.solved.identify(result, each)
                except Conflict:
                    if self.solved.resolve(result).clip or self.solved.resolve(each).clip:
                        raise
        return self.solved.resolve(result)

    def _unjoined(self, one: Axis, other: Axis) -> None:
        for whole, parts in ((one, other), (other, one)):
            atom, joined = self.solved.resolve(whole).lone, self.solved.resolve(parts)
            if atom and atom.clip and atom.born and len(joined.segments) > 1 and joined.clip:
                raise Conflict(f"{atom!r} was born whole, and {joined!r} is joined out of parts")

    def adopt(self, activation: Axis, table: Axis) -> Axis:
        """A constant meets an activation, up to broadcasting: its dimension is the activation's."""
        activation = self.solved.resolve(activation)
        if table.lone and activation not in (UNIT, table) and activation.size == table.size:
            self.solved = self.solved.bind(table.lone, activation)
        return self.same(activation, table)

    def absorb(self, weight: Axis, activation: Axis, *, channel: bool = True) -> None:
        """A parameter mixes or scales along a dimension of an activation, which is therefore a channel.

        Where that is not certain (`channel=False`: a linear layer may run along any dimension), one that was born the
        clip's own stays so for now, and is noted in `channels`.
        """
        weight, activation = self.solved.resolve(weight), self.solved.resolve(activation)
        lone = activation.lone
        if weight.lone and lone and lone.clip and (channel or not lone.born) and weight.size == activation.size:
            self.solved = self.solved.assign(lone, weight)
        else:
            self.channels += [lone] if lone else [atom for atom in activation.atoms if not atom.clip]
            self.same(activation, weight)

    def use(self, kind: Kind, operand: Operand, *dims: int, part: frozenset[Atom] = frozenset()) -> None:
        rank = len(operand.axes)
        self.uses.append(Use(kind, operand.index, tuple(dim % rank for dim in dims) if rank else (), part))

    def blocks(self, operand: Operand, lengths: Mapping[int, int]) -> tuple[dict[int, Axis], frozenset[Atom]] | None:
        """Dimensions of an operand taken apart into blocks of some lengths: how many there are, and what is in them.

        None where a dimension does not divide, or is one of pixels, which blocks make tokens of.
        """
        solved, counts, inside = self.solved, dict[int, Axis](), frozenset[Atom]()
        for dim, length in lengths.items():
            axis = self.solved.resolve(operand.axes[dim])
            count = divide(axis.size, length)
            if count is None or any(atom.strength == PIXEL for atom in axis.atoms):
                return None
            try:
                solved, counts[dim], rest = solved.take(solved.resolve(axis).factors, count)
            except Conflict:
                return None
            inside |= product(rest).atoms
        self.solved = solved
        return {dim: solved.resolve(each) for dim, each in counts.items()}, inside

    def typed(self, *outputs: Axes, reads: Mapping[int, Axes] | None = None, **more: Any) -> Typed:
        """The result; operands that `reads` does not mention are read as they are."""
        reads = reads or {}
        return Typed(
            outputs=outputs,
            reads=tuple(reads.get(operand.index, operand.axes) for operand in self.operands),
            own=tuple(operand.axes for operand in self.operands),
            uses=tuple(self.uses),
            **more,
        )


Rule: TypeAlias = Callable[[Call], Typed]
TABLE: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under operator names; a plain name is ATen's."""

    def register(function: Rule) -> Rule:
        TABLE.update({name if "::" in name else f"aten::{name}": function for name in names})
        return function

    return register


def unknown(call: Call) -> Typed:
    """No rule: every output dimension is new, and every operand's dimension may have gone anywhere."""
    for operand in call.operands:
        call.use(Kind.MIX, operand, *range(len(operand.axes)))
    outputs = tuple(tuple(call.fresh(size) for size in sizes) for sizes in call.sizes)
    return call.typed(*outputs, known=False)


def aligned(axes: Axes, rank: int) -> Axes:
    """Axes padded with units on the left, as broadcasting does."""
    return (UNIT,) * (rank - len(axes)) + axes


def broadcast(call: Call, all_axes: Sequence[Axes], constants: Sequence[Axes] = ()) -> Axes:
    """The axes of a pointwise result; those of constants follow the others'."""
    rank = max(map(len, (*all_axes, *constants)), default=0)
    result = tuple(
        call.same(*column) for column in zip(*(aligned(axes, rank) for axes in (*all_axes, ())), strict=True)
    )
    for table in constants:
        result = tuple(call.adopt(*pair) for pair in zip(result, aligned(table, rank), strict=True))
    return result
