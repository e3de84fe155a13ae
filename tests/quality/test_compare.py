"""`tldr quality`, on folders of videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification

from benchmarks.quality import clips, made, sample
from benchmarks.quality.tasks import DIRECTION
from tests.quality.support import CLASS_NAMES, checkpoint, config, kinetics
from tldr_compile import TokenMerging
from tldr_compile.cli import quality
from tldr_compile.cli.main import main, parser
from tldr_compile.quality import compare, data, latency
from tldr_compile.quality.accuracy import Said
from tldr_compile.quality.budget import Cell
from tldr_compile.quality.methods import OURS, RANDOM
from tldr_compile.records.measure import Spread

FEW = ("--methods", OURS, RANDOM)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One shape to choose from, few clips to choose by, and latencies that are not measured."""

    def ratios(calls: Any, dense: Any, clips: Any, rounds: int) -> dict[latency.Name, Spread]:
        return dict.fromkeys(calls, Spread(0.5, 0.6, 0.7))

    monkeypatch.setattr(compare, "CANDIDATES", ("every site",))
    monkeypatch.setattr(data, "VAL_CLIPS", 80)
    monkeypatch.setattr(latency, "ratios", ratios)


@pytest.fixture
def places(tmp_path: Path) -> tuple[str, ...]:
    return ("--out", str(tmp_path), "--picture", str(tmp_path / "quality.png"))


@pytest.fixture
def named(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "named", config(side=32, frames=4, names=CLASS_NAMES))


def error(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command failed with."""
    assert main(("quality", *arguments)) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return told[told.index("tldr: ") :]


def test_real_clips_and_a_corrupt_one(
    tmp_path: Path, named: Path, places: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = kinetics(tmp_path / "data", CLASS_NAMES, 3)
    (folder / CLASS_NAMES[0] / "broken.mp4").write_bytes(b"no video")
    (folder / CLASS_NAMES[1] / "none.mp4").touch()
    arguments = ("--model", str(named), "--data", str(folder), "--budgets", "0.75", "--batch", "3", *FEW, *places)
    assert main(("quality", *arguments)) == 0
    facts = json.loads((tmp_path / "quality.json").read_text())
    skipped = facts["skipped"] + facts["shapes"]["skipped"]
    assert facts["clips"] + facts["shapes"]["clips"] == 6
    assert any("broken.mp4: not a video" in text for text in skipped)
    assert any("none.mp4: the file is empty" in text for text in skipped)
    out = capsys.readouterr().out
    assert out.count("skipped: ") == 2
    assert f"{len(facts['skipped'])} more could not be read" in out or not facts["skipped"]


def test_the_kept_model_on_real_files(tmp_path: Path, places: tuple[str, ...]) -> None:
    model = VideoMAEForVideoClassification.from_pretrained(made.checkpoint()).eval()
    model.save_pretrained(tmp_path / "model")
    labels, right = (3, 41), {}
    for label in labels:
        (home := tmp_path / "data" / model.config.id2label[label]).mkdir(parents=True)
        for index in range(label, label + 3 * DIRECTION.classes, DIRECTION.classes):
            sample.write(sample.frames(DIRECTION, index), home / f"{index}.mkv")
            right[index] = int(model(clips.make(DIRECTION, "test", [index]).pixels).logits.argmax()) == label
    assert all(right.values()), "choose clips that the model tells right"
    folders = ("--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"))
    assert main(("quality", *folders, "--budgets", "0.5", "--batch", "2", "--methods", OURS, *places)) == 0
    dense, *merged = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert dense["accuracy"][0] == dense["agreement"] == 1
    ours, *on_less = merged
    assert ours["gflops"] == pytest.approx(0.5 * dense["gflops"], rel=0.02)
    assert {row["method"] for row in on_less} <= {compare.FEWER_FRAMES, compare.LOWER_RESOLUTION}
    assert all(row["gflops"] >= 0.5 * dense["gflops"] for row in on_less)


def test_something_of_a_folder_is_wrong(tmp_path: Path, named: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = ("--model", str(named), "--data", str(tmp_path / "gone"))
    assert "DataError: --data" in (told := error(gone, capsys))
    assert "there is no such folder" in told
    folder = kinetics(tmp_path / "data", ("juggling",), 1)
    assert "not classes of the model: 'juggling'" in error(("--model", str(named), "--data", str(folder)), capsys)
    folder = kinetics(tmp_path / "one", CLASS_NAMES[:1], 1)
    assert "has one clip" in error(("--model", str(named), "--data", str(folder)), capsys)


def test_every_method_has_the_shape_that_is_best_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ("first site", "every site")
    best = {OURS: "every site", RANDOM: "first site"}

    class Made:
        """Cells without models: a shape's configuration is its name."""

        def cells(self, name: str, method: Any, shape: str, budgets: Any) -> list[Cell]:
            return [Cell(name, budget, ((name, shape),), budget) for budget in budgets]  # type: ignore[arg-type]

    def listen(merger: Any, cells: list[Cell], *rest: Any) -> Said:
        said = {cell.configs[0]: torch.tensor([int(cell.configs[0][1] == best[cell.method])]) for cell in cells}
        return Said(said, torch.tensor([1]))

    monkeypatch.setattr(compare, "CANDIDATES", shapes)
    monkeypatch.setattr(compare, "listen", listen)
    part = data.Part(1, 1, iter(()))
    told = compare.choose(Made(), (OURS, RANDOM, "vid-TLDR, late"), (0.9, 0.6, 0.3), part)  # type: ignore[arg-type]
    assert told["chosen"] == best
    assert told["budgets"] == [0.6]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--out", "/dev/null/x", "--out /dev/null/x: /dev/null is no folder"),
        ("--picture", "quality.svg", "its name has to end in .png"),
        ("--picture", "/dev/null/quality.png", "/dev/null is no folder"),
    ],
)
def test_places_that_cannot_be_written_are_refused_first(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "record", None)
    assert message in error(("--model", "any", "--data", "any", option, value), capsys)


