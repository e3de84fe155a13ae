"""The command as it is typed: what it refuses before anything is compiled, and one whole run on a small model."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from tests.media.test_video import encode, noise
from tldr_compile import __version__
from tldr_compile.cli import main as cli
from tldr_compile.cli import run


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return encode(tmp_path / "clip.mp4", noise(8, 40, 56))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = VideoMAEConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_frames=4,
    )
    VideoMAEForVideoClassification(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **options: object) -> None:
        raise AssertionError("compiled before the input was checked")

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setattr(run.tldr_compile, "apply", refuse)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("600,200,100", (600, 200, 100)),
        ("0.25,0.12", (0.25, 0.12)),
        ("0,0.5", (0, 0.5)),
        ("0.1", 0.1),
        ("8", (8,)),
        ("-1,2", (-1, 2)),
    ],
)
def test_schedules_as_typed(text: str, expected: object) -> None:
    read = cli.schedule(text)
    assert read == expected
    assert type(read) is type(expected)


def test_what_was_said_of_merging_is_handed_on() -> None:
    typed = ["run", "--budget", "0.6", "--preset", "vid-tldr-umt-b", "--config", "options.json"]
    expected = {"budget": 0.6, "preset": "vid-tldr-umt-b", "config": Path("options.json")}
    assert cli.options(cli.parser().parse_args(typed)) == expected
    assert cli.options(cli.parser().parse_args(["run"])) == {}


@pytest.mark.parametrize("text", ["", "a lot", "1,,2", "1;2"])
def test_no_schedule(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a schedule"):
        cli.schedule(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: command"),
        (["walk"], "invalid choice: 'walk'"),
        (["run", "--repeats", "0"], "'0' is not a positive whole number"),
        (["run", "--attn", "flash"], "invalid choice: 'flash'"),
        (["run", "--video", "http://host/a.mp4"], "argument --video: 'http://host/a.mp4' is an address: give the path"),
        (["run", "--video", "s3://bucket/a.mp4"], "argument --video: 's3://bucket/a.mp4' is an address: give the path"),
        (["run", "--video", "-"], "argument --video: '-' names no file, and `tldr` neither reads nor writes streams"),
        (["run", "--video", ""], "argument --video: '' names no file"),
        (["run", "--out", "https://host/a.png"], "argument --out: 'https://host/a.png' is an address: give the path"),
        (["run", "--out", "-"], "argument --out: '-' names no file"),
        (["run", "--budget", "half"], "argument --budget: 'half' is no budget: write a part of the dense operations"),
    ],
)
def test_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "1.5"], "ScheduleError"),
        (["--schedule=-3"], "ScheduleError"),
        (["--schedule", "nan"], "ScheduleError"),
        (["--budget", "1.5"], "OptionError: budget=1.5: budget is the part of the dense operations"),
        (["--budget", "0.5", "--schedule", "0.1"], "OptionError: budget=0.5 is given together with a schedule"),
        (["--preset", "umt"], "OptionError: preset='umt': preset is one of"),
        (["--config", "gone.json"], "OptionError: config='gone.json' cannot be read"),
        (["--device", "quantum"], "OptionError: --device quantum"),
        (["--out", "gone/tldr.png"], "OptionError: --out gone/tldr.png: there is no folder gone"),
        (["--out", "tldr.jpg"], "OptionError: --out tldr.jpg: pictures are PNG files"),
        (["--out", "/dev/null/x.png"], "OptionError: --out /dev/null/x.png: there is no folder /dev/null"),
        (["--video", "gone.mp4"], "VideoError: gone.mp4: there is no such file"),
        (["--video", "tests"], "VideoError: tests: that is a folder; name one video file in it"),
        (["--video", "/dev/null"], "VideoError: /dev/null: a stream or a device; a clip is read twice"),
        (["--model", "./gone"], "ModelError: --model ./gone cannot be had"),
        (["--model", "pyproject.toml"], "ModelError: --model pyproject.toml is a file: give the folder that holds"),
        (["--model", "https://host/a/b"], "ModelError: --model https://host/a/b is an address: give the hub id alone"),
    ],
)
@pytest.mark.usefixtures("nothing_compiles")
def test_refused_before_anything_is_compiled(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", *arguments]) == 2
    assert f"tldr: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pictures", "pictures.png"])
@pytest.mark.usefixtures("nothing_compiles")
def test_a_folder_to_write_to(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / name
    folder.mkdir()
    assert cli.main(["run", "--out", str(folder)]) == 2
    assert capsys.readouterr().err == f"tldr: OptionError: --out {folder}: that is a folder; name a file in it\n"


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "run", lambda arguments: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as a process of its own has it
    try:
        assert cli.main(["run"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr() == ("", "tldr: interrupted\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"tldr-compile {__version__}\n"


@pytest.mark.usefixtures("nothing_compiles")
def test_a_clip_that_is_too_short(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = encode(tmp_path / "short.mp4", noise(3))
    assert cli.main(["run", "--video", str(path), "--model", str(folder)]) == 2
    assert "too short: it has 3 frames, and the model reads a clip of 4" in capsys.readouterr().err


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delattr("tldr_compile.cli.run")
    monkeypatch.delitem(sys.modules, "tldr_compile.cli.run")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main(["run"]) == 2
    assert "pip install 'tldr-compile[demo]'" in capsys.readouterr().err


def test_answers() -> None:
    logits = torch.tensor([[0.0, 3.0, 0.0]])
    assert run.answer(logits, {1: "7 NE"}) == "7 NE (90.9%)"
    assert run.answer(logits, {}) == "class 1 (90.9%)"


def test_a_whole_run(tmp_path: Path, clip: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.png"
    arguments = ["--video", str(clip), "--model", str(folder), "--repeats", "2", "--out", str(out)]
    assert cli.main(["run", "--schedule", "8,4", *arguments]) == 0
    said = capsys.readouterr().out
    assert "4 of 8 frames, 32 x 32" in said
    assert re.search(r"dense +[\d.]+ ms", said)
    assert re.search(r"tldr +[\d.]+ ms", said)
    before, after = map(float, re.findall(r"GFLOPs in matrix products: ([\d.]+) -> ([\d.]+)", said)[0])
    assert after < before
    largest = float(re.findall(r"logits apart +largest ([\d.e-]+)", said)[0])
    assert 0 < largest < 1
    assert re.findall(r"answer  (dense|tldr) +LABEL_[01] \([\d.]+%\)", said) == ["dense", "tldr"]
    assert Image.open(out).size[0] == 2 * (160 + 4) + 4
    assert np.asarray(Image.open(out)).std() > 10


def test_a_model_is_written_and_read_without_this_package(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "model.pt2"
    arguments = ["export", "--model", str(folder), "--budget", "0.8", "--most-clips", "4", "--format", "pt2"]
    assert cli.main([*arguments, "--out", str(written)]) == 0
    out = capsys.readouterr().out
    assert "1 to 4 clips [B, 4, 3, 32, 32] in, logits out" in out
    told = (tmp_path / "model.pt2.txt").read_text(encoding="utf-8")
    assert "saliency, matching, merge to n1" in told
    fraction = float(re.findall(r"budget 0\.8 of the dense operations: one fraction ([\d.]+)", told)[0])
    clips = torch.randn(3, 4, 3, 32, 32)
    model = VideoMAEForVideoClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        merged = run.tldr_compile.apply(model, (clips,), schedule=fraction)
        torch.testing.assert_close(torch.export.load(written).module()(clips), merged(clips).logits)


@pytest.mark.usefixtures("nothing_compiles")
def test_a_file_that_no_format_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "--format", "onnx", "--out", str(tmp_path / "model.pt2")]) == 2
    assert "a file in the format onnx has to end in .onnx" in capsys.readouterr().err
    assert cli.main(["export", "--format", "onnx", "--native", "--out", str(tmp_path / "model.onnx")]) == 2
    assert "--native: onnxruntime knows no operators of torch; use the format aoti or pt2" in capsys.readouterr().err
