from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from benchmarks.quality import clips, model, train
from benchmarks.quality.tasks import DIRECTION, ORDER
from benchmarks.quality.training import Settings, StateError, Training, contrast, rate
from tldr_compile.quality.accuracy import wilson

SETTINGS = Settings(size="base", steps=(20,), batch=8, seed=0, rate=2e-3)
MASKED = replace(SETTINGS, steps=(4,), task=ORDER.name, pretrain=4)
TINY = VideoMAEConfig(
    image_size=DIRECTION.size,
    num_frames=DIRECTION.frames,
    patch_size=16,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    num_labels=DIRECTION.classes,
)


def fresh() -> Training:
    return Training.fresh(SETTINGS, TINY)


@pytest.fixture
def masked(monkeypatch: pytest.MonkeyPatch) -> Training:
    """A run that predicts hidden pixels on 4 steps, then learns classes on 4, in batches of 8."""
    shape = {name: 32 if name.endswith("size") else 1 for name in model.SHAPES[ORDER.name]} | {"tubelet_size": 4}
    monkeypatch.setitem(model.SHAPES, ORDER.name, shape)
    monkeypatch.setitem(model.LAYERS, "base", 1)
    return Training.fresh(MASKED, model.config(ORDER, "base"))


def test_the_loss_falls_on_clips_seen_again() -> None:
    training = fresh()
    batch = training.clips()
    losses = [training.learn(batch)["loss"] for _ in range(20)]
    assert losses[0] == pytest.approx(math.log(80) + math.log(10) + math.log(8), abs=0.5)
    assert losses[-1] < losses[0] - 0.5


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    unbroken, first, second = fresh(), fresh(), fresh()
    train.train(unbroken, 20, tmp_path / "unbroken")
    train.train(first, 10, tmp_path / "broken")
    second.resume(tmp_path / "broken" / "state.pt")
    assert second.step == 10
    train.train(second, 20, tmp_path / "broken")
    for name, value in unbroken.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value, msg=name)
    assert not torch.equal(second.model.classifier.weight, first.model.classifier.weight)
    steps = [json.loads(line)["step"] for line in (tmp_path / "broken" / "log.jsonl").read_text().splitlines()]
    assert steps == [10, 20]


@pytest.mark.parametrize("content", [b"", b"no state", None])
def test_a_damaged_state_says_what_to_do(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "state.pt"
    fresh().save(path)
    path.write_bytes(path.read_bytes()[:-2000] if content is None else content)
    with pytest.raises(StateError, match=r"damaged.*delete .*state\.pt to start again"):
        fresh().resume(path)


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    fresh().save(path)
    other = Training.fresh(replace(SETTINGS, steps=(30,)), TINY)
    with pytest.raises(StateError, match=r"steps=\(20,\).*steps=\(30,\).*give its options"):
        other.resume(path)


def test_finish_writes_a_checkpoint_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "TEST_CLIPS", 80)
    training = fresh()
    train.train(training, 2, tmp_path / "work")
    train.finish(training, tmp_path / "out")
    loaded = VideoMAEForVideoClassification.from_pretrained(tmp_path / "out").eval()
    batch = clips.make(DIRECTION, "val", range(4))
    with torch.no_grad():
        assert torch.equal(loaded(batch.pixels).logits, training.model.eval()(batch.pixels).logits)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    low, high = metrics["test"]["joint_95"]
    assert low <= metrics["test"]["joint"] <= high
    assert f"{metrics['parameters']:,}" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "curve.png").stat().st_size > 0


