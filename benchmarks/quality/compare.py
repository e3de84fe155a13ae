"""What merging does to the accuracy of the model that is trained here, on made clips, at equal GFLOPs.

    python -m benchmarks.quality.compare [--write docs/quality.md]

`tldr quality --model HUB_ID_OR_FOLDER --data FOLDER` does the same to real weights on real videos. `--write` replaces
what stands between two lines `<!-- quality -->`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from benchmarks.pages import PICTURES, add_write, write
from benchmarks.quality.command import check_writable, placed, status
from benchmarks.quality.made import check_made, checkpoint, made
from benchmarks.quality.train import HERE, RECIPES, TEST_CLIPS, kept
from benchmarks.quality.tuned import configs
from tldr_compile import TokenMerging
from tldr_compile.cli.main import add_comparison
from tldr_compile.cli.quality import check_outputs, keep
from tldr_compile.media.models import device_of
from tldr_compile.quality import tell
from tldr_compile.quality.compare import Study, record
from tldr_compile.quality.data import VAL_CLIPS, load

HALF = "dense, half the layers"
BUDGETS = (0.5, 0.4, 0.3)


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model for made clips; default: the one that is trained here")
    add_comparison(parser)
    parser.set_defaults(clips=TEST_CLIPS, budgets=BUDGETS, rounds=9)
    add_write(parser, tell.MARKER)
    return placed(parser.parse_args(argv), "quality", PICTURES / "quality.png")


def half(chosen: argparse.Namespace) -> dict[str, nn.Module]:
    """The smaller dense model; nothing where there is none."""
    path = HERE / kept(replace(RECIPES["direction"], size="half"))
    if chosen.model:
        return {}
    if not path.is_dir():
        print(f"left out: {HALF}: there is no {path.name} (python -m benchmarks.quality.train --size half)")
        return {}
    return {HALF: load(str(path)).model}


def run(chosen: argparse.Namespace) -> None:
    """Measure, print, keep, draw. Raises TldrError."""
    check_outputs(chosen.out, chosen.picture)
    check_writable(chosen.write, tell.MARKER)
    name = chosen.model or kept(RECIPES["direction"])
    subject = load(chosen.model or checkpoint())
    task = check_made(subject, name, chosen.clips)
    study = Study(
        subject,
        name,
        "made clips, test split",
        made(task, "val", min(VAL_CLIPS, chosen.clips)),
        made(task, "test", chosen.clips),
        chosen.budgets,
        chosen.methods,
        others=half(chosen),
        tuned=[TokenMerging.load(path) for path in sorted(configs(chosen.model).glob("*.json"))],
        batch=chosen.batch,
        rounds=chosen.rounds,
    )
    facts = record(study, device_of(chosen.device))
    keep(facts, chosen.out, chosen.picture)
    write(chosen.write, tell.short(facts), tell.MARKER)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after an error that one line on stderr explains."""
    chosen = options(argv)
    return status("quality", lambda: run(chosen))


if __name__ == "__main__":
    sys.exit(main())
