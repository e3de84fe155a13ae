"""How axes are held when a run is grouped, and where resolutions meet."""

from __future__ import annotations

from tests.passes.grouped import RUN, B, C, H, T, resolution
from tldr_compile.passes.axes import UNIT, Atom, axis, product
from tldr_compile.passes.axes.algebra import concat
from tldr_compile.passes.plan.resolution import at, holds, meet

FIRST = resolution(0)
N = FIRST.axis


def test_a_run_becomes_its_groups_wherever_it_is_held_whole() -> None:
    assert at((axis(B), RUN, axis(C)), [FIRST]) == (axis(B), N, axis(C))
    assert at((axis(B), concat([UNIT, RUN])), [FIRST]) == (axis(B), concat([UNIT, N]))
    assert at((product([B, RUN, C]),), [FIRST]) == (product([B, N, C]),)
    assert at((RUN, RUN), [FIRST]) == (N, N)


def test_a_run_over_several_dimensions_is_held_on_the_first() -> None:
    assert at((axis(B), axis(T), axis(H), axis(C)), [FIRST]) == (axis(B), N, UNIT, axis(C))
    assert at((axis(B, T), axis(H, C)), [FIRST]) == (product([B, N]), axis(C))
    assert at((axis(H), axis(T)), [FIRST]) == (UNIT, N)  # the groups go with the run's first factor


def test_what_holds_a_part_is_left_as_it_is() -> None:
    part = (axis(B), axis(T), axis(C))
    assert at(part, [FIRST]) == part
    assert not holds(part, RUN)
    assert not holds((concat([UNIT, axis(T)]), axis(H)), RUN)  # a part of it lies in a sum
    assert holds((axis(B), axis(T), axis(H)), RUN)


def test_resolutions_meet_where_one_groups_what_the_other_groups_or_rests_on() -> None:
    by_time, by_place = resolution(1, run=axis(H), batch=axis(B, T)), resolution(2, run=axis(T), batch=axis(B))
    assert FIRST.meets(by_time)
    assert by_time.meets(by_place)
    assert by_place.meets(by_time)
    assert not by_place.meets(resolution(3, run=axis(C), batch=axis(B)))


def test_values_meet_at_the_coarsest_of_a_chain_or_at_what_they_share() -> None:
    second, third = (resolution(index, 2, parent=FIRST) for index in (1, 2))
    assert meet([FIRST, second]) is second
    assert meet([second, third]) is FIRST
    assert meet([second, resolution(3)]) is None
    assert meet([second, resolution(3), second]) is None
    assert meet([]) is None


def test_a_chain_begins_with_the_coarsest() -> None:
    second = resolution(1, 2, parent=FIRST)
    assert second.chain == (second, FIRST)
    assert second.groups.size == Atom(12 - 4 - 2).size
