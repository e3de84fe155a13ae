"""What a user gets: whole models beside what they compete with, in bfloat16 on a GPU, in alternation."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from benchmarks.gpu.driver import Jobs, Setup
from benchmarks.gpu.load import Load
from benchmarks.gpu.workers import Row, Worker, WorkerError, Workers, difference
from benchmarks.speed import OURS
from benchmarks.timing import Spread, ratio

ROUNDS = 7
LEAST = 0.02  # seconds of a round
TIMING = 5.0  # of all rows of a load
MOST = 0.75  # of a phase's rows
STOPPED = "stopped: no time was left"
PATIENCE = 1.5  # times what most rows took, for which the others are waited for in any case


def phases(loads: Sequence[Load]) -> Iterator[list[Load]]:
    """What compiles at the same time; then nothing does, and each is timed."""
    for _, together in groupby(loads, key=lambda load: (load.batch, load.graphs)):
        yield list(together)


def begin(setup: Setup) -> None:
    """Let the first phase compile."""
    for load in next(phases(setup.loads)):
        setup.workers.begin(load)


def models(setup: Setup) -> Jobs:
    """The first batch of every model."""
    yield from _measured(list(phases(setup.loads))[:1], setup)


def batches(setup: Setup) -> Jobs:
    """The other ones."""
    yield from _measured(list(phases(setup.loads))[1:], setup)


def _measured(found: Sequence[list[Load]], setup: Setup) -> Jobs:
    for following, phase in zip(reversed(range(len(found))), found, strict=True):
        for load in phase:
            setup.workers.begin(load)
        yield f"{phase[0].setting_name}: first calls", partial(first_calls, phase, setup, following)
        for load in phase:
            yield load.name, partial(timed, load, setup, rounds=2 if setup.dry else ROUNDS)


def first_calls(phase: Sequence[Load], setup: Setup, following: int) -> dict[str, Any]:
    """Seconds of every row's first call, or why it has none.

    What is not ready when only the timing fits is stopped: it would disturb that. The slowest few are stopped already
    when each of the phases that follow has only as long left as most rows of this one took.
    """
    begin = time.monotonic()
    told: dict[tuple[Load, str], Any] = {(load, row): None for load in phase for row in load.rows}
    most: float | None = None
    while pending := [key for key, found in told.items() if found is None]:
        for load, row in pending:
            told[load, row] = _first_call(setup.workers.of(load, row), load)
        taken, left = time.monotonic() - begin, setup.left() - TIMING * len(phase)
        if most is None and sum(found is not None for found in told.values()) >= MOST * len(told):
            most = taken
        if most is not None and taken > PATIENCE * most:
            left -= following * most
        if left <= 0:
            for load, row in pending:
                if told[load, row] is None:
                    setup.workers.of(load, row).stop()
                    told[load, row] = STOPPED
        time.sleep(0.02)
    return {"first_call_seconds": {f"{load.name}, {row}": found for (load, row), found in told.items()}}


def _first_call(worker: Worker, load: Load) -> float | str | None:
    """Its seconds, why there are none, or None where it still runs."""
    if worker.stopped:
        return STOPPED
    try:
        seconds: float = worker.compiled(load, 0)["first_call"]
    except WorkerError as error:
        return str(error)
    except TimeoutError:
        return None
    return seconds


def timed(load: Load, setup: Setup, rounds: int) -> dict[str, Any]:
    """Every row in its turn, every other round backwards."""
    facts, errors = _facts(load, setup.workers)
    if not facts:
        return {"error": "; ".join(errors) or "no row was compiled in the time"}
    workers = {row: setup.workers.of(load, row) for row in facts}
    taken: dict[str, list[float]] = {row: [] for row in facts}
    once = {row: worker.ask(Row.seconds, load, 1, wait=60) for row, worker in workers.items()}
    order = list(facts)
    for _ in range(rounds):
        for row in order:
            count = math.ceil(LEAST / once[row])
            taken[row].append(workers[row].ask(Row.seconds, load, count, wait=60))
        order.reverse()
    for worker in workers.values():
        worker.ask(Row.release, wait=60)
    outputs = {row: fact.pop("output") for row, fact in facts.items()}
    first = next(iter(outputs.values()))
    return {
        "batch": load.batch,
        "graphs": load.graphs,
        "fused_attention_alone": dict(load.attention),
        "weight_bytes": workers[order[0]].ask(Row.weight_bytes, wait=60),
        **({"error": "; ".join(errors)} if errors else {}),
        "rows": [
            {
                "row": row,
                **facts[row],
                "latency": Spread.of(seconds),
                "clips_per_second": load.batch / Spread.of(seconds).median,
                "ours_over_this": ratio(taken[OURS], seconds) if OURS in taken else None,
                "this_over_ours": ratio(seconds, taken[OURS]) if OURS in taken else None,
                "difference_to_first_row": difference(outputs[row], first),
            }
            for row, seconds in taken.items()
        ],
    }


def _facts(load: Load, workers: Workers) -> tuple[dict[str, dict[str, Any]], list[str]]:
    facts, errors = {}, []
    for row in load.rows:
        try:
            facts[row] = dict(workers.of(load, row).compiled(load, 0))
        except WorkerError as error:
            errors.append(f"{row}: {error}")
        except TimeoutError:
            continue  # told with the first calls
    return facts, errors


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per row of a load; latencies in ms and ratios are min / median / max."""
    lines = [f"{'load':<20} {'row':<18} {'ms':>24} {'clips/s':>8} {'this ÷ ours':>21} {'MB':>7} attention first"]
    for load in rows:
        if "rows" not in load:
            continue
        fused = next(iter(load["fused_attention_alone"]))
        for row in load["rows"]:
            over = row["this_over_ours"]
            lines.append(
                f"{load['name']:<20} {row['row']:<18} {_spread(row['latency'], 1000, 2):>24} "
                f"{row['clips_per_second']:>8.1f} {_spread(over, 1, 3) if over else '-':>21} "
                f"{row['peak_bytes'] / 1e6:>7.0f} {fused}"
            )
    return "\n".join(lines)


def _spread(spread: Sequence[float], scale: float, digits: int) -> str:
    return " / ".join(f"{scale * value:.{digits}f}" for value in spread)
