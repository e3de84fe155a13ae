"""Thousands of random transformers try to break the laws; every failure is logged with a minimal reproduction.

    python -m tests.conformance.fuzz --count 10000 [--first 0] [--jobs 2]

Every model is checked with eight sets of options, which is what is counted: 10000 checks are 1250 models. Model i is
the same in every run, so a run can be cut: `--first 1000 --count 800` checks models 1000 to 1099.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import timing
from tests.conformance.verdict import CRASHED, Record
from tests.conformance.walk import walk
from tests.generated.check import Traced, check_model, check_options
from tests.generated.recipe import Recipe
from tests.generated.strategy import drawn_options, drawn_recipe

CHUNK = 20
OPTIONS = 8  # sets of options that every model is merged with: a capture costs as much as four merges
SECONDS = 60  # that one model may take
CHECKED = "checked"


@dataclass(frozen=True)
class Chunk:
    """Some models in a row, for one process."""

    numbers: range
    module: str = "tests.conformance.fuzz"

    @property
    def name(self) -> str:
        return f"models {self.numbers.start} to {self.numbers.stop - 1}"


def chunks(first: int, count: int) -> list[Chunk]:
    return [Chunk(range(start, min(start + CHUNK, first + count))) for start in range(first, first + count, CHUNK)]


def examine(chunk: Chunk, say: Callable[[str], None]) -> Record:
    """The verdicts of a chunk's models by count, and the failures among them."""
    verdicts: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    for number in chunk.numbers:
        say(f"model {number}")
        random = Random(number)
        recipe, several = drawn_recipe(random), [drawn_options(random) for _ in range(OPTIONS)]
        for options, finding in findings(recipe, several):
            if finding.startswith("failed"):
                simple = minimal(recipe, options)
                failures.append({"number": number, "check": f"check({simple}, {options})", "finding": finding})
            # Names and numbers of one model would hide that two reasons are one.
            told = re.sub(r"\(.*?\)|\d+|'.*?'", "", finding)[:160] if "refused" in finding else finding[:7]
            verdicts[told.strip()] += 1
    return {"name": chunk.name, "module": chunk.module, "verdict": CHECKED, "verdicts": verdicts, "failures": failures}


def findings(recipe: Recipe, several: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
    """A verdict for each set of options; `failed: ...` where a law is broken or something else is raised."""
    try:
        traced = Traced.of(recipe)
        check_model(traced)
    except Exception as finding:  # noqa: BLE001 - whatever is raised is what is looked for
        yield from ((options, _failed(finding)) for options in several)
        return
    for options in several:
        try:
            yield options, check_options(traced, options)
        except Exception as finding:  # noqa: BLE001 - as above
            yield options, _failed(finding)


def _failed(finding: Exception) -> str:
    return f"failed: {type(finding).__name__}: {finding}"


def fails(recipe: Recipe, options: dict[str, Any]) -> bool:
    return any(finding.startswith("failed") for _, finding in findings(recipe, [options]))


def minimal(recipe: Recipe, options: dict[str, Any]) -> Recipe:
    """The recipe with every field put back to its default that the failure does not need."""
    default = Recipe()
    for name in Recipe.__dataclass_fields__:
        simpler = Recipe(**{**vars(recipe), name: getattr(default, name)})
        if simpler != recipe and fails(simpler, options):
            recipe = simpler
    return recipe


def run(first: int, count: int, jobs: int) -> dict[str, Any]:
    """Check them all, with a progress bar; the sums by verdict, and the failures."""
    verdicts: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("checks", total=count)
        fails(Recipe(), {})  # what a first capture loads, no process then loads again
        work = chunks(first, -(-count // OPTIONS))
        for record in walk(work, examine, jobs=jobs, limit=CHUNK * SECONDS):
            verdicts.update(record.get("verdicts", {}))
            new = list(_failures(record))
            verdicts[CRASHED] += record["verdict"] != CHECKED
            failures += new
            for failure in new:
                bar.console.print(f"FAILED {failure['check']}\n  {failure['finding']}", markup=False)
            bar.advance(task, sum(record.get("verdicts", {}).values()))
            if not bar.console.is_terminal:  # a log has no bar
                bar.console.print(f"{record['name']} {record['verdict']}, {len(failures)} failures so far")
    return {"first": first, "count": count, "verdicts": dict(verdicts.most_common()), "failures": failures}


def _failures(record: Record) -> Iterator[dict[str, Any]]:
    if record["verdict"] != CHECKED:
        yield {"number": record["name"], "check": record["name"], "finding": f"{CRASHED}: {record['reason']}"}
    yield from record.get("failures", ())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first model (default 0)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default 1)")
    parser.add_argument("--name", default="fuzz", help="name of the JSON in benchmarks/results (default fuzz)")
    chosen = parser.parse_args()
    start = time.perf_counter()
    found = run(chosen.first, chosen.count, chosen.jobs)
    found["seconds"] = round(time.perf_counter() - start)
    path = timing.write(chosen.name, {**timing.machine(torch.device("cpu")), **found})
    for verdict, count in found["verdicts"].items():
        print(f"{count:7d}  {verdict}")
    print(f"{len(found['failures'])} failures in {found['seconds']} s; {path}")
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
