"""Thousands of random transformers try to break the laws; every failure is logged with a minimal reproduction.

python -m benchmarks.fuzz --count 10000 [--seed 0] [--name fuzz]
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import timing
from tests.generated.check import check
from tests.generated.model import Recipe
from tests.generated.strategy import options, recipes


def attempt(recipe: Recipe, chosen: dict[str, Any]) -> str | None:
    """Why the laws do not hold, or None."""
    try:
        check(recipe, chosen)
    except Exception as finding:  # noqa: BLE001 - whatever is raised is what is looked for
        return f"{type(finding).__name__}: {finding}"
    return None


def minimal(recipe: Recipe, chosen: dict[str, Any]) -> Recipe:
    """The recipe with every field put back to its default that the failure does not need."""
    default = Recipe()
    for name in Recipe.__dataclass_fields__:
        simpler = Recipe(**{**vars(recipe), name: getattr(default, name)})
        if simpler != recipe and attempt(simpler, chosen) is not None:
            recipe = simpler
    return recipe


def run(count: int, seed: int) -> dict[str, Any]:
    """Draw and check; the sums by verdict, and the failures."""
    verdicts: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("generated models", total=count)

        @seeded(seed)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(recipes, options())
        def draw(recipe: Recipe, chosen: dict[str, Any]) -> None:
            try:
                verdicts[check(recipe, chosen).partition(":")[0]] += 1
            except Exception as finding:  # noqa: BLE001 - whatever is raised is what is looked for
                verdicts["failed"] += 1
                simple = minimal(recipe, chosen)
                failures.append(
                    {"recipe": str(simple), "options": chosen, "finding": f"{type(finding).__name__}: {finding}"}
                )
                bar.console.print(f"FAILED check({simple}, {chosen})\n  {failures[-1]['finding']}")
            bar.advance(task)

        draw()
    return {"count": count, "seed": seed, "verdicts": dict(verdicts), "failures": failures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--name", default="fuzz", help="file name of the JSON in benchmarks/results, without its ending"
    )
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    found = run(chosen.count, chosen.seed)
    found["seconds"] = time.perf_counter() - start
    path = timing.write(chosen.name, {**timing.machine(torch.device("cpu")), **found})
    print(f"{found['verdicts']} in {found['seconds']:.0f} s; {path}")
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
