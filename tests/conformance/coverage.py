"""What the pass makes of every image and video encoder of `transformers`: one verdict per model.

    python -m tests.conformance.coverage [--write docs/coverage.md docs/towers.md]
    python -m tests.conformance.coverage --shard 2/4            a quarter of them
    python -m tests.conformance.coverage --only Siglip CLIP     those whose name contains one of these
    python -m tests.conformance.coverage --join FILE ...        no walk: the tables of walks that were kept

Every model is built tiny with random weights, captured as `apply` does it, merged at every site by one fraction, and
held to the laws:

    Zero         a schedule of zeros gives the traced model's numbers, bit for bit
    Restore      all outputs have the shapes, dtypes and structure that they had
    Projection   the merged graph equals its definition, an interpreter that runs the original graph at full length
    Samples      what the traced model keeps apart (samples, frames, rows) the merged one keeps apart, bit for bit

A walk is kept as JSON in `benchmarks/results`. The exit status is 1 where a model is wrong or crashed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import timing
from benchmarks.pages import replaced
from tests.conformance.encoders import IMAGES, TOWERS, VIDEO, Encoder, discover
from tests.conformance.verdict import (
    COVERED,
    CRASHED,
    EVERYWHERE,
    EXPORTER,
    FRACTION,
    LEAST,
    LITTLE,
    MERGED,
    NO_RULE,
    NOT_BUILT,
    PARTLY,
    REFUSED,
    VERDICTS,
    WRONG,
    Record,
    judge,
    saved,
    saves_little,
)
from tests.conformance.walk import walk
from tldr_compile.records.tables import grid

MARKER, TOWERS_MARKER = "<!-- coverage -->", "<!-- towers -->"
TITLE = "# Coverage"
LONGEST = 300
MARK = " †"  # behind the name of a model that transformers' exporter captured
FAULTS = (WRONG, CRASHED)
MEANING = {
    MERGED: "at every attention site, and nothing inside the model is restored",
    PARTLY: "some sites are not, or an operator inside the model needs the full length; it is named",
    LITTLE: f"the same, and `schedule={EVERYWHERE}` saves less than {LEAST:.0%} of the operations, or nothing",
    REFUSED: "no site is, for the reason given",
    WRONG: "a law is broken",
    CRASHED: "the pass failed, or took too long",
    NOT_BUILT: "no tiny configuration of it runs here",
}
UNTOLD = ""
SECTIONS = {
    VIDEO: ("Video", "They take clips: their input has a dimension of time, or the frames of clips as its batch."),
    TOWERS: (
        "Towers",
        "The vision part of a model of pixels and text: its configuration is a part of that model's. "
        "Those that take clips as one row of patches are here.",
    ),
    IMAGES: ("Images", "All others."),
    UNTOLD: ("Not told", "They come from an older walk, which did not tell what they are."),
}

T = TypeVar("T")


def shard(items: Sequence[T], number: int, count: int) -> list[T]:
    """Part `number` (from 1) of `count` that are about as long."""
    return list(items[number - 1 :: count])


def restored(record: Record) -> Counter[str]:
    """How many values were restored inside a model, by the operator that forced it."""
    found = Counter[str]()
    for operator, _, count in record.get("restorations", ()):
        found[operator] += count
    return found


def ruleless(records: Iterable[Record]) -> Counter[str]:
    """How many restorations the operators without a rule cost, by operator."""
    found = Counter[str]()
    for record in records:
        for operator, reason, count in record.get("restorations", ()):
            if reason == NO_RULE:
                found[operator] += count
    return found


def groupings(record: Record) -> Counter[str]:
    """How many sites are merged by a grouping, by grouping."""
    merged = (site for site in record.get("sites", ()) if site["status"] == "merged")
    return Counter(site["grouping"] for site in merged if site.get("grouping"))


def saving(record: Record) -> str:
    """What `EVERYWHERE` saves of a model, as a cell."""
    if "saving" not in record:
        return "-"
    part, (nothing, _, _) = saved(record), (record["saving"]["nothing"] or "").partition(":")
    told = "not known" if part is None else f"{part:.1%}"
    return f"0%: {nothing}" if nothing else told


def leaving(record: Record) -> str:
    """How many tokens of how many leave with `outputs="merged"`, or why all do, as a cell."""
    told = record.get("leaving", {})
    return " of ".join(told["tokens"]) if "tokens" in told else _short(told.get("reason", "-"))


def family(record: Record) -> str:
    """`transformers.models.<family>`, by which a model is looked for."""
    return record["module"].removeprefix("transformers.models.").partition(".")[0]


def summary(records: Sequence[Record]) -> str:
    """The sums, as Markdown."""
    verdicts = Counter(record["verdict"] for record in records)
    attending = [record for record in records if record.get("attends")]
    covered = [record for record in attending if record["verdict"] in COVERED]
    worth = sum(not saves_little(record) for record in covered)
    unknown = sum(saved(record) is None for record in covered)
    told = f"What {unknown} of them save is not known. " if unknown else ""
    untraced = sum(record["verdict"] == REFUSED and "attends" not in record for record in records)
    costly = ", ".join(f"`{operator}` ({count})" for operator, count in ruleless(records).most_common(8))
    return "\n".join(
        (
            grid(("verdict", "encoders", "meaning"), ((each, str(verdicts[each]), MEANING[each]) for each in VERDICTS)),
            "",
            "Of the encoders that trace and have self-attention over tokens, "
            f"{_share(len(covered), len(attending))} are merged or partly merged; "
            f"{_share(worth, len(attending))} without those known to save under {LEAST:.0%}. "
            f"{told}{untraced} encoders do not trace: neither `torch.export` nor transformers' exporter captures them. "
            f"{exported(records)}"
            f"Operators without a rule, by the restorations that they cost: {costly or 'none'}.",
        )
    )


def exported(records: Iterable[Record]) -> str:
    """The sum of the towers that only transformers' exporter captures, as a sentence; "" where there are none."""
    towers = [each for each in records if each.get("section") == TOWERS and each.get("captured") == EXPORTER]
    uncovered = [each for each in towers if each["verdict"] not in COVERED]
    others = [f"{each['name']} ({each['verdict']}: {_short(each['reason'])})" for each in uncovered]
    share = _share(len(towers) - len(others), len(towers))
    rest = f"; the others: {', '.join(others)}" if others else ""
    return f"Of the towers that the exporter captures, {share} are merged or partly merged{rest}. " if towers else ""


