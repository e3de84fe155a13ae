"""Whole video language models with a merged tower: as the example puts it there, and by its attributes alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
)

import tldr_compile
from examples import video_language_model as example

GRID = (2, 16, 16)
QWEN = [example.tiny_qwen2_5_vl, example.tiny_qwen3_vl]
Tiny = Callable[[], PreTrainedModel]


def generated(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        tokens: Tensor = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return tokens[:, -4:]


def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


@pytest.mark.parametrize("tiny", QWEN)
def test_a_schedule_of_zeros_gives_what_the_model_gives(tiny: Tiny) -> None:
    model = tiny()
    inputs = example.prompt(model, GRID)
    expected, words = logits(model, inputs), generated(model, inputs)
    tower = example.merged_tower(model.model.visual, inputs, schedule=0.0)
    with torch.no_grad():
        short = example.read(model, tower, inputs)
    assert torch.equal(logits(model, short), expected)
    assert torch.equal(generated(model, short), words)


@pytest.mark.parametrize("tiny", QWEN)
def test_the_prompt_has_a_placeholder_for_every_token_that_is_left(tiny: Tiny) -> None:
    model = tiny()
    inputs = example.prompt(model, GRID)
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], video_grid_thw=inputs["video_grid_thw"]
    )
    tower = example.merged_tower(model.model.visual, inputs, schedule=0.2)
    with torch.no_grad():
        short = example.read(model, tower, inputs)
    is_video = short["input_ids"] == model.config.video_token_id
    assert int(is_video.sum()) == tower.tokens_out < 128
    assert set(_columns(short["position_ids"][1:, is_video])) < set(_columns(positions[:, 0]))
    text = short["position_ids"][1:, ~is_video]
    assert torch.equal(text, positions[:, inputs["input_ids"] != model.config.video_token_id])
    assert logits(model, short).isfinite().all()
    assert generated(model, short).shape == (1, 4)


def _columns(positions: Tensor) -> list[tuple[int, ...]]:
    return [tuple(each) for each in positions.flatten(1).T.tolist()]


@pytest.mark.parametrize("tiny", QWEN)
def test_what_leaves_is_what_was_restored_at_the_places_that_are_left(tiny: Tiny) -> None:
    """The merged features are those of the same tower with its outputs restored, place by place and in order."""
    model = tiny()
    inputs = example.prompt(model, GRID)
    tower = example.merged_tower(model.model.visual, inputs, schedule=0.2, grouping="blocks")
    seen = {"hidden_states": inputs["pixel_values_videos"], "grid_thw": inputs["video_grid_thw"]}
    restored = tldr_compile.apply(model.model.visual, kwargs=seen, schedule=0.2, grouping="blocks")
    with torch.no_grad():
        features, kept = tower(**seen)
        full = restored(**seen).pooler_output
    places = kept.places[0]
    assert kept.places.shape == kept.weights.shape == (1, tower.tokens_out)
    assert bool((places.diff() > 0).all())
    assert torch.allclose(features.pooler_output, full[places], atol=1e-6)
    frames = places // 64
    assert torch.equal(frames.bincount(), torch.full((2,), len(places) // 2)), "as many of every frame"
    deep = getattr(features, "deepstack_features", None) or []
    assert all(each.shape == features.pooler_output.shape for each in deep)
    assert kept.weights.min() >= 1


@pytest.mark.parametrize("tiny", QWEN)
def test_no_frame_changes_another(tiny: Tiny) -> None:
    model = tiny()
    inputs = example.prompt(model, GRID)
    tower = example.merged_tower(model.model.visual, inputs, schedule=0.2)
    pixels = inputs["pixel_values_videos"]
    other = torch.cat([pixels[:256], example.prompt(model, GRID, seed=1)["pixel_values_videos"][256:]])
    with torch.no_grad():
        (one, kept), (two, also) = (tower(each, grid_thw=inputs["video_grid_thw"]) for each in (pixels, other))
    half = int(tower.tokens_out) // 2
    assert torch.equal(kept.places[0, :half], also.places[0, :half])
    assert torch.equal(one.pooler_output[:half], two.pooler_output[:half])
    assert not torch.equal(one.pooler_output[half:], two.pooler_output[half:])


def test_two_prompts_are_each_as_they_are_alone() -> None:
    model = example.tiny_qwen3_vl()
    visual = model.model.visual
    alone = [example.prompt(model, GRID, seed) for seed in (0, 1)]
    both = {name: torch.cat([each[name] for each in alone]) for name in alone[0]}
    found = []
    for inputs in (*alone, both):
        with torch.no_grad():
            tower = example.merged_tower(visual, inputs, schedule=0.2)
            found.append(logits(model, example.read(model, tower, inputs)))
    assert torch.allclose(torch.cat(found[:2]), found[2], atol=1e-5)


def test_the_report_says_how_many_to_expect() -> None:
    model = example.tiny_qwen3_vl()
    inputs = example.prompt(model, GRID)
    tower = example.merged_tower(model.model.visual, inputs, schedule=0.2)
    assert f"with {tower.tokens_out} of 128 entries" in str(tower.report)


# --- models whose frames are pictures of a batch ---


TEXT = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "pad_token_id": 0,
}


class Sight(nn.Module):
    """All that a language model does to pictures before it reads them: tower, blocks of 2 x 2, projector."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = self.model.get_image_features(pixel_values).pooler_output
        return features


