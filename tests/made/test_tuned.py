"""What was found for the trained model, and the command that finds it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import timing
from benchmarks.quality import tuned
from benchmarks.quality.made import checkpoint
from benchmarks.quality.tasks import DIRECTION
from tldr_compile import TokenMerging, Tuned
from tldr_compile.quality.budget import Merger
from tldr_compile.quality.data import load
from tldr_compile.tuning.tuner import TUNED, Row


def test_kept_configurations_meet_their_budgets() -> None:
    merger = Merger(load(checkpoint()).model, torch.zeros(1, DIRECTION.frames, 3, DIRECTION.size, DIRECTION.size))
    paths = sorted(tuned.CONFIGS.glob("*.json"))
    assert [path.stem for path in paths] == ["0.3", "0.4", "0.5"]
    for path in paths:
        part = merger.gflops(TokenMerging.load(path)) / merger.dense
        assert 0.99 * float(path.stem) < part <= float(path.stem)


def test_a_page_a_record_and_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TokenMerging(schedule=(0.2,), made_for={"sites": 1})

    def found(name: str, budget: float, clips: int, folder: Path) -> Tuned:
        rows = tuple(Row(name, budget, config, (0.9, 0.01), 0.1, (0.0, 0.01), True) for name in (TUNED, "vid-TLDR"))
        return Tuned(config, budget, None, "logits", rows, clips // 2, clips // 2, {})

    for module, name, value in ((tuned, "tuned", found), (tuned, "CONFIGS", tmp_path), (tuned, "PICTURES", tmp_path)):
        monkeypatch.setattr(module, name, value)
    write = timing.write
    monkeypatch.setattr(timing, "write", lambda name, record, folder: write(name, record, tmp_path))
    page = tmp_path / "page.md"
    page.write_text(f"{tuned.MARKER}\n{tuned.MARKER}\n")
    assert tuned.main(("--budgets", "0.6", "0.5", "--clips", "80", "--write", str(page))) == 0
    assert TokenMerging.load(tmp_path / "0.5.json") == config
    assert list(json.loads((tmp_path / "tuned.json").read_text())["budgets"]) == ["0.6", "0.5"]
    assert page.read_text().count("| tuned | ") == 2
    assert (tmp_path / "tuned.png").stat().st_size > 1000
