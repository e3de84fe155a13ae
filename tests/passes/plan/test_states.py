"""The way of a value from the resolutions that it has to those that are wanted, and what is known of its axes."""

from __future__ import annotations

from tests.passes.grouped import RUN, B, C, H, T, resolution
from tldr_compile.passes.axes import UNIT, Value, axis, product
from tldr_compile.passes.axes.algebra import concat
from tldr_compile.passes.plan.plan import Conversion, How
from tldr_compile.passes.plan.states import bring, doubled, how_down, of_rows, told_apart, twice

FIRST, OTHER = resolution(0), resolution(1)
SECOND = resolution(2, 2, parent=FIRST)
STREAM = (axis(B), RUN, axis(C))


def test_a_value_goes_down_a_chain_from_where_it_is() -> None:
    assert list(bring(STREAM, (), (SECOND,), How.MERGE)) == [Conversion(0, RUN, None, SECOND, How.MERGE)]
    assert list(bring(STREAM, (FIRST,), (SECOND,), How.PICK, 3)) == [Conversion(3, RUN, FIRST, SECOND, How.PICK)]
    assert list(bring(STREAM, (SECOND,), (SECOND,), How.MERGE)) == []


def test_from_another_grouping_it_goes_over_full_length() -> None:
    assert list(bring(STREAM, (OTHER,), (SECOND,), How.MERGE)) == [
        Conversion(0, RUN, OTHER, None, How.RESTORE),
        Conversion(0, RUN, None, SECOND, How.MERGE),
    ]
    back, down = bring(STREAM, (SECOND,), (FIRST,), How.MERGE)  # nothing goes up by one step
    assert (back.how, down.source) == (How.RESTORE, None)


def test_what_does_not_hold_the_run_stays() -> None:
    assert list(bring((axis(B), axis(C)), (), (FIRST,), How.MERGE)) == []


def test_pixels_are_merged_and_everything_else_is_picked() -> None:
    assert how_down(Value(STREAM, True, True, True)) is How.MERGE
    assert how_down(Value(STREAM, True, True, False)) is How.PICK
    assert how_down(Value(STREAM, True, False, True)) is How.PICK


def test_rows_of_a_site_come_to_where_its_merge_starts() -> None:
    by_time = resolution(3, run=axis(T), batch=axis(B))
    assert list(of_rows([], SECOND, FIRST)) == [Conversion(0, RUN, None, FIRST, How.MERGE)]
    assert list(of_rows([FIRST], SECOND, FIRST)) == []
    assert list(of_rows([FIRST], OTHER, None)) == [Conversion(0, RUN, FIRST, None, How.RESTORE)]
    assert list(of_rows([by_time], FIRST, None)) == [Conversion(0, axis(T), by_time, None, How.RESTORE)]


def test_every_token_has_a_value_of_what_is_no_part_of_a_sum_beside_it() -> None:
    assert told_apart(STREAM, RUN) == {B, T, H, C}
    both = concat([axis(B), axis(C)])
    assert told_apart((both, RUN), RUN) == {both, T, H}


def test_pairs_on_one_axis_are_told_from_pairs_on_two() -> None:
    assert twice((axis(B), product([RUN, RUN])), RUN)
    assert not twice((axis(B), RUN, RUN), RUN)


def test_pairs_of_samples_are_told_unless_one_is_summed_over() -> None:
    pairs = (axis(B), axis(B), RUN)
    assert doubled(pairs, FIRST, (2,))
    assert not doubled(pairs, FIRST, (1, 2))
    assert not doubled((axis(B), UNIT, RUN), FIRST, (2,))