def internvl() -> PreTrainedModel:
    sight = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    sight |= {"image_size": [64, 64], "patch_size": [8, 8]}
    torch.manual_seed(0)
    config = InternVLConfig(vision_config=sight, text_config=TEXT, image_token_id=190)
    return InternVLForConditionalGeneration(config).eval()


def test_frames_of_a_batch_leave_in_blocks() -> None:
    """A model like InternVL: its tower's tokens are joined in blocks of 2 x 2 and projected."""
    model = internvl()
    frames = torch.randn(3, 3, 64, 64)
    sight = tldr_compile.apply(
        Sight(model.model), (frames,), schedule=0.2, outputs="merged", return_places=True, verify=True
    )
    with torch.no_grad():
        features, kept = sight(frames)
    assert features.shape == (3, sight.tokens_out, 64)
    assert kept.places.shape == (3, sight.tokens_out)
    ids = torch.tensor([[1, *[190] * int(kept.places.numel()), 7, 8]])
    embeds = model.get_input_embeddings()(ids).masked_scatter((ids == 190)[..., None], features)
    assert generated(model, {"inputs_embeds": embeds}).shape == (1, 4)


def llava_onevision() -> PreTrainedModel:
    sight = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
        "vision_use_head": False,
    }
    torch.manual_seed(0)
    config = LlavaOnevisionConfig(vision_config=sight, text_config=TEXT, image_token_id=190, video_token_id=191)
    return LlavaOnevisionForConditionalGeneration(config).eval()


@pytest.mark.parametrize("schedule", [0.0, 0.2])
def test_a_merged_tower_stands_where_the_tower_was(schedule: float) -> None:
    """A model like LLaVA-OneVision, which resizes what its tower gives on the grid: outputs have their length back."""
    model = llava_onevision()
    video = torch.randn(1, 2, 3, 64, 64)
    ids = torch.tensor([[1, *[191] * (2 * 16 + 1), 7, 8]])
    inputs = {"input_ids": ids, "pixel_values_videos": video, "attention_mask": torch.ones_like(ids)}
    expected, words = logits(model, inputs), generated(model, inputs)
    asked = {"output_hidden_states": -1, "return_dict": True, "vision_aspect_ratio": "anyres_max_9"}  # by the model
    model.model.vision_tower = tldr_compile.apply(model.model.vision_tower, (video[0],), asked, schedule=schedule)
    actual = logits(model, inputs)
    assert actual.shape == expected.shape
    assert torch.equal(actual, expected) == (schedule == 0)
    assert schedule != 0 or torch.equal(generated(model, inputs), words)
