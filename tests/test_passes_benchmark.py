"""The seconds of the passes: every phase is clocked once, and shares are of the whole compile."""

from __future__ import annotations

from benchmarks.passes import PHASES, measure, table
from tests.tiny import Tiny, clip
from tldr_compile import TokenMerging


def test_every_phase_is_clocked() -> None:
    taken = measure(Tiny().eval(), (clip(1),), TokenMerging(schedule=(3, 2)), compiled=False)
    assert set(taken) == {*PHASES, "all passes", "other"}
    assert sum(taken[name] for name in PHASES) <= taken["all passes"]
    assert taken["retrace"] > 0


def test_a_share_is_of_compiling() -> None:
    text = table({"model": {"retrace": 1.0, "all passes": 2.0, "compile": 8.0}})
    assert "| retrace | 1.00 (12.5%) |" in text
    assert "| all passes | 2.00 (25.0%) |" in text
    assert "| fuse | - |" in text
