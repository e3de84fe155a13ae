"""Rows, one after the other until the time is over; each is kept and shown as soon as it is there."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch

from benchmarks import timing
from benchmarks.gpu.load import Load
from benchmarks.gpu.workers import Workers

Row: TypeAlias = dict[str, Any]
Jobs: TypeAlias = "Iterator[tuple[str, Callable[[], Row]]]"
"""The name of a row, and what measures it. What a job raises is the row's error, and the next job runs."""

LEFT_OUT = "left_out"
TEXT = 500  # characters of an error, and of what is shown of a row


@dataclass(frozen=True)
class Setup:
    """What every part is given; `dry` asks for the smallest sizes, on a CPU, and `loads` are sorted by importance."""

    device: torch.device
    dry: bool
    deadline: float  # of `time.monotonic`
    loads: tuple[Load, ...] = ()
    workers: Workers = field(default_factory=lambda: Workers(torch.device("cpu")))

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


Part: TypeAlias = Callable[[Setup], Jobs]


def run(
    parts: Mapping[str, Part],
    setup: Setup,
    folder: Path,
    until: Mapping[str, float] | None = None,
    join: Mapping[str, Any] | None = None,
) -> list[Row]:
    """All rows of all parts, as far as the time goes; `gpu-<card>.json` in the folder holds those that are done.

    `until` tells after which fraction of the time a part makes room for the next ones, if it is not the last. `join` is
    the record of an earlier run, into which the rows are written.
    """
    machine = timing.machine(setup.device)
    record: dict[str, Any] = {"machine": machine, "versions": versions(), "dry": setup.dry}
    rows: list[Row] = []
    begin, all_time = time.monotonic(), setup.left()
    fractions = {**dict.fromkeys(parts, 1.0), **(until or {}), list(parts)[-1]: 1.0}
    for part, jobs_of in parts.items():
        own = replace(setup, deadline=setup.deadline - (1 - fractions[part]) * all_time)
        jobs = jobs_of(own)
        while (row := _next(jobs, own)) is not None:
            rows.append({"part": part, **row, "at": round(time.monotonic() - begin, 1)})
            done = {**record, "rows": rows}
            timing.write(record_name(setup.device), done if join is None else joined(join, done), folder)
            print(line(rows[-1]), flush=True)
            if LEFT_OUT in row:
                break
    return rows


def joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The first record with the rows of the second: in place of those of their name that are no better."""
    rows = {row["name"]: row for row in first["rows"]}
    for row in second["rows"]:
        old = rows.get(row["name"])
        if old is None or _fine(row) or not _fine(old):
            rows[row["name"]] = row
    told = {
        "with": second["machine"] | second["versions"],
        "rows": [row["name"] for row in second["rows"] if rows[row["name"]] is row],
    }
    earlier = [each for each in first.get("joined", ()) if each["with"] != told["with"]]
    return {**first, "joined": [*earlier, told], "rows": list(rows.values())}


def record_name(device: torch.device) -> str:
    """`gpu-` and what a card is called: the first word of its name that has a digit."""
    words = re.split(r"[\s-]", torch.cuda.get_device_name(device)) if device.type == "cuda" else ()
    return "gpu-" + next((word.lower() for word in words if re.search(r"\d", word)), device.type)


def failed(row: Row) -> bool:
    """Whether the row raised, or found a result beyond its bound."""
    return "error" in row or not row.get("ok", True)


def line(row: Row) -> str:
    """A row in one line: when it was done, what it is, and its plain values."""
    values = " ".join(f"{name}={_short(value)}" for name, value in row.items() if _is_plain(name, value))
    return f"{row['at']:6.1f} s  {'FAILED ' if failed(row) else ''}{row['part']}: {row['name']}  {values}"[:TEXT]


def versions() -> dict[str, str]:
    """Of what makes kernels, and what calls them."""
    found = {name: version(name) for name in ("torch", "triton", "transformers") if find_spec(name)}
    cudnn = torch.backends.cudnn.version()
    return found if cudnn is None else {**found, "cudnn": str(cudnn)}


def _next(jobs: Jobs, setup: Setup) -> Row | None:
    """The next row, or that there is no time for it; None after the last. What raises is told in its row."""
    name = "the part itself"
    try:
        name, measure = next(jobs)
        return {
            "name": name,
            **(measure() if setup.left() > 0 else {LEFT_OUT: "no time is left for this and what follows"}),
        }
    except StopIteration:
        return None
    except Exception as error:  # noqa: BLE001 - one row that cannot be had must not cost the others
        return {"name": name, "error": f"{type(error).__name__}: {error}"[:TEXT]}


def _is_plain(name: str, value: Any) -> bool:
    return name not in ("at", "part", "name") and isinstance(value, (bool, int, float, str))


def _fine(row: Row) -> bool:
    return not failed(row) and LEFT_OUT not in row


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else " ".join(str(value).split())
