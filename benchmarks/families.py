"""Which tokens are grouped in each family of models, and which of its sites merge; nothing is run, only traced.

    python -m benchmarks.families [--only swin-t hiera-b] [--write docs/groupings.md]

Every site that can merge is asked for 0.3 of its tokens; what does not pay is left out. A model that needs a package
which is not installed, or cannot be traced, has a row that says so. `--write` replaces what stands between two lines
`<!-- families -->`, and keeps the reports.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.progress import track

import tldr_compile
from benchmarks import timing
from benchmarks.models import FAMILIES, Spec
from benchmarks.pages import add_write, write
from tldr_compile.errors import CaptureError
from tldr_compile.records.tables import grid

FRACTION = 0.3
CLIPS = 2  # so that the batch has a name
MARKER = "<!-- families -->"
HEAD = ("model", "GFLOPs of two clips", f"merged at {FRACTION}", "groupings", "attentions merged", "why not the others")


def facts(spec: Spec) -> dict[str, Any]:
    """The pass's report on one model, as plain data; only a `"failure"` where there is none."""
    try:
        return tldr_compile.explain(spec.build(), spec.inputs(CLIPS), schedule=FRACTION).to_dict()
    except ModuleNotFoundError as missing:
        return {"failure": f"not installed: {missing.name}"}
    except CaptureError as untraced:
        return {"failure": f"not traced: {untraced.__cause__ or untraced}"}


def line(title: str, report: Mapping[str, Any]) -> tuple[str, ...]:
    """One model's line of the table."""
    if "failure" in report:
        return title, *["-"] * (len(HEAD) - 2), _first(report["failure"])
    merged = [site for site in report["sites"] if site["status"] == "merged"]
    return (
        title,
        f"{report['gflops_before']:.1f}",
        _part(report["gflops_before"], report["gflops_after"]),
        ", ".join(f"`{kind}` x {count}" for kind, count in Counter(map(_grouping, merged)).items()) or "-",
        f"{len(merged)} of {len(report['sites']) + len(_others(report))}",
        _commonest(Counter(_reasons(report))),
    )


def _part(before: float, after: float) -> str:
    """What is left, flagged where that is more than there was."""
    told = f"{after:.1f} ({after / before:.0%})"
    return f"**{told}: more than dense**" if after > before else told


def _grouping(site: Mapping[str, Any]) -> str:
    """How tokens of a merged site are grouped."""
    return site.get("grouping", "") or f"{site['tokens']} per {site['batch']}"


def _others(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The attentions that are no sites."""
    return [*report["not_sites"], *report["not_attention"]]


def _reasons(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """For each attention at which nothing merges its operator, and why; a site's is named after its node."""
    for site in report["sites"]:
        if site["status"] != "merged":
            yield re.sub(r"_\d+$", "", site["node"]), _first(site["reason"])
    for other in _others(report):
        yield other["operator"], _first(other["reason"])


def _commonest(reasons: Counter[tuple[str, str]]) -> str:
    if not reasons:
        return "-"
    ((operator, reason), count), *_ = reasons.most_common(1)
    return f"`{operator}`: {reason} ({count} of {reasons.total()})"


def _first(text: str) -> str:
    """What a text says first, as a table has room for."""
    return re.split(r"[;\n]", text.strip(), maxsplit=1)[0].replace("|", r"\|")


def table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The lines of all models, by their titles."""
    return grid(HEAD, (line(title, report) for title, report in reports.items()))


def record(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What is kept: the reports, and the machine and versions that they were made with."""
    return {
        "machine": timing.machine(torch.device("cpu")),
        "torchvision": _version("torchvision"),
        "timm": _version("timm"),
        "fraction": FRACTION,
        "clips": CLIPS,
        "reports": reports,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME")
    add_write(parser, MARKER)
    chosen = parser.parse_args()
    specs = [FAMILIES[name] for name in chosen.only]
    reports = {spec.title: facts(spec) for spec in track(specs, "tracing", transient=True)}
    print(table(reports))
    if chosen.write is not None:
        timing.write("families", record(reports))
        write(chosen.write, table(reports), MARKER)


if __name__ == "__main__":
    main()
