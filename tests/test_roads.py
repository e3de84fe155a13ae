"""Every road that a merged model can take, with the real library, to the numbers that `apply` gives."""

from __future__ import annotations

import pytest

from benchmarks.roads.roads import HERE, ROADS, Road


@pytest.mark.parametrize("road", [each for each in ROADS if each.test == HERE], ids=lambda each: each.name)
def test_it_leads_to_the_same_numbers(road: Road) -> None:
    far = road.walk()
    assert tuple(far) == road.ends
    assert max(far.values()) <= road.bound
