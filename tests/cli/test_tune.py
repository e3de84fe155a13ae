"""`tldr tune`, on a folder of videos."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.quality.support import CLASS_NAMES, checkpoint, config, kinetics
from tldr_compile import TokenMerging, ops
from tldr_compile.cli.main import main, parser
from tldr_compile.tuning import search, ways


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One way beside the published ones, in one shape, without steps."""
    monkeypatch.setattr(ways, "SHAPES", {"every site": ways.SHAPES["every site"]})
    monkeypatch.setattr(ways, "MARGINS", ())
    for registry, kept in ((ops.SIGNALS, {"attention", "uniform"}), (ops.REDUCTIONS, {"merge", "energy"})):
        for name in set(registry) - kept:
            monkeypatch.delitem(registry, name)
    monkeypatch.setattr(search, "ROUNDS", 0)


def test_what_is_found_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = checkpoint(tmp_path / "model", config(side=32, frames=4, names=CLASS_NAMES))
    clips, out = kinetics(tmp_path / "clips", ("any", "names"), 3), tmp_path / "out"
    (clips / "any" / "broken.mp4").write_bytes(b"no video")
    options = ("--budget", "0.8", "--batch", "1")
    command = ("tune", "--model", str(model), "--data", str(clips), "--out", str(out), *options)
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "skipped: " in said
    assert "Chosen by 3 clips; the table is of 3 others" in said
    found = TokenMerging.load(out / "config.json")
    kept = json.loads((out / "tune.json").read_text())
    assert kept["rows"][0]["part"] <= 0.8
    assert kept["rows"][0]["config"]["schedule"] == list(found.entries)  # type: ignore[arg-type]
    assert (out / "tune.png").stat().st_size > 1000
    other = checkpoint(tmp_path / "other", config(side=32, frames=4, names=CLASS_NAMES))
    assert main((*command[:2], str(other), *command[3:])) == 2
    assert "was made with weights" in capsys.readouterr().err


def test_a_folder_without_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = checkpoint(tmp_path / "model", config(side=32, frames=4, names=CLASS_NAMES))
    (tmp_path / "clips").mkdir()
    command = ("tune", "--model", str(model), "--data", str(tmp_path / "clips"), "--out", str(tmp_path / "out"))
    assert main((*command, "--budget", "0.8")) == 2
    assert "no videos in it, of .mp4" in capsys.readouterr().err


def test_what_is_no_budget_is_told_before_anything_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("tune", "--model", "m", "--data", "d", "--budget", "0")) == 2
    assert "budget=0.0: budget is the part" in capsys.readouterr().err


@pytest.mark.parametrize("limits", [(), ("--budget", "0.5", "--latency", "0.5")])
def test_one_limit_is_given(limits: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["tune", "--model", "m", "--data", "d", *limits])
    assert "--budget" in capsys.readouterr().err
