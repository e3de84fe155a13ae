"""A schedule becomes one entry for every site, and an entry a number of tokens."""

from __future__ import annotations

from fractions import Fraction

import pytest
import sympy
from torch import fx

from tldr_compile.passes.axes import UNIT
from tldr_compile.passes.capture import Attention
from tldr_compile.passes.errors import ScheduleError
from tldr_compile.passes.plan.schedule import bind_schedule, in_blocks, removed
from tldr_compile.passes.sites import RefusedSite, Site
from tldr_compile.passes.sites.find import Stream
from tldr_compile.passes.sites.groupings import Grouping

NODE = fx.Graph().placeholder("attention")
PLACE = UNIT, UNIT, UNIT, "joint space-time"
THREE = (
    Site(0, Attention(NODE, NODE, NODE), *PLACE, Stream(NODE, NODE, Grouping(UNIT, UNIT))),
    RefusedSite(1, Attention(NODE, NODE, NODE), *PLACE, "it is causal"),
    Site(2, Attention(NODE, NODE, NODE), *PLACE, Stream(NODE, NODE, Grouping(UNIT, UNIT))),
)


def test_a_sequence_goes_by_execution_order_and_what_is_missing_is_zero() -> None:
    assert bind_schedule([5], THREE) == (5, 0, 0)
    assert bind_schedule([5, 0, 0.5], THREE) == (5, 0, 0.5)
    assert bind_schedule([5, 0, 3, 0, 0], THREE) == (5, 0, 3)  # zeros beyond the last site ask for nothing


def test_one_fraction_and_the_default_pass_over_sites_that_cannot_merge() -> None:
    assert bind_schedule(0.25, THREE) == (0.25, 0, 0.25)
    assert bind_schedule([7, 8, 9], THREE, default=True) == (7, 0, 8)


def test_what_cannot_be_bound_says_why() -> None:
    with pytest.raises(ScheduleError, match=r"site 1 \(attention, tokens 1\) cannot merge: it is causal. .* \[0, 2\]"):
        bind_schedule([5, 5], THREE)
    with pytest.raises(ScheduleError, match="has 4 entries, but the graph has 3 attention"):
        bind_schedule([5, 0, 3, 1], THREE)


@pytest.mark.parametrize(
    ("entry", "tokens", "expected"),
    [(3, 10, 3), (7, 10, 5), (7, 11, 5), (0.29, 100, 29), (0.25, 10, 2), (0.9, 11, 5), (0.0, 10, 0)],
)
def test_fractions_are_exact_and_never_more_than_half_goes(entry: int | float, tokens: int, expected: int) -> None:
    """`0.29 * 100` is below 29 in floating point."""
    assert removed(entry, tokens) == expected


def test_numbers_of_tokens_become_numbers_of_blocks() -> None:
    assert in_blocks(8, 4, THREE[0]) == 2
    assert in_blocks(7, 1, THREE[0]) == 7
    assert in_blocks(0.3, 4, THREE[0]) == 0.3
    with pytest.raises(ScheduleError, match=r"schedule\[2\] = 6, but site 2 .* in blocks of 4: give a multiple of 4"):
        in_blocks(6, 4, THREE[2])


def test_what_was_rounded_down_before_is_added() -> None:
    assert removed(0.3, 3) == 0
    assert removed(0.3, 3, Fraction("0.9")) == 1


@pytest.mark.parametrize("entry", [3, 7, 0.29, 0.9])
def test_of_a_size_that_is_left_open_as_many_go_as_of_each_number(entry: int | float) -> None:
    tokens = sympy.Symbol("n", integer=True, positive=True)
    formula = removed(entry, tokens)
    for number in (4, 10, 11, 100):
        assert sympy.sympify(formula).subs(tokens, number) == removed(entry, number)
