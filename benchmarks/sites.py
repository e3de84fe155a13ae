"""Where the pass finds full-size models to be mergeable, as a Markdown table; nothing is run, only traced.

    python -m benchmarks.sites [--write docs/models.md] [--models umt-b clip-b]

`--write` replaces what stands between two lines `<!-- models -->`, and keeps the reports.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.progress import track

import tldr_compile
from benchmarks import timing
from benchmarks.models import MODELS, Spec
from benchmarks.pages import add_write, write
from tldr_compile.records.tables import grid

SHOWN = ("umt-b", "videomae-b", "vivit-b", "clip-b", "vjepa2-l", "timesformer-b")
CLIPS = 2  # so that the batch has a name
MARKER = "<!-- models -->"
HEAD = ("model", "sites (merged)", "tokens of a site, per batch of", "tokens", "GFLOPs of two clips", "restored before")


def facts(spec: Spec) -> dict[str, Any]:
    """The pass's report on one model, as plain data."""
    report = tldr_compile.explain(spec.build(), spec.inputs(CLIPS), schedule=list(spec.schedule))
    return report.to_dict()


def line(title: str, report: Mapping[str, Any]) -> tuple[str, ...]:
    """One model's line of the table."""
    sites = report["sites"]
    merged = [site for site in sites if site["tokens_out"] < site["tokens_in"]]
    kinds = dict.fromkeys(f"`{site['tokens']}` per `{site['batch']}`" for site in sites)
    forced = Counter(restoration["operator"] for restoration in report["restorations"])
    return (
        title,
        f"{len(sites)} ({len(merged)})",
        ", ".join(kinds),
        f"{merged[0]['tokens_in']} → {merged[-1]['tokens_out']}" if merged else "-",
        f"{report['gflops_before']:.0f} → {report['gflops_after']:.0f}",
        ", ".join(f"`{operator}` x {count}" for operator, count in forced.most_common()) or "-",
    )


def table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The lines of all models, by their titles."""
    return grid(HEAD, (line(title, report) for title, report in reports.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=SHOWN)
    add_write(parser, MARKER)
    chosen = parser.parse_args()
    specs = [MODELS[name] for name in chosen.models]
    reports = {spec.title: facts(spec) for spec in track(specs, "tracing", transient=True)}
    print(table(reports))
    if chosen.write is not None:
        timing.write("models", reports)
        write(chosen.write, table(reports), MARKER)


if __name__ == "__main__":
    main()
