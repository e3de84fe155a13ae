"""The algebra of axes: its laws, on axes of every kind, and what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from tldr_compile.passes.axes.algebra import (
    BORN,
    CONSTANT,
    UNIT,
    Atom,
    Axis,
    Conflict,
    Role,
    Substitution,
    axis,
    border,
    concat,
    find,
    gathered,
    product,
    replace,
    segment_size,
    subaxis,
)
from tldr_compile.passes.sizes import Size, divide, simplify

s = sympy.Symbol("s", integer=True, positive=True)
NOTHING = Substitution()

atoms = st.builds(Atom, st.integers(2, 5), clip=st.booleans(), strength=st.integers(0, 2))
lone = st.builds(axis, atoms)
products = st.lists(lone, max_size=3).map(product)
sums = st.lists(products, min_size=1, max_size=3).map(concat)
runs = st.lists(st.lists(lone, min_size=1, max_size=3).map(product), min_size=1, max_size=2).map(concat)
axes = st.lists(st.one_of(lone, sums), min_size=1, max_size=3).map(product)


@st.composite
def factorised(draw: st.DrawFn, size: int) -> Axis:
    """A product of that size, its factors in any order."""
    found = []
    while size > 1:
        found.append(draw(st.sampled_from([k for k in range(2, size + 1) if size % k == 0])))
        size //= found[-1]
    return axis(*(Atom(each, clip=draw(st.booleans()), strength=draw(st.integers(0, 2))) for each in found))


@st.composite
def equal_sizes(draw: st.DrawFn) -> tuple[Axis, Axis]:
    """Two axes of one size: concatenations of products whose borders may or may not fall together."""
    sizes = draw(st.lists(st.sampled_from([1, 2, 4, 6, 12]), min_size=1, max_size=3))
    one = concat(draw(factorised(size)) for size in sizes)
    other = draw(factorised(sum(sizes))) if draw(st.booleans()) else concat(draw(factorised(size)) for size in sizes)
    return one, other


def shape(axis: Axis) -> Any:
    """An axis up to the names of its atoms."""
    return tuple(tuple(f.size if isinstance(f, Atom) else shape(f) for f in segment) for segment in axis.segments)


def solved(one: Axis, other: Axis) -> Substitution | None:
    try:
        return NOTHING.identify(one, other)
    except Conflict:
        return None


@given(equal_sizes())
def test_identified_axes_are_one_and_keep_their_size(pair: tuple[Axis, Axis]) -> None:
    found = solved(*pair)
    if found is not None:
        assert found.resolve(pair[0]) == found.resolve(pair[1])
        assert found.resolve(pair[0]).size == pair[0].size == pair[1].size


@given(equal_sizes())
def test_identifying_is_symmetric_up_to_names(pair: tuple[Axis, Axis]) -> None:
    one, other = solved(*pair), solved(*reversed(pair))
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert shape(one.resolve(pair[0])) == shape(other.resolve(pair[0]))


@given(equal_sizes())
def test_identifying_twice_adds_nothing(pair: tuple[Axis, Axis]) -> None:
    found = solved(*pair)
    if found is not None:
        assert found.identify(*pair) is found
        assert found.identify(*reversed(pair)) is found


@given(equal_sizes(), axes)
def test_resolving_twice_adds_nothing(pair: tuple[Axis, Axis], whole: Axis) -> None:
    found = solved(*pair)
    if found is not None:
        for each in (*pair, product([whole, pair[0]]), concat([pair[1], whole])):
            assert found.resolve(found.resolve(each)) == found.resolve(each)
            assert found.resolve(each).size == each.size


@given(st.lists(axes, max_size=4), st.lists(axes, max_size=4))
def test_products_and_sums_are_flat_and_associative(one: list[Axis], two: list[Axis]) -> None:
    assert product([product(one), product(two)]) == product([*one, *two])
    assert product([UNIT, *one, UNIT]) == product(one)
    assert concat([concat(one), concat(two)]) == concat([*one, *two])
    assert product(product(one).factors) == product(one)
    assert product(one).size == sympy.prod(each.size for each in one)
    assert concat(one).size == sum(each.size for each in one)


@given(axes)
def test_an_axis_is_the_sum_of_its_segments(whole: Axis) -> None:
    assert concat(subaxis([segment]) for segment in whole.segments) == whole
    assert subaxis(whole.segments) == whole
    assert sum(segment_size(segment) for segment in whole.segments) == whole.size


@given(st.lists(factorised(12), max_size=1), st.lists(lone, min_size=1, max_size=4), st.integers(1, 60))
def test_take_splits_exactly(first: list[Axis], others: list[Axis], size: int) -> None:
    factors = product([*first, *others]).factors
    try:
        found, taken, rest = NOTHING.take(factors, size)
    except Conflict:
        return
    assert taken.size == size
    assert found.resolve(product([taken, *rest])) == found.resolve(product(factors))


@given(runs, axes, st.lists(axes, max_size=2))
def test_a_merge_is_a_substitution(run: Axis, before: Axis, after: list[Axis]) -> None:
    """The whole run becomes one atom, in a sum, in a product and deeper; put back, the axis is as it was."""
    groups, beside = Atom(run.size, "n"), concat([before, run])
    for whole in (concat([beside, *after]), product([before, run, *after]), product([before, beside, *after])):
        merged = replace(whole, run, groups)
        assert groups in merged.atoms
        assert not run.atoms & merged.atoms
        assert NOTHING.bind(groups, run).resolve(merged) == whole


H1, H2, W1, W2, S = map(Atom, (2, 3, 4, 5, 7))


@given(st.permutations([H1, H2, W1, W2, S]), st.lists(st.integers(0, 5), max_size=3))
def test_a_run_is_gathered_where_its_first_factor_is(factors: list[Atom], cuts: list[int]) -> None:
    """In whatever order it lies, over whatever dimensions; nothing is lost, and doing it again adds nothing."""
    borders = [0, *sorted(cuts), 5]
    laid = tuple(axis(*factors[one:two]) for one, two in itertools.pairwise(borders))
    run = axis(H1, W1)
    found = gathered(laid, run)
    others = [f for f in factors if f not in (W1, H1)]
    assert [f for each in found for f in each.factors if f not in (W1, H1)] == others
    flat = [f for each in found for f in each.factors]
    assert flat[flat.index(H1) + 1] is W1
    assert [H1 in each.atoms for each in found] == [H1 in each.atoms for each in laid]
    assert gathered(found, run) == found


def test_runs_are_gathered_in_sums_and_one_by_one() -> None:
    run, rows = axis(H1, W1), axis(H1, H2, W1, W2)
    inside = concat([UNIT, rows])
    assert gathered((axis(S), inside), run) == (axis(S), concat([UNIT, axis(H1, W1, H2, W2)]))
    assert gathered((product([S, inside]),), run) == (product([S, concat([UNIT, axis(H1, W1, H2, W2)])]),)
    assert gathered((rows, rows), run) == (axis(H1, W1, H2, W2),) * 2  # pairs: each on its own dimension
    assert gathered((axis(H1), axis(W1), axis(H1), axis(W1)), run) == (run, UNIT, run, UNIT)


def test_what_holds_a_part_of_a_run_is_left_as_it_is() -> None:
    run = axis(H1, W1)
    for part in ((axis(H1, S),), (concat([UNIT, axis(H1)]), axis(W1)), (concat([axis(H1), axis(W1)]),)):
        assert gathered(part, run) == part


@given(axes, runs)
def test_what_is_not_there_is_not_replaced(whole: Axis, run: Axis) -> None:
    assert replace(whole, run, Atom(run.size)) == whole
    assert find(whole, run) is None


def test_every_occurrence_is_replaced() -> None:
    t, h, n = Atom(3), Atom(4), Atom(12)
    run = axis(t, h)
    twice = concat([UNIT, run, UNIT, run])
    assert replace(twice, run, n) == concat([UNIT, axis(n), UNIT, axis(n)])
    assert replace(axis(t, h, t, h), run, n) == axis(n, n)
    assert replace(axis(h, t), run, n) == axis(h, t)


@given(sums, st.integers(0, 60))
def test_a_border_is_a_place(whole: Axis, offset: int) -> None:
    place = border(whole, offset)
    assert (place is None) == (offset > int(whole.size))
    if place is not None:
        number, inside = place
        assert sum(segment_size(segment) for segment in whole.segments[:number]) + inside == offset
        assert number == len(whole.segments) or inside < segment_size(whole.segments[number])


@pytest.mark.parametrize(
    ("keep", "other", "stays"),
    [
        (Atom(6), Atom(6, clip=True), 1),
        (Atom(6, strength=BORN), Atom(6, clip=True, strength=CONSTANT), 0),
        (Atom(6, strength=CONSTANT), Atom(6, strength=BORN), 1),
        (Atom(6, strength=BORN), Atom(6, strength=CONSTANT), 0),
        (Atom(6), Atom(6), 0),
    ],
)
def test_of_two_atoms_the_firmer_stays_then_the_clips_then_the_first(keep: Atom, other: Atom, stays: int) -> None:
    found = NOTHING.identify(axis(keep), axis(other))
    assert found.resolve(axis(keep)).lone is (keep, other)[stays]


def test_an_atom_gives_way_to_what_it_is_made_of() -> None:
    whole, t, h = Atom(13, clip=True, strength=BORN), Atom(3, clip=True), Atom(4, clip=True)
    tokens = concat([UNIT, axis(t, h)])
    assert NOTHING.identify(axis(whole), tokens).resolve(axis(whole)) == tokens
    assert NOTHING.identify(tokens, axis(whole)).resolve(axis(whole)) == tokens
    assert repr(product([axis(Atom(2)), tokens])) == "2·(1 + 3·4)"


@pytest.mark.parametrize("clip", [True, False])
def test_a_constant_never_names_what_varies(clip: bool) -> None:
    """Samples behind an operator without a rule meet a table that is as long as there are samples."""
    table, samples = axis(Atom(6, strength=CONSTANT)), axis(Atom(6, clip=clip))
    for one, other in ((table, samples), (samples, table)):
        assert NOTHING.identify(one, other).resolve(table) == samples


def test_what_a_dimension_of_the_clip_is_told_to_be_is_of_the_clip() -> None:
    """A batch of clips met by a mask of samples times frames."""
    batch, samples, frames = Atom(6, "b", True, BORN, Role.SAMPLE), Atom(2), Atom(3)
    solved = NOTHING.identify(axis(samples, frames), axis(batch)).resolve(axis(batch))
    assert [(atom.size, atom.clip, atom.role) for atom in solved.factors if isinstance(atom, Atom)] == [
        (2, True, Role.FOLDED),
        (3, True, Role.FOLDED),
    ]


@pytest.mark.parametrize(
    ("keep", "other", "reason"),
    [
        (axis(Atom(6)), axis(Atom(7)), "6 has size 6, 7 has size 7"),
        (axis(Atom(3), Atom(4)), axis(Atom(4), Atom(3)), "4 of size 4 has no part of size 3"),
        (concat([axis(Atom(2), Atom(3)), UNIT]), concat([UNIT, axis(Atom(3), Atom(2))]), "joined at different places"),
        (
            concat([axis(Atom(s)), UNIT]),
            concat([axis(Atom(4)), axis(Atom(s - 3))]),
            "which is larger, s or 4, is not known",
        ),
    ],
)
def test_conflicts_say_why(keep: Axis, other: Axis, reason: str) -> None:
    with pytest.raises(Conflict, match=reason):
        NOTHING.identify(keep, other)


def test_no_atom_contains_itself() -> None:
    atom = Atom(6, "t", clip=True)
    with pytest.raises(Conflict, match="t would contain itself: t·1"):
        NOTHING.bind(atom, axis(atom, Atom(1)))


def test_too_much_cannot_be_taken() -> None:
    with pytest.raises(Conflict, match="nothing of size 2 is left"):
        NOTHING.take((Atom(3),), 6)


@pytest.mark.parametrize(
    ("size", "by", "quotient"),
    [
        (12, 4, 3),
        (12, 5, None),
        (5, 0, None),
        (6 * s, 3, 2 * s),
        (6 * s, s, 6),
        (s, 2, None),
        (4, s, None),
        (s * (s + 1), s + 1, s),
        ((s + 1) ** 2 - 1, s, s + 2),
        (s * s + s, s - 1, None),
    ],
)
def test_divides_exactly_or_not_at_all(size: Size, by: Size, quotient: Size | None) -> None:
    assert divide(size, by) == quotient


def test_sizes_compare_in_one_normal_form() -> None:
    assert simplify(s * (s + 1)) == simplify(s**2 + s)
    assert isinstance(simplify((s + 4) - s), int)
    assert isinstance(product([axis(Atom(s)), axis(Atom(3))]).size, sympy.Expr)
    assert concat([axis(Atom(s)), UNIT]).size == s + 1


def test_symbolic_sizes_split_like_numbers() -> None:
    tokens, t, h = Atom(12 * s, clip=True), Atom(3 * s), Atom(4)
    found, taken, rest = NOTHING.take((tokens,), 3 * s)
    assert taken.size == 3 * s
    assert [each.size for each in rest] == [4]
    found = found.identify(axis(tokens), axis(t, h))
    assert shape(found.resolve(axis(tokens))) == ((3 * s, 4),)
    assert found.resolve(axis(tokens)) == found.resolve(axis(t, h))
    pooled = NOTHING.identify(axis(Atom(s + 1)), concat([UNIT, axis(Atom(s))]))
    assert len(pooled.bindings) == 1