def test_clips_that_cannot_be_read_are_named_even_if_none_can(
    tmp_path: Path, named: Path, places: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = kinetics(tmp_path / "data", CLASS_NAMES, 1)
    for path in folder.glob("*/*.mp4"):
        path.write_bytes(b"no video")
    arguments = ("--model", str(named), "--data", str(folder), "--budgets", "0.75", "--batch", "1", *FEW, *places)
    assert main(("quality", *arguments)) == 2
    told = capsys.readouterr()
    assert "no clip could be read, for the reasons above" in told.err
    assert "skipped: " in told.out


def test_a_budget_that_no_shape_meets(named: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = kinetics(tmp_path / "data", CLASS_NAMES, 1)
    told = error(("--model", str(named), "--data", str(folder), "--budgets", "0.01", "--batch", "1"), capsys)
    assert "every site: cannot meet 0.01 of the dense GFLOPs, 0." in told
    assert "is the closest" in told


@pytest.mark.parametrize("budget", ["0", "1", "1.5", "-0.1", "nan"])
def test_no_budget(budget: str, named: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = kinetics(tmp_path / "data", CLASS_NAMES, 1)
    told = error(("--model", str(named), "--data", str(folder), f"--budgets={budget}"), capsys)
    assert "budget is the part of the dense operations that is left, between 0 and 1" in told


def test_a_budget_that_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["quality", "--model", "m", "--data", "d", "--budgets", "much"])
    assert "write a part of the dense operations" in capsys.readouterr().err


def test_weights_that_are_cut(named: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = named / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "ModelError" in (told := error(("--model", str(named), "--data", "any"), capsys))
    assert "cannot be had" in told


def test_weights_without_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    VideoMAEForPreTraining(config()).save_pretrained(tmp_path / "model")
    told = error(("--model", str(tmp_path / "model"), "--data", "any"), capsys)
    assert "has no weights for " in told
    assert "classifier.weight" in told


def test_what_misses_its_budget_is_not_timed() -> None:
    cells = [Cell(OURS, 0.5, (TokenMerging(),), 0.4), Cell(OURS, 0.1, (TokenMerging(),), 0.4, "far")]
    assert list(latency.calls({"dense": torch.nn.Identity()}, "dense", cells)) == [("dense", None), (OURS, 0.5)]
