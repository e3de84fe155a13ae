"""Latency over the number of tokens: how many a schedule keeps, and how many a clip has.

    python -m benchmarks.sweep kept                       # one clip, schedules that keep less and less
    python -m benchmarks.sweep length --frames 8 32 128   # longer and longer clips, one schedule

Rows of the UMT encoder: dense (fused attention), ours, and the floor by hand (as many tokens, dropped for free), all
compiled. `kept` measures all its schedules in one alternating run, `length` every length in one of its own. Both keep
their JSON, and draw `docs/latency-DEVICE.png` out of what has been kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.handwritten import removed
from benchmarks.models import Spec
from benchmarks.pages import PICTURES
from benchmarks.speed import DENSE, FLOOR, OURS, ROWS, Setting
from benchmarks.timing import Spread
from benchmarks.umt import UMT, UMTConfig
from tldr_compile.records.charts import Chart, Line, draw
from tldr_compile.records.tables import grid, spread

SITES = 3  # that merge, as the paper's schedules do
FRACTIONS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
LENGTH_FRACTION = 0.15  # about what [600, 200, 100] keeps of 2352 tokens
HEAD = ("tokens", "kept", "dense, ms", "ours, ms", "floor, ms", "ours ÷ dense", "ours ÷ floor")
Point = dict[str, Any]
"""`tokens` of the clip, `kept` after the last merge, and by row the `latency`; `ours_over` each other row."""


def tokens_kept(tokens: int, schedule: Sequence[float]) -> int:
    for amount in schedule:
        tokens -= removed(amount, tokens)
    return tokens


def spec(config: UMTConfig) -> Spec:
    return Spec("UMT", partial(UMT, config), (3, config.frames, config.image, config.image))


def point(tokens: int, fraction: float, taken: Mapping[str, Sequence[float]]) -> Point:
    """One place on the curves; `taken` are the seconds of the rows, in the same rounds."""
    return {
        "tokens": tokens,
        "kept": tokens_kept(tokens, (fraction,) * SITES),
        "latency": {row: Spread.of(seconds) for row, seconds in taken.items()},
        "ours_over": {row: timing.ratio(taken[OURS], seconds) for row, seconds in taken.items() if row != OURS},
    }


@torch.inference_mode()
def kept(config: UMTConfig, chosen: argparse.Namespace) -> list[Point]:
    """One clip, one model, a schedule for each of `FRACTIONS`; the dense model is measured once a round."""
    model, (video,) = spec(config).on(chosen.device, chosen.dtype, chosen.batch)
    calls: dict[str, timing.Call] = {DENSE: partial(ROWS[DENSE](Setting(model, (), {})), video)}
    for fraction in FRACTIONS:
        setting = Setting(model, (fraction,) * SITES, {})
        calls.update({f"{row} {fraction}": partial(ROWS[row](setting), video) for row in (OURS, FLOOR)})
    taken = timing.in_turn(calls, video.device, chosen.rounds, "schedules")
    return [
        point(config.tokens, each, {DENSE: taken[DENSE], **{row: taken[f"{row} {each}"] for row in (OURS, FLOOR)}})
        for each in FRACTIONS
    ]


@torch.inference_mode()
def length(config: UMTConfig, chosen: argparse.Namespace) -> list[Point]:
    """Clips of more and more frames, and the schedule that `LENGTH_FRACTION` gives."""
    points = []
    for frames in chosen.frames:
        longer = replace(config, frames=frames)
        model, (video,) = spec(longer).on(chosen.device, chosen.dtype, chosen.batch)
        setting = Setting(model, (LENGTH_FRACTION,) * SITES, {})
        torch.compiler.reset()
        calls = {row: partial(ROWS[row](setting), video) for row in (DENSE, OURS, FLOOR)}
        taken = timing.in_turn(calls, video.device, chosen.rounds, f"{frames} frames")
        points.append(point(longer.tokens, LENGTH_FRACTION, taken))
        print(markdown(points[-1:]).splitlines()[-1], flush=True)
    return points


SWEEPS: dict[str, Callable[[UMTConfig, argparse.Namespace], list[Point]]] = {"kept": kept, "length": length}


def markdown(points: Sequence[Point]) -> str:
    """Latencies and ratios, min / median / max."""

    def line(at: Point) -> tuple[str, ...]:
        latencies = (spread(at["latency"][row], 0, 1000) for row in (DENSE, OURS, FLOOR))
        ratios = (spread(at["ours_over"][row], 3) for row in (DENSE, FLOOR))
        return str(at["tokens"]), str(at["kept"]), *latencies, *ratios

    return grid(HEAD, map(line, points))


def chart(sweep: str, record: Mapping[str, Any]) -> Chart:
    """Latency over tokens: kept ones, or those of the clip."""
    points = sorted(record["points"], key=lambda each: each["kept"])
    x = [each["kept" if sweep == "kept" else "tokens"] for each in points]

    def line(row: str) -> Line:
        low, middle, high = zip(*(each["latency"][row] for each in points), strict=True)
        return Line(x, *([1000 * value for value in values] for values in (middle, low, high)))

    of = f"{record['model']}, batch {record['batch']}, {record['dtype']}"
    title, label = {
        "kept": (f"{of}: {points[0]['tokens']} tokens", "tokens kept"),
        "length": (f"{of}: longer clips, {record['fraction']:.0%} less at three sites", "tokens of the clip"),
    }[sweep]
    lines = {row.replace(" compiled", "").replace(" by hand", ""): line(row) for row in (DENSE, OURS, FLOOR)}
    return Chart(title, label, "latency, ms", lines, logarithmic=sweep == "length")


def picture(device: str, folder: Path = timing.RESULTS) -> Path:
    """Draw the sweeps that have been kept for this device."""
    paths = {sweep: folder / f"sweep-{sweep}-{device}.json" for sweep in SWEEPS}
    charts = [chart(sweep, json.loads(path.read_text())) for sweep, path in paths.items() if path.exists()]
    return draw(charts, PICTURES / f"latency-{device}.png")


def options() -> argparse.Namespace:
    parser = timing.parser(__doc__, rounds=5)
    parser.add_argument("sweep", choices=SWEEPS)
    parser.add_argument("--batch", type=int, default=1, help="clips per call")
    parser.add_argument("--frames", type=int, nargs="+", default=(8, 16, 32, 64, 128), help="196 tokens each")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    points = SWEEPS[chosen.sweep](UMTConfig(classes=400), chosen)
    print(markdown(points))
    record = {
        "model": "UMT-B",
        "batch": chosen.batch,
        "dtype": chosen.dtype,
        "rounds": chosen.rounds,
        "fraction": LENGTH_FRACTION,
        "machine": timing.machine(torch.device(chosen.device)),
        "points": points,
    }
    print(timing.write(f"sweep-{chosen.sweep}-{chosen.device}", record))
    print(picture(chosen.device))


if __name__ == "__main__":
    main()
