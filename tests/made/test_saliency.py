from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.quality import saliency
from benchmarks.quality.saliency import auc, digit_tokens, share
from tests.quality.support import checkpoint, config


def test_a_perfect_score_has_an_auc_of_one_and_all_its_mass_on_the_digit() -> None:
    digit = torch.rand(4, 64) < 0.3
    assert auc(digit.float(), digit).tolist() == [1.0] * 4
    assert share(digit.float(), digit).tolist() == [1.0] * 4
    assert auc(-digit.float(), digit).tolist() == [0.0] * 4


def test_a_constant_score_is_chance() -> None:
    digit = torch.rand(4, 64) < 0.3
    flat = torch.ones(4, 64)
    assert auc(flat, digit).tolist() == [0.5] * 4
    torch.testing.assert_close(share(flat, digit), digit.float().mean(1))


def test_a_token_is_the_digits_by_a_quarter_of_its_patch_in_either_frame() -> None:
    mask = torch.zeros(1, 4, 16, 16, dtype=torch.bool)
    mask[0, 1, :4, :4] = True  # a quarter of patch 0, second frame of the first tubelet
    mask[0, 2, 8:12, 8:11] = True  # less than a quarter of patch 3, first frame of the second
    assert digit_tokens(mask, tubelet=2, patch=8).tolist() == [[True] + [False] * 7]


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "model", config(layers=3))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{saliency.MARKER}\nold\n{saliency.MARKER}\nafter")
    places = ("--out", str(tmp_path), "--picture", str(tmp_path / "saliency.png"), "--write", str(page))
    assert saliency.main(("--model", str(folder), "--clips", "80", *places)) == 0
    rows = json.loads((tmp_path / "saliency.json").read_text())["layers"]
    assert len(rows) == 3
    assert 0.1 < rows[0]["chance"][0] < 0.4
    assert (tmp_path / "saliency.png").stat().st_size > 1000
    assert page.read_text().startswith(f"before\n{saliency.MARKER}\n| layer |")
    assert page.read_text().endswith("after")
    assert "| 3 |" in capsys.readouterr().out


def test_clips_that_are_not_one_of_every_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "model", config())
    assert saliency.main(("--model", str(folder), "--clips", "100")) == 1
    assert "--clips 100: made clips come 80 at a time" in capsys.readouterr().err
