"""Where the time of a merged model goes: kernels and their groups, of ours and of the floor, which merges for free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.gpu.driver import Jobs, Setup
from benchmarks.gpu.load import SPECS, Load
from benchmarks.gpu.profiles import Profile
from benchmarks.gpu.workers import Row
from benchmarks.speed import DENSE, FLOOR, OURS

CALLS = 5
ROWS = (DENSE, OURS, FLOOR)


def merging(setup: Setup) -> Jobs:
    """On the first load: the profile of dense, of ours and of the floor, and what is between the last two."""
    load = setup.loads[0]
    profiles: dict[str, Profile] = {}
    for row in ROWS:
        setup.workers.of(load, row).begin(load)
    for row in ROWS:
        yield f"{load.name}: {row}", partial(_profiled, load, row, setup, profiles)
    yield f"{load.name}: a merge", lambda: per_merge(profiles[OURS], profiles[FLOOR], len(SPECS[load.model].schedule))


def _profiled(load: Load, row: str, setup: Setup, profiles: dict[str, Profile]) -> Profile:
    worker = setup.workers.of(load, row)
    worker.compiled(load, setup.left())
    profiles[row] = worker.ask(Row.profile, load, 1 if setup.dry else CALLS, wait=120)
    return profiles[row]


def per_merge(ours: Profile, floor: Profile, merges: int) -> Profile:
    """What ours takes beyond the floor, which keeps as many tokens, by merge."""
    beyond = ours["seconds_per_call"] - floor["seconds_per_call"]
    names = dict.fromkeys((*ours["groups"], *floor["groups"]))
    return {
        "kernels_per_merge": (ours["kernels_per_call"] - floor["kernels_per_call"]) / merges,
        "seconds_per_merge": beyond / merges,
        "share": beyond / ours["seconds_per_call"],
        "groups_beyond_floor": {name: ours["groups"].get(name, 0) - floor["groups"].get(name, 0) for name in names},
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Kernels and groups of every profile, in microseconds per call."""
    lines: list[str] = []
    for row in rows:
        parts = row.get("groups") or row.get("groups_beyond_floor") or {}
        lines.append(
            f"{row['name']}: " + ", ".join(f"{name} {1e6 * seconds:.0f} us" for name, seconds in parts.items())
        )
        lines += [
            f"  {1e6 * top['seconds']:9.1f} us {top['per_call']:6.1f} x {top['kernel'][:90]}"
            for top in row.get("top", ())
        ]
    return "\n".join(lines)
