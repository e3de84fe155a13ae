"""Towers of video language models: how fast a merged one is, and how soon the first token of an answer is there.

    python -m benchmarks.towers --part tower  [--write docs/towers-speed.md]
    python -m benchmarks.towers --part answer [--write docs/towers-speed.md]

`tower`: the vision tower alone, of full size; dense as transformers' exporter captures it (compiled, and the model
itself, eager), and merged. `answer`: a whole model up to the first token, with all tokens of the video, with those that
pruning behind the tower leaves, and with as many that merging inside the tower leaves; the three share all code but
the choice of tokens. Weights are random: nothing is said about answers. All rows of a part alternate in one run.
`--tiny`: small models and seconds; nothing is kept, unless `--out` says where.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from benchmarks import timing
from benchmarks.pages import add_write, write
from benchmarks.towers import answer, page, tower
from benchmarks.towers.sizes import CPU, FULL_ANSWER, FULL_TOWER, TINY

PARTS = {"tower": (tower, FULL_TOWER), "answer": (answer, FULL_ANSWER)}


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each row (default 5)")
    parser.add_argument("--tiny", action="store_true", help="small models, to see that it runs")
    parser.add_argument("--out", type=Path, help=f"folder of {page.NAME}.json (default: the results; --tiny: none)")
    add_write(parser, *page.MARKERS.values())
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(arguments)
    transformers.logging.set_verbosity_error()  # or its models tell what they think of random ones
    part, full = PARTS[chosen.part]
    size = TINY if chosen.tiny else full
    with torch.inference_mode():
        rows = part.rows(size, chosen.rounds)
    record = {
        "machine": timing.machine(CPU),
        "rounds": chosen.rounds,
        "grid": size.grid,
        "vision_config": size.sight,
        "text_config": size.text,
        "schedule": size.schedule,
        "rows": rows,
    }
    shown = page.table(chosen.part, record)
    out = chosen.out or (None if chosen.tiny else timing.RESULTS)
    if out is not None:
        print(f"kept in {timing.write(page.NAME, {**page.kept(out), chosen.part: record}, out)}\n")
    print(shown)
    write(chosen.write, shown, page.MARKERS[chosen.part])


if __name__ == "__main__":
    main()
