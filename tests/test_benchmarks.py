"""The measuring itself can be trusted."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import sites, speed, sweep, timing, ways
from benchmarks.gpu import page as gpu_page
from benchmarks.models import MODELS
from benchmarks.pages import replaced, write
from benchmarks.quality import saliency
from benchmarks.speed import DENSE, FLOOR, OURS, ROWS, Setting, difference, markdown, measure
from benchmarks.timing import Spread, alternate, peak_bytes, ratio, seconds
from benchmarks.towers import __main__ as towers
from benchmarks.towers import answer
from benchmarks.towers import page as towers_page
from benchmarks.towers.sizes import TINY
from benchmarks.umt import UMT, UMTConfig
from tldr_compile import TokenMerging, ops
from tldr_compile.quality import tell
from tldr_compile.records.tables import grid

CPU = torch.device("cpu")


def test_every_round_times_every_call_and_turns_the_order_around() -> None:
    order: list[str] = []
    ticks: list[None] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    taken = alternate(calls, CPU, rounds=3, tick=lambda: ticks.append(None))
    assert "".join(order) == "abbaab"
    assert len(ticks) == 6
    assert {name: len(values) for name, values in taken.items()} == {"a": 3, "b": 3}


def test_ratios_are_of_pairs() -> None:
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == Spread(2.0, 3.0, 4.0)
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0], [1.0, 2.0])


def test_seconds_are_wall_clock() -> None:
    assert seconds(lambda: time.sleep(0.02), CPU) >= 0.02


def test_peak_counts_what_is_held_at_a_time_and_not_what_was_there() -> None:
    there = torch.ones(1000)

    def call() -> None:
        first = there.neg()
        second = first.neg()
        del first
        second.neg()

    call()
    assert peak_bytes(call, CPU) == 2 * 4000


def test_speed_rows_of_a_small_model() -> None:
    model = UMT(UMTConfig(image=16, frames=4, patch=8, dim=12, depth=2, heads=2, classes=3)).eval()
    inputs = (torch.randn(2, 3, 4, 16, 16),)
    names = ("dense eager", "vid-TLDR eager", "ToMe eager")
    rows = measure(Setting(model, (4, 2), {}), inputs, names, clips=2, rounds=2)
    assert [row.name for row in rows] == list(names)
    assert rows[0].difference_to_first_row == 0 < rows[1].difference_to_first_row
    assert all(row.peak_bytes > 0 and row.latency.min > 0 for row in rows)
    assert len(markdown(rows, weights=0).splitlines()) == 2 + 3


def test_handwritten_rows_are_refused_for_other_models() -> None:
    with pytest.raises(SystemExit, match="UMT only"):
        Setting(nn.Identity(), (), {}).by_hand("slice")


def test_difference_is_relative_to_the_largest_magnitude() -> None:
    assert difference(torch.tensor([1.0, -3.0]), torch.tensor([1.0, -4.0])) == 0.25


@pytest.mark.parametrize("name", MODELS)
def test_model_takes_its_inputs(name: str) -> None:
    with torch.device("meta"):
        model = MODELS[name].build()
    outputs = model(*(value.to("meta") for value in MODELS[name].inputs()))
    assert (outputs if isinstance(outputs, torch.Tensor) else outputs[0]).shape[0] == MODELS[name].clip_batch


def test_table_line() -> None:
    def site(kind: str, batch: str, tokens_in: int, tokens_out: int) -> dict[str, object]:
        return {"tokens": kind, "batch": batch, "tokens_in": tokens_in, "tokens_out": tokens_out}

    report = {
        "sites": [site("t", "h·w", 8, 8), site("1 + h·w", "t", 64, 48), site("1 + h·w", "t", 48, 40)],
        "restorations": [{"node": "view", "operator": "aten.view"}, {"node": "view_1", "operator": "aten.view"}],
        "gflops_before": 100.4,
        "gflops_after": 70.0,
    }
    assert sites.line("M", report) == (
        *("M", "3 (2)", "`t` per `h·w`, `1 + h·w` per `t`"),
        *("64 → 40", "100 → 70", "`aten.view` x 2"),
    )


def test_a_table_is_markdown() -> None:
    assert grid(("a", "b"), [("1", "2"), ("3", "4")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |"


def test_only_what_stands_between_the_markers_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- x -->\nb")
    write(page, "new", "<!-- x -->")
    assert page.read_text() == "a\n<!-- x -->\nnew\n<!-- x -->\nb"
    with pytest.raises(ValueError, match="two lines <!-- x -->, found 1"):
        replaced("a\n<!-- x -->\nb", "new", "<!-- x -->")


def test_every_way_to_merge_is_a_row() -> None:
    told = [TokenMerging.from_options({"schedule": [1], **options}) for _, options in ways.ways()]
    assert {each.reduction for each in told} == set(ops.REDUCTIONS)
    assert {each.saliency for each in told} == set(ops.SIGNALS)
    assert len(set(told)) == len(told)
    table = ways.markdown({"dense": [4.0, 4.0], "merge": [1.0, 2.0], "energy": [2.0, 3.0]})
    assert table.splitlines()[-1] == "| energy | 2000 / 2500 / 3000 | 1.50 / 1.75 / 2.00 | 0.50 / 0.62 / 0.75 |"


@pytest.mark.parametrize("which", sweep.SWEEPS)
def test_sweeps_count_tokens_as_the_model_has_them(
    which: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    methods = {DENSE: None, OURS: "vid-tldr", FLOOR: "slice"}
    for row, method in methods.items():
        monkeypatch.setitem(ROWS, row, lambda setting, by=method: setting.by_hand(by) if by else setting.model)
    monkeypatch.setattr(sweep, "PICTURES", tmp_path)
    config = UMTConfig(image=32, frames=4, patch=8, dim=12, depth=4, heads=2)
    chosen = Namespace(device="cpu", dtype="float32", batch=1, frames=(2, 6), rounds=1)
    points = sweep.SWEEPS[which](config, chosen)
    if which == "kept":
        assert {point["tokens"] for point in points} == {64}
        for fraction, point in zip(sweep.FRACTIONS, points, strict=True):
            model = Setting(UMT(config), (fraction,) * sweep.SITES, {}).by_hand("slice")
            assert model(torch.zeros(1, 3, 4, 32, 32)).shape[1] == point["kept"]
    else:
        assert [point["tokens"] for point in points] == [32, 96]
    assert all(set(point["ours_over"]) == {DENSE, FLOOR} for point in points)
    assert len(sweep.markdown(points).splitlines()) == 2 + len(points)
    record = {"model": "UMT", "batch": 1, "dtype": "float32", "fraction": 0.15, "points": points}
    timing.write(f"sweep-{which}-cpu", record, tmp_path)
    assert sweep.picture("cpu", tmp_path).read_bytes().startswith(b"\x89PNG")


def test_line_of_one_measurement() -> None:
    def row(name: str, milliseconds: float, over: float, peak: int) -> dict[str, object]:
        return {
            "name": name,
            "latency": [0, milliseconds / 1000, 9],
            "ours_over_this": [0, over, 9],
            "peak_bytes": peak,
        }

    rows = [row(DENSE, 300, 0.5, 100), row(OURS, 150, 1, 50), row("floor", 140, 1.07, 50)]
    record = {"model": "umt-b", "schedule": [6, 0.5], "batch": 2, "dtype": "float32", "weight_bytes": 100, "rows": rows}
    assert speed.middles({**record, "machine": {"device": "C"}}) == (
        *("UMT-B", "`[6, 0.5]`", "C", "float32", "2", "300", "150"),
        *("2.00", "1.07", "0.75"),
    )
    both = {**record, "machine": {"device": "C"}, "rows": [*rows, row(FLOOR, 130, 1.15, 50)]}
    assert speed.middles(both)[-2] == "1.07"


def test_the_pages_show_what_was_measured() -> None:
    def kept(name: str) -> Any:
        return json.loads((timing.RESULTS / f"{name}.json").read_text())

    for page, text, marker in (
        ("models", sites.table(kept("models")), sites.MARKER),
        ("speed", speed.kept(), speed.KEPT),
        ("quality", tell.short(kept("quality")), tell.MARKER),
        ("quality", saliency.markdown(kept("saliency")["layers"]), saliency.MARKER),
        ("gpu", gpu_page.page(list(gpu_page.records())), gpu_page.MARKER),
        *(
            ("towers-speed", towers_page.table(part, record), towers_page.MARKERS[part])
            for part, record in towers_page.kept().items()
        ),
    ):
        shown = (timing.RESULTS.parents[1] / "docs" / f"{page}.md").read_text()
        assert replaced(shown, text, marker) == shown


def test_a_record_keeps_no_path_of_the_machine(tmp_path: Path) -> None:
    timing.write("lines", {"line": f'"{torch.__file__}", line 3'}, tmp_path)
    assert '\\"torch/__init__.py\\", line 3' in (tmp_path / "lines.json").read_text()


@pytest.mark.filterwarnings("ignore:tldr. the merged graph costs")
@pytest.mark.parametrize(("part", "rows"), [("tower", 5), ("answer", 3)])
def test_a_tower_that_is_tiny(part: str, rows: int, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("\n".join(marker for marker in towers_page.MARKERS.values() for _ in range(2)))
    towers.main(["--part", part, "--tiny", "--rounds", "1", "--out", str(tmp_path), "--write", str(page)])
    (record,) = towers_page.kept(tmp_path).values()
    table = towers_page.table(part, record)
    assert len(table.splitlines()) == 2 + rows
    assert table in page.read_text()
    counts = [row["blocks" if part == "tower" else "tokens"] for row in record["rows"]]
    # Of 128 blocks, beside 8 tokens of text: dense ones twice, ours, restored, with the default schedule.
    assert counts == ([128, 128, 90, 128, 114] if part == "tower" else [136, 98, 98])


@pytest.mark.filterwarnings("ignore:tldr. the merged graph costs")
def test_the_ways_to_a_first_token_differ_in_their_choice_of_tokens_alone() -> None:
    ways = answer.answers(TINY)
    with torch.inference_mode():
        scores = {name: way() for name, way in ways.items()}
        assert not torch.equal(scores[answer.PRUNED], scores[answer.DENSE])
        assert not torch.equal(scores[answer.PRUNED], scores[answer.OURS])
        ways[answer.PRUNED].tower.keep = 128
        torch.testing.assert_close(ways[answer.PRUNED](), scores[answer.DENSE])


def test_pruning_keeps_the_first_frame_and_what_changed_most() -> None:
    first, more = torch.randn(2, 6, 8).unbind()
    frames = torch.stack([first, first, first])
    frames[1, 2] = -first[2]  # and back in the frame after
    frames[2, 5] = more[5]
    features = frames.flatten(0, 1)
    assert answer.changed(features, 3, 9).tolist() == [*range(6), 6 + 2, 12 + 2, 12 + 5]
    assert answer.changed(features, 3, 8).tolist() == [*range(6), 6 + 2, 12 + 2]
    assert answer.changed(features, 3, 4).tolist() == [0, 1, 2, 3]