def tables(records: Sequence[Record]) -> str:
    """A table for every section that has models, as Markdown."""
    parts = ((text, [each for each in records if each.get("section", UNTOLD) == key]) for key, text in SECTIONS.items())
    return "\n\n".join(f"## {title}\n\n{meaning}\n\n{table(found)}" for (title, meaning), found in parts if found)


def table(records: Iterable[Record]) -> str:
    """One line per model, as Markdown; those that merge best come first."""
    saves = f"saved at {EVERYWHERE}"
    head = ("model", "verdict", "sites (merged)", "grouping", saves, "restored before", "laws", "seconds", "reason")
    return grid(head, map(line, sorted(records, key=rank)))


def rank(record: Record) -> tuple[int, float, str, str]:
    """By verdict, then by what is saved; where that is not known last."""
    part = saved(record)
    return VERDICTS.index(record["verdict"]), 1.0 if part is None else -part, record["name"], record["module"]


def line(record: Record) -> tuple[str, ...]:
    """One model's line of the table."""
    notes = [record["reason"]] if record["reason"] else []
    if record.get("trace", "kept") != "kept":
        notes.append(f"its trace is not the eager model, bit for bit: {record['trace']}")
    if record.get("rounding"):
        notes.append(record["rounding"])
    return (
        record["name"] + (MARK if record.get("captured") == EXPORTER else ""),
        record["verdict"],
        _sites(record),
        _short(_counts(groupings(record))),
        saving(record),
        _counts(restored(record)),
        _laws(record),
        f"{record['seconds']:.0f}",
        _short("; ".join(notes)) or "-",
    )


def towers(records: Iterable[Record]) -> str:
    """The table of `docs/towers.md`, as Markdown: one line per tower, by the name of its family."""
    found = [record for record in records if record.get("section") == TOWERS]
    head = ("family", "tower", "verdict", "sites (merged)", "grouping", f"saved at {EVERYWHERE}", "tokens that leave")
    lines = (
        (
            f"`{family(record)}`",
            f"`{record['name']}`",
            record["verdict"],
            _sites(record),
            _short(_counts(groupings(record))),
            saving(record),
            leaving(record),
            record.get("captured", "-"),
            _laws(record),
            _short(record["reason"]) or "-",
        )
        for record in sorted(found, key=lambda each: (family(each), each["name"]))
    )
    return grid((*head, "captured by", "laws", "reason"), lines)


