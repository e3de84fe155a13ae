"""Where the pass finds full-size models to be mergeable, as a Markdown table; nothing is run, only traced.

    python benchmarks/table.py [--write docs/models.md] [--models umt-b clip-b]

`--write` replaces what stands between two lines `<!-- models -->`, and keeps the reports.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).parent.parent)

from rich.progress import track

import tldr_compile
from benchmarks import timing
from benchmarks.models import MODELS, Spec

SHOWN = ("umt-b", "videomae-b", "vivit-b", "clip-b", "vjepa2-l", "timesformer-b")
CLIPS = 2  # so that the batch has a name
MARKER = "<!-- models -->"
HEAD = (
    "| model | sites (merged) | tokens of a site, per batch of | tokens | GFLOPs of two clips | restored before |\n"
    "| --- | --- | --- | --- | --- | --- |"
)


def facts(spec: Spec) -> dict[str, Any]:
    """The pass's report on one model, as plain data."""
    report = tldr_compile.explain(spec.build(), spec.inputs(CLIPS), schedule=list(spec.schedule))
    return report.to_dict()


def line(title: str, report: Mapping[str, Any]) -> str:
    """One model's line of the table."""
    sites = report["sites"]
    merged = [site for site in sites if site["tokens_out"] < site["tokens_in"]]
    kinds = dict.fromkeys(f"`{site['tokens']}` per `{site['batch']}`" for site in sites)
    tokens = f"{merged[0]['tokens_in']} → {merged[-1]['tokens_out']}" if merged else "-"
    forced = Counter(restoration["operator"] for restoration in report["restorations"])
    cells = (
        title,
        f"{len(sites)} ({len(merged)})",
        ", ".join(kinds),
        tokens,
        f"{report['gflops_before']:.0f} → {report['gflops_after']:.0f}",
        ", ".join(f"`{operator}` x {count}" for operator, count in forced.most_common()) or "-",
    )
    return f"| {' | '.join(cells)} |"


def table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The lines of all models, by their titles."""
    return "\n".join((HEAD, *(line(title, report) for title, report in reports.items())))


def replaced(text: str, block: str, marker: str = MARKER) -> str:
    """`text` with `block` between its two markers. Raises ValueError where there are not exactly two."""
    parts = text.split(marker)
    if len(parts) != 3:
        raise ValueError(f"expected two lines {marker}, found {len(parts) - 1}")
    return f"{parts[0]}{marker}\n{block}\n{marker}{parts[2]}"


def collect(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Reports by title, with a progress bar."""
    return {MODELS[name].title: facts(MODELS[name]) for name in track(list(names), "tracing", transient=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="file with two markers, for example docs/models.md")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=SHOWN)
    chosen = parser.parse_args()
    reports = collect(chosen.models)
    text = table(reports)
    print(text)
    if chosen.write is not None:
        timing.write("models", reports)
        chosen.write.write_text(replaced(chosen.write.read_text(), text))


if __name__ == "__main__":
    main()
