"""A video language model that reads fewer tokens: its tower merges them, and the prompt has as many placeholders.

    python examples/video_language_model.py                                  tiny models with random weights
    python examples/video_language_model.py --model Qwen/Qwen2.5-VL-3B-Instruct --video clip.mp4 --ask "What happens?"

The tower is merged once for a size of clip. At every prompt it runs once, and then three things are shortened alike:
the placeholders in the prompt, the attention mask, and the 3-D positions, which stay those of the places that are left.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

import tldr_compile
from tldr_compile import Kept, MergedModule

SCHEDULE = 0.1  # of the tokens at every site of the tower


def merged_tower(tower: nn.Module, inputs: Mapping[str, Tensor], **options: Any) -> MergedModule:
    """`tower` for videos of the size of those in `inputs`, which is what the model's processor makes of a prompt."""
    seen = {"hidden_states": inputs["pixel_values_videos"], "grid_thw": inputs["video_grid_thw"]}
    return tldr_compile.apply(tower, kwargs=seen, outputs="merged", return_places=True, **options)


class Seen(nn.Module):
    """What a tower made of a prompt's videos, to stand in the place of the tower."""

    def __init__(self, tower: nn.Module, features: Any) -> None:
        super().__init__()
        self.dtype, self.spatial_merge_size = tower.dtype, tower.spatial_merge_size
        self.features = features

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        return copy.copy(self.features)  # the language model splits them by video, in place


def read(model: PreTrainedModel, tower: MergedModule, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run the tower and put what it saw into `model`; the prompt for it, as `model.generate` takes it."""
    videos = inputs["video_grid_thw"]
    features, kept = tower(inputs["pixel_values_videos"].to(tower.dtype), grid_thw=videos)
    model.model.visual = Seen(tower, features)
    if kept is None:  # nothing was merged
        return dict(inputs)
    if len(features.pooler_output) != kept.places.numel():
        raise ValueError("the blocks that the language model reads do not leave merged; tower.report says why")
    return shortened(model, inputs, kept, tower.spatial_merge_size)


def shortened(model: PreTrainedModel, inputs: Mapping[str, Tensor], kept: Kept, merge: int) -> dict[str, Tensor]:
    """A prompt without the placeholders of what was merged into another place.

    The language model counts placeholders by its video grid, `t * h * w / merge**2`: it gets one of as many.
    """
    ids, videos = inputs["input_ids"], inputs["video_grid_thw"]
    keep = ids != model.config.video_token_id
    placeholders = (~keep).flatten().nonzero()[:, 0]
    keep.view(-1)[placeholders[kept.places[0]]] = True
    short = {name: inputs[name][keep].reshape(len(ids), -1) for name in ("input_ids", "attention_mask")}

    mask = inputs["attention_mask"]
    kinds = inputs["mm_token_type_ids"]
    places, _ = model.model.get_rope_index(ids, mm_token_type_ids=kinds, video_grid_thw=videos, attention_mask=mask)
    text = (short["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    short["position_ids"] = torch.cat([text[None], places[:, keep].reshape(3, len(ids), -1)])

    left = kept.places.shape[1] // len(videos)
    short["video_grid_thw"] = videos.new_tensor([[1, merge, merge * left]] * len(videos))
    short["pixel_values_videos"] = inputs["pixel_values_videos"]
    return short


# --- models and prompts to try it on ---

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 200,
    "pad_token_id": 0,
}
SIGHT = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
TOKENS = {"image_token_id": 190, "video_token_id": 191, "vision_start_token_id": 192, "vision_end_token_id": 193}


def tiny_qwen2_5_vl() -> PreTrainedModel:
    """Windows, and all of a frame at one layer."""
    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    sight = SIGHT | {"window_size": 112, "fullatt_block_indexes": [1]}
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=sight, **TOKENS)).eval()


def tiny_qwen3_vl() -> PreTrainedModel:
    """All of a frame at every layer; what the first two layers see enters the language model, too."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    text = TEXT | {"rope_parameters": rope}
    sight = SIGHT | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    torch.manual_seed(0)
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=sight, **TOKENS)).eval()


def prompt(model: PreTrainedModel, grid: Sequence[int], seed: int = 0) -> dict[str, Tensor]:
    """A random video of `t, h, w` patches between words, laid out as the model's processor does."""
    t, h, w = grid
    sight, start, end = model.config.vision_config, model.config.vision_start_token_id, model.config.vision_end_token_id
    frame = [model.config.video_token_id] * (h * w // sight.spatial_merge_size**2)
    if model.config.model_type == "qwen3_vl":  # one by one, each after its time
        video = [token for at in range(t) for token in (10 + at, start, *frame, end)]
    else:
        video = [start, *frame * t, end]
    ids = torch.tensor([[1, 5, 6, *video, 7, 8, 9]])
    values = sight.in_channels * sight.temporal_patch_size * sight.patch_size**2
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == model.config.video_token_id) * 2,
        "pixel_values_videos": torch.randn(t * h * w, values, generator=torch.Generator().manual_seed(seed)),
        "video_grid_thw": torch.tensor([grid]),
    }


@torch.no_grad()
def tell(name: str, model: PreTrainedModel, inputs: Mapping[str, Tensor], schedule: Any, words: int) -> Tensor:
    """Generate from a merged video, and say what it was and what it became."""
    tower = merged_tower(model.model.visual, inputs, schedule=schedule)
    print(tower.report)
    before = inputs["input_ids"].shape[1]
    short = read(model, tower, inputs)
    answer: Tensor = model.generate(**short, max_new_tokens=words, do_sample=False)
    print(f"{name}: {before} tokens of prompt, {short['input_ids'].shape[1]} with the video merged")
    return answer[:, short["input_ids"].shape[1] :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a Qwen2.5-VL or Qwen3-VL model")
    parser.add_argument("--video", help="a video file")
    parser.add_argument("--ask", default="What happens in this video?")
    parser.add_argument("--schedule", type=float, default=SCHEDULE, help="of the tokens at every site (default: 0.1)")
    arguments = parser.parse_args()
    if arguments.model is None:
        for tiny in (tiny_qwen2_5_vl, tiny_qwen3_vl):
            model = tiny()
            print(tell(tiny.__name__, model, prompt(model, (2, 16, 16)), arguments.schedule, 8).tolist())
        return
    if arguments.video is None:
        parser.error("--model needs --video")
    processor = AutoProcessor.from_pretrained(arguments.model)
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype="auto").eval()
    content = [{"type": "video", "path": arguments.video}, {"type": "text", "text": arguments.ask}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    answer = tell(arguments.model, model, inputs, arguments.schedule, 128)
    print(processor.batch_decode(answer, skip_special_tokens=True)[0])


if __name__ == "__main__":
    main()
