"""The comparison on made clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality import clips, made
from benchmarks.quality import compare as bench
from benchmarks.quality.tasks import TASKS, Task
from tests.quality.support import CLASS_NAMES, checkpoint, config
from tldr_compile.quality import compare, latency, tell
from tldr_compile.quality.data import load
from tldr_compile.quality.methods import METHODS, RANDOM, SEEDS, TIMED, WHOLE
from tldr_compile.records.measure import Spread


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One shape to choose from, few clips to choose by, and latencies that are not measured."""

    def ratios(calls: Any, dense: Any, clips: Any, rounds: int) -> dict[latency.Name, Spread]:
        return dict.fromkeys(calls, Spread(0.5, 0.6, 0.7))

    monkeypatch.setattr(compare, "CANDIDATES", ("every site",))
    monkeypatch.setattr(bench, "VAL_CLIPS", 80)
    monkeypatch.setattr(latency, "ratios", ratios)


@pytest.fixture
def places(tmp_path: Path) -> tuple[str, ...]:
    return ("--out", str(tmp_path), "--picture", str(tmp_path / "quality.png"))


@pytest.fixture
def named(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "named", config(side=32, frames=4, names=CLASS_NAMES))


def error(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command failed with."""
    assert bench.main(arguments) == 1
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1].startswith("quality: ")
    assert not any("Traceback" in line for line in told)
    return told[-1]


def test_every_method_has_its_row(tmp_path: Path, places: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    folder, page = checkpoint(tmp_path / "model", config()), tmp_path / "page.md"
    page.write_text(f"before\n{tell.MARKER}\nold\n{tell.MARKER}\nafter")
    arguments = ("--model", str(folder), "--clips", "80", "--budgets", "0.8", *places, "--write", str(page))
    assert bench.main(arguments) == 0
    facts = json.loads((tmp_path / "quality.json").read_text())
    named = [name for name in WHOLE if name not in facts["left_out"]]
    assert [row["method"] for row in facts["rows"]] == [compare.DENSE, *named]
    # In so small a model what they compute on the way is much of all.
    assert set(facts["left_out"]) <= {"affinity, keys (AdaMerge)", "merging by attention received"}
    assert facts["clips"] == 80
    assert facts["shapes"]["chosen"] == {name: "every site" for name in named if METHODS[name].shape is None}
    rows = {row["method"]: row for row in facts["rows"]}
    for name, row in rows.items():
        assert 0 <= row["accuracy"][0] <= 1
        assert (row["over_dense"] is not None) == (name in (compare.DENSE, *TIMED) and not row["missed"])
        assert (row["over_random"] is None) == (name in (compare.DENSE, RANDOM) or bool(row["missed"]))
        if row["budget"] and not row["missed"]:
            assert row["gflops"] == pytest.approx(0.8 * rows[compare.DENSE]["gflops"], rel=0.02)
    assert len(rows[RANDOM]["variants"]) == len(SEEDS)
    assert rows[compare.DENSE]["agreement"] == 1
    told = page.read_text()
    assert told.startswith(f"before\n{tell.MARKER}\n| accuracy, % | dense | 0.8 of its GFLOPs |")
    assert told.endswith(f"{tell.MARKER}\nafter")
    assert "Than random dropping, vid-TLDR is " in told
    out = capsys.readouterr().out
    assert all(f"| {name} | 0.8" in out for name in named)
    assert all(f"Left out: {name}: no shape" in out for name in facts["left_out"])
    assert (tmp_path / "quality.png").stat().st_size > 1000


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_table_is_of_test_clips_and_the_shapes_of_validation_clips(task: Task) -> None:
    for split in ("val", "test"):
        part = made.made(task, split, 80)
        batch, same = next(part.batches), clips.make(task, split, range(80))
        assert torch.equal(batch.pixels, same.pixels)
        assert torch.equal(batch.labels, same.labels)


def test_the_clips_are_those_that_the_configuration_asks_for(tmp_path: Path) -> None:
    for task in TASKS.values():
        shape = config(side=task.size, frames=task.frames, names=task.names, layers=1)
        subject = load(str(checkpoint(tmp_path / "any name", shape)))
        assert made.check_made(subject, "any name", 80) is task
        pixels = next(made.made(task, "val", 80).batches).pixels[:1]
        assert subject.model(pixels).logits.shape == (1, task.classes)


def test_a_model_of_other_clips(named: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = error(("--model", str(named)), capsys)
    assert "tells 2 classes from 4 frames of 32 x 32" in told
    assert "`tldr quality --data`" in told


def test_a_missing_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made, "HERE", tmp_path)
    assert "train it with python -m benchmarks.quality.train" in error((), capsys)


def test_a_file_without_markers_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("no markers")
    assert f"expected two lines {tell.MARKER}, found 0" in error(("--write", str(page)), capsys)
