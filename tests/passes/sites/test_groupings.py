"""The parts that factors of a stream have in a grouping, and what coarser ones are."""

from __future__ import annotations

from tldr_compile.passes.axes import UNIT, Atom, Role, axis
from tldr_compile.passes.sites import Grouping

B, T, H1, H2, W1, W2 = (
    Atom(size, label, clip=True, role=role)
    for size, label, role in (
        (2, "b", Role.SAMPLE),
        (3, "t", Role.TIME),
        (4, "h1", Role.HEIGHT),
        (2, "h2", Role.HEIGHT),
        (5, "w1", Role.WIDTH),
        (2, "w2", Role.WIDTH),
    )
)
PLACES = axis(H1, H2, W1, W2)
FINEST = Grouping(PLACES, axis(B, T))


def test_frames_that_are_not_attended_share_one() -> None:
    found = FINEST.joining({T}, PLACES.atoms)
    assert found == Grouping(PLACES, axis(B), shared=axis(T))
    assert str(found) == "run h1·h2·w1·w2; apart b; shared t"


def test_places_that_are_attended_are_carried() -> None:
    found = FINEST.joining({H2, W2}, PLACES.atoms)
    assert found == Grouping(axis(H1, W1), axis(B, T), carried=axis(H2, W2))
    assert found is not None
    assert found.joining({T}, PLACES.atoms) == Grouping(axis(H1, W1), axis(B), axis(T), axis(H2, W2))
    assert found.joined == axis(H2, W2)


def test_rows_and_columns_are_never_grouped_as_wholes_and_windows_never_alike() -> None:
    assert FINEST.joining({H1, H2}, PLACES.atoms) is None
    assert FINEST.joining(PLACES.atoms, PLACES.atoms) is None
    windows = Grouping(axis(H2, W2), axis(B, H1, W1))
    assert windows.joining({H1, W1}, {H2, W2}) is None
    assert windows.joining({H1, W1}, {H1, H2, W1, W2}) is None


def test_a_part_of_the_run_may_be_grouped_for_each_value_of_the_rest() -> None:
    joint = Grouping(axis(T, H1, W1), axis(B))
    assert joint.within({H1, W1}) == Grouping(axis(H1, W1), axis(B, T))
    assert joint.within({T}) is None
    assert joint.joined == UNIT
