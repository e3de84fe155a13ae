"""Which clip a model reads, from its configuration; and what happens when the model cannot be had."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    TimesformerConfig,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VivitConfig,
    VJEPA2Config,
)

from tldr_compile.media import models
from tldr_compile.media.models import ModelError
from tldr_compile.media.video import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = VideoMAEConfig(**TINY, image_size=32, num_frames=4)
    VideoMAEForVideoClassification(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("attention", ["sdpa", "eager", None])
def test_a_local_folder(folder: Path, attention: str | None) -> None:
    subject = models.load(str(folder), attention=attention, seed=0)
    assert (subject.frames, subject.preprocessing) == (4, Preprocessing(32, (32, 32)))
    assert not subject.model.training
    assert subject.model.config._attn_implementation == (attention or "sdpa")
    assert "ImageNet" in subject.origin
    assert subject.model(torch.zeros(1, 4, 3, 32, 32)).logits.shape == (1, 2)


def test_a_folder_with_a_processor(folder: Path) -> None:
    said = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    subject = models.load(str(folder), attention="sdpa", seed=0)
    assert subject.preprocessing == Preprocessing(36, (32, 32), mean=(0.5, 0.5, 0.5))
    assert "its own processor" in subject.origin


def test_random_weights_are_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "VideoMAEConfig", lambda **given: VideoMAEConfig(**TINY, **given))
    first, again, other = (models.load(None, attention="sdpa", seed=seed) for seed in (3, 3, 4))
    assert "RANDOM weights (seed 3)" in first.origin
    assert (first.frames, first.preprocessing) == (16, Preprocessing(224, (224, 224)))
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.model.parameters(), other.model.parameters(), strict=True))


@pytest.mark.parametrize("config", [VideoMAEConfig(), VivitConfig(), TimesformerConfig(), VJEPA2Config()])
def test_frames_and_sides_of_configurations(config: object) -> None:
    expected = {"VideoMAEConfig": (16, 224), "VivitConfig": (32, 224), "TimesformerConfig": (8, 224)}
    said = models.said(config, models.FRAMES), models.said(config, models.SIDES)
    assert said == expected.get(type(config).__name__, (64, 256))


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be had: [^\n]*config\.json[^\n]*\nGive a local folder"):
        models.load(str(tmp_path), attention="sdpa", seed=0)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be had"):
        models.load(str(tmp_path / "gone"), attention="sdpa", seed=0)


def test_weights_that_are_cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be had"):
        models.load(str(folder), attention="sdpa", seed=0)


def test_a_model_of_no_clip() -> None:
    with pytest.raises(ModelError, match="SimpleNamespace has none of num_frames, frames_per_clip"):
        models.said(SimpleNamespace(image_size=224), models.FRAMES)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({}, Preprocessing(224, (224, 224), mean=IMAGENET_MEAN, std=IMAGENET_STD)),
        ({"size": 256, "crop_size": 224}, Preprocessing(256, (224, 224))),
        ({"size": {"height": 200, "width": 300}, "do_center_crop": False}, Preprocessing((200, 300), (200, 300))),
        (
            {"rescale_factor": 1 / 127.5, "offset": True, "do_normalize": False, "image_mean": [0.5] * 3},
            Preprocessing(224, (224, 224), scale=1 / 127.5, offset=1.0, mean=(0.0,) * 3, std=(1.0,) * 3),
        ),
        ({"do_rescale": False}, Preprocessing(224, (224, 224), scale=1.0)),
    ],
)
def test_preprocessing(processor: dict[str, object], expected: Preprocessing) -> None:
    assert models.preprocessing(processor, 224) == expected
