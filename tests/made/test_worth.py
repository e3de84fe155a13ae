"""What a signal is worth, asked of the answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.quality import worth
from tests.quality.support import checkpoint, config
from tldr_compile import ops


def test_a_flipped_signal_ranks_the_other_way_round() -> None:
    saliency = torch.tensor([[0.0, 0.25, 1.0]])
    assert worth.flipped(lambda reading: reading)(saliency).tolist() == [[1.0, 0.75, 0.0]]


def test_every_signal_is_asked_at_every_layer_both_ways() -> None:
    worth.register()
    named = worth.signals()
    assert "uniform" not in named
    assert {each.format("attention") for each in ("{}", worth.FLIPPED)} <= set(ops.SIGNALS)
    cases = list(worth.cases(3))
    assert len(cases) == 2 * (1 + 2 * len(named)) * 3
    assert {config.schedule for *_, config in cases} == {(0.5,), (0.0, 0.5), (0.0, 0.0, 0.5)}


def test_a_record_and_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worth, "signals", lambda: ["attention"])
    page = tmp_path / "page.md"
    page.write_text(f"{worth.MARKER}\n{worth.MARKER}\n")
    folder = checkpoint(tmp_path / "model", config())
    assert worth.main(("--model", str(folder), "--clips", "80", "--out", str(tmp_path), "--write", str(page))) == 0
    found = json.loads((tmp_path / "worth.json").read_text())["divergence"]
    assert list(found) == list(worth.RULES)
    assert all(list(by) == ["none", "attention", "attention, flipped"] for by in found.values())
    assert all(len(layers) == 2 and layers[0][0] > 0 for by in found.values() for layers in by.values())
    assert "| attention, flipped | " in page.read_text()
    assert page.read_text().split(worth.MARKER)[1].strip() in capsys.readouterr().out