def test_the_kept_model_does_what_its_card_says() -> None:
    kept = train.HERE / train.kept(train.RECIPES["direction"])
    tested = json.loads((kept / "metrics.json").read_text())["test"]
    assert tested["joint"] >= 0.9
    assert f"joint {100 * tested['joint']:.1f} %" in (kept / "README.md").read_text()
    assert sum(each.stat().st_size for each in kept.iterdir()) <= 10e6
    network = VideoMAEForVideoClassification.from_pretrained(kept)
    again = train.evaluate(network, DIRECTION, "test", 240)
    low, high = wilson(round(again["joint"] * 240), 240, z=4)
    assert low <= tested["joint"] <= high


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "'0' is not a positive whole number"),
        (["--steps=-5"], "'-5' is not a positive whole number"),
        (["--steps", "10", "0"], "'0' is not a positive whole number"),
        (["--batch", "0"], "'0' is not a positive whole number"),
        (["--rate", "nan"], "'nan' is no learning rate"),
        (["--rate=-1"], "'-1' is no learning rate"),
    ],
)
def test_no_training(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.main(arguments)
    assert message in capsys.readouterr().err


def test_a_checkpoint_of_another_run_is_not_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--steps", "100"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("train: StateError: ")
    assert "holds a checkpoint of Settings(size='base', steps=(" in told
    assert "name another folder with --out" in told


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(train, "TEST_CLIPS", 80)
    monkeypatch.setattr(train.model, "config", lambda task, size: TINY)
    arguments = ["--batch", "4", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--steps", "3"]
    assert train.main(arguments) == 0
    assert train.main([*arguments, "2"]) == 0
    assert "going on from step 3" in (said := capsys.readouterr().out)
    assert said.count("test accuracy ") == 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--size base --steps 3 2 --batch 4 --seed 0 --rate 0.0015" in card
    assert train.main(["--work", "/dev/null/x", "--out", str(tmp_path / "other")]) == 1
    assert "--work /dev/null/x: /dev/null is no folder" in capsys.readouterr().err


def test_hidden_tokens_are_the_same_places_at_all_times() -> None:
    hidden = model.tubes(model.config(ORDER, "base"), 8, seed=3)
    times = hidden.unflatten(1, (4, 64))
    assert torch.equal(times, times[:, :1].expand_as(times))
    assert hidden.sum(1).tolist() == [4 * 48] * 8
    assert len(hidden.unique(dim=0)) > 1
    assert not torch.equal(hidden, model.tubes(model.config(ORDER, "base"), 8, seed=4))


def test_pretraining_learns_hidden_pixels_and_hands_its_encoder_on(masked: Training) -> None:
    batch = masked.clips()
    with torch.no_grad():
        errors = [float(model.masked_loss(masked.model, batch.pixels, seed)) for seed in (0, 1)]
    assert errors[0] != errors[1]
    assert errors[0] == pytest.approx(1.0, abs=0.3)  # a pixel is normalised within its token
    before = masked.model.videomae.embeddings.patch_embeddings.projection.weight.clone()
    told = [masked.learn(batch) for _ in range(3)]
    assert told[-1].keys() == {"loss"}
    assert told[-1]["loss"] < told[0]["loss"]
    encoder = masked.model.videomae
    masked.learn(batch)
    assert isinstance(masked.model, VideoMAEForVideoClassification)
    for name, value in encoder.state_dict().items():
        assert torch.equal(masked.model.videomae.state_dict()[name], value), name
    assert not torch.equal(before, masked.model.videomae.embeddings.patch_embeddings.projection.weight)
    assert masked.learn(batch).keys() == {"loss", "joint", "first", "second"}


@pytest.mark.parametrize("broken", [2, 4, 6])
def test_both_phases_resume(masked: Training, broken: int, tmp_path: Path) -> None:
    first, second = (Training.fresh(MASKED, masked.model.config) for _ in range(2))
    train.train(masked, MASKED.total, tmp_path / "unbroken")
    train.train(first, broken, tmp_path / "broken")
    second.resume(tmp_path / "broken" / "state.pt")
    train.train(second, MASKED.total, tmp_path / "broken")
    torch.testing.assert_close(second.model.state_dict(), masked.model.state_dict())
    told = [json.loads(line) for line in (tmp_path / "unbroken" / "log.jsonl").read_text().splitlines()]
    assert [(each["step"], each["split"]) for each in told] == [(4, "pretrain"), (8, "train")]


def test_the_card_of_a_pretrained_model(masked: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "TEST_CLIPS", 80)
    train.train(masked, MASKED.total, tmp_path)
    told = train.finish(masked, tmp_path / "out")
    assert told["test"].keys() == {"clips", "loss", "joint", "first", "second", "joint_95"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "(256 tokens)" in card
    assert "4 steps that predict the pixels of hidden tokens (75 % of all" in card
    assert "--task order --pretrain 4" in card
    names = VideoMAEForVideoClassification.from_pretrained(tmp_path / "out").config.id2label
    assert list(names.values()) == list(ORDER.names)


def test_half_has_half_the_operations() -> None:
    base, half = (model.gflops(VideoMAEForVideoClassification(model.config(DIRECTION, size))) for size in model.SIZES)
    assert half / base == pytest.approx(0.5, abs=0.03)


def test_marginals_are_sums_of_probabilities() -> None:
    logits = torch.randn(3, 80)
    digit, direction = model.marginals(logits, DIRECTION)
    table = logits.softmax(1).reshape(3, 10, 8)
    torch.testing.assert_close(digit.softmax(1), table.sum(2))
    torch.testing.assert_close(direction.softmax(1), table.sum(1))


def test_measure_reads_digit_and_direction_off_the_class() -> None:
    logits = torch.eye(80)[[9, 9, 9]]
    told = model.measure(logits, torch.tensor([9, 8, 17]), DIRECTION)
    assert [told[part] for part in ("joint", "digit", "direction")] == pytest.approx((1 / 3, 2 / 3, 2 / 3))


def test_rate_warms_up_and_ends_at_nothing() -> None:
    rates = [rate(step, [1000], 1.0) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 20)
    assert max(rates) == rates[20] == 1.0
    assert rates[21:] == sorted(rates[21:], reverse=True)
    assert rates[-1] < 1e-4


def test_a_later_cycle_starts_again_at_half_the_rate() -> None:
    one = [rate(step, [1000], 1.0) for step in range(1000)]
    both = [rate(step, [1000, 500], 1.0) for step in range(1500)]
    assert both[:1000] == one
    assert both[1000:] == [rate(step, [500], 0.5) for step in range(500)]


def test_a_finished_run_goes_on_with_one_more_cycle(tmp_path: Path) -> None:
    first, second = fresh(), Training.fresh(replace(SETTINGS, steps=(20, 10)), TINY)
    train.train(first, 20, tmp_path)
    second.resume(tmp_path / "state.pt")
    assert second.step == 20
    torch.testing.assert_close(second.model.state_dict(), first.model.state_dict())
    second.save(tmp_path / "state.pt")
    with pytest.raises(StateError, match=r"steps=\(20, 10\).*steps=\(20,\)"):
        fresh().resume(tmp_path / "state.pt")


def test_contrast_grows_to_full() -> None:
    assert [contrast(step, 1000) for step in (0, 150, 300, 999)] == pytest.approx([0.1, 0.55, 1.0, 1.0])


def test_wilson() -> None:
    assert wilson(90, 100) == pytest.approx((0.8256, 0.9448), abs=1e-4)


def test_batches_hold_every_class() -> None:
    with pytest.raises(ValueError, match="multiple of 80"):
        next(train.batches(DIRECTION, "val", 100))