def page(records: Sequence[Record], absent: Mapping[str, str]) -> str:
    """The whole of `docs/coverage.md`."""
    missing = [f"- `{module}` does not import here: {_short(reason)}" for module, reason in absent.items()]
    parts = (
        TITLE,
        "Every image and video encoder of `transformers`, one class per configuration, built tiny with random weights "
        f"and merged at every site by {FRACTION:.0%} of the tokens. Nothing is known of any model. "
        "The laws named are those that it keeps; Samples, that nothing which the model keeps apart (samples, frames, "
        "rows) meets by being merged, is told of those that keep something apart: it is missing for a batch of one. "
        "`python -m tests.conformance.coverage --write docs/coverage.md docs/towers.md` makes this page, and that of "
        "[the towers of language models](towers.md) by the names of their families.",
        f"Models with{MARK} are captured by transformers' own exporter, as `apply` does where `torch.export` fails; "
        "all others by `torch.export`.",
        "`grouping` is of the merged sites: tokens of the `run` are merged with each other; what is `apart` has a "
        "grouping of its own for each; what is `shared` has one for all; what is `carried` stays together.",
        f"`saved at {EVERYWHERE}` is the part of the floating-point operations of matrix products that "
        f"`schedule={EVERYWHERE}` saves: one fraction at every site that can merge, but for merges that cost more to "
        "restore than they save. It is counted on the tiny model, where the patch embedding and the head weigh more, "
        "and the blocks less, than at full size: a full-size model saves another part, and what does not pay here may "
        "pay there.",
        summary(records),
        tables(records),
        "\n".join(missing),
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def write(path: Path, records: Sequence[Record], absent: Mapping[str, str]) -> None:
    """Bring a file up to date: the sums or the towers between two markers, or all of it where it is the page itself.

    Raises ValueError where it is neither.
    """
    text = path.read_text() if path.exists() else TITLE
    if text.startswith(TITLE):
        new = page(records, absent)
    elif TOWERS_MARKER in text:
        new = replaced(text, towers(records), TOWERS_MARKER)
    else:
        new = replaced(text, summary(records), MARKER)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(new)


def collect(encoders: Sequence[Encoder], *, jobs: int, limit: float) -> list[Record]:
    """The records of all encoders by name, with a progress bar."""
    records: list[Record] = []
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(encoders))
        for record in walk(encoders, judge, jobs=jobs, limit=limit):
            records.append(record)
            progress.update(task, advance=1, description=f"{record['name']}: {record['verdict']}")
            if not progress.console.is_terminal:  # a log has no bar
                progress.console.print(f"{record['name']}: {record['verdict']}", markup=False)
            if record["verdict"] in FAULTS:
                progress.console.print(f"{record['name']}: {record['verdict']}: {record['reason']}", markup=False)
    return ordered(records)


def ordered(records: Iterable[Record]) -> list[Record]:
    return sorted(records, key=lambda record: (record["name"], record["module"]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", type=part, default=(1, 1), metavar="I/N", help="part I of N, for example 2/4")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="models whose name contains one of these"
    )
    parser.add_argument("--jobs", type=int, default=1, help="models at a time (default 1)")
    parser.add_argument("--limit-s", type=float, default=600.0, help="seconds a model may take (default 600)")
    parser.add_argument("--write", type=Path, nargs="+", default=[], help="files to bring up to date")
    parser.add_argument(
        "--out", type=Path, default=timing.RESULTS, help="folder for coverage.json (default %(default)s)"
    )
    parser.add_argument("--join", type=Path, nargs="+", help="JSON of earlier walks, instead of a walk")
    return parser.parse_args()


def part(text: str) -> tuple[int, int]:
    """`I/N` as two numbers. Raises ArgumentTypeError."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N")
    return int(number), int(count)


def main() -> int:
    chosen = arguments()
    if chosen.join:
        kept = [json.loads(path.read_text()) for path in chosen.join]
        records = ordered(record for each in kept for record in each["encoders"])
        absent = {module: reason for each in kept for module, reason in each["absent"].items()}
    else:
        encoders, absent = discover()
        named = [encoder for encoder in encoders if any(text in encoder.name for text in chosen.only)]
        records = collect(shard(named, *chosen.shard), jobs=chosen.jobs, limit=chosen.limit_s)
    whole = {
        "machine": timing.machine(torch.device("cpu")),
        "fraction": FRACTION,
        "everywhere": EVERYWHERE,
        "absent": absent,
        "encoders": records,
    }
    timing.write("coverage", whole, chosen.out)
    print(tables(records), summary(records), sep="\n\n")
    for path in chosen.write:
        write(path, records, absent)
    return int(any(record["verdict"] in FAULTS for record in records))


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.0%})" if whole else "none"


def _sites(record: Record) -> str:
    """A cell of how many sites there are, and how many are merged."""
    sites = record.get("sites")
    merged = sum(site["status"] == "merged" for site in sites or ())
    return "-" if sites is None else f"{len(sites)} ({merged})"


def _laws(record: Record) -> str:
    """A cell of the laws that are kept."""
    return ", ".join(law for law, text in record.get("laws", {}).items() if text == "kept") or "-"


def _counts(found: Counter[str]) -> str:
    """A cell of what was counted, the most frequent first."""
    return ", ".join(f"`{each}` x {count}" for each, count in found.most_common()) or "-"


def _short(text: str) -> str:
    """A cell of a table: one line, not too long."""
    flat = " ".join(text.split()).replace("|", "\\|")
    return flat if len(flat) <= LONGEST else f"{flat[:LONGEST]} ..."


if __name__ == "__main__":
    sys.exit(main())
