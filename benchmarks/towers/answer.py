"""The first token of an answer: of all tokens of a video, of those left behind the tower, of those left inside it.

The three share all code but the choice of tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks import timing
from benchmarks.timing import Spread
from benchmarks.towers.sizes import CPU, Exported, Size
from examples import video_language_model as example
from tldr_compile import Kept
from tldr_compile.records.tables import grid, spread

DENSE, PRUNED, OURS = "all tokens", "pruned behind the tower", "ours, merged in the tower"
HEAD = ("row", "tower, ms", "language model, ms", "first token, ms", "this ÷ ours", "tokens of prompt")


class Pruned(nn.Module):
    """`tower`, behind which `keep` blocks of a video are left; called like a merged one."""

    def __init__(self, tower: Callable[..., Any], keep: int) -> None:
        super().__init__()
        self.tower, self.keep = tower, keep
        self.dtype, self.spatial_merge_size = tower.dtype, tower.spatial_merge_size  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor, grid_thw: Tensor) -> tuple[Any, Kept]:
        features, _ = self.tower(hidden_states, grid_thw=grid_thw)
        places = changed(features.pooler_output, int(grid_thw[0, 0]), self.keep)
        features.pooler_output = features.pooler_output[places]
        return features, Kept(places[None], torch.ones(1, self.keep))


def changed(features: Tensor, frames: int, keep: int) -> Tensor:
    """The `keep` blocks `[keep]`, ascending, least alike the one at their place in the frame before.

    As EVS (arXiv 2510.14624) chooses: by cosine similarity of the features `[N, C]` of a video, the first frame first.
    """
    frame = features.unflatten(0, (frames, -1))
    alike = cosine_similarity(frame[1:], frame[:-1], dim=-1)
    order = torch.cat([alike.new_full((1, alike.shape[1]), -2.0), alike]).flatten().argsort(stable=True)
    return order[:keep].sort().values


@dataclass
class Answer:
    """A call that reads a video and says the first token; it keeps how long the tower took, and the prompt's length."""

    model: PreTrainedModel
    tower: Callable[..., Any]
    inputs: Mapping[str, Tensor]
    tower_seconds: list[float] = field(default_factory=list)
    tokens: int = 0

    def __call__(self) -> Tensor:
        start = time.perf_counter()
        prompt = example.read(self.model, self.tower, self.inputs)  # type: ignore[arg-type]
        self.tower_seconds.append(time.perf_counter() - start)
        self.tokens = prompt["input_ids"].shape[1]
        scores: Tensor = self.model(**prompt, logits_to_keep=1).logits
        return scores


def answers(size: Size) -> dict[str, Answer]:
    """The three ways to a first token: towers are compiled, the language model is as it is."""
    torch.manual_seed(0)
    text = {**example.TEXT, **size.text}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=dict(size.sight), **example.TOKENS)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    inputs = example.prompt(model, size.grid)
    tower = model.model.visual
    seen = {"hidden_states": inputs["pixel_values_videos"], "grid_thw": inputs["video_grid_thw"]}
    merged = example.merged_tower(tower, inputs, schedule=size.schedule)
    dense = size.compiled(Exported(tower, seen))
    towers: dict[str, Callable[..., Any]]
    towers = {DENSE: dense, PRUNED: Pruned(dense, int(merged.tokens_out)), OURS: size.compiled(merged)}
    return {name: Answer(model, each, inputs) for name, each in towers.items()}


def rows(size: Size, rounds: int) -> list[dict[str, Any]]:
    """The three ways to a first token, in one alternating run."""
    calls = answers(size)
    taken = timing.in_turn(calls, CPU, rounds, "timing", first=2)

    def row(name: str, call: Answer) -> dict[str, Any]:
        tower = call.tower_seconds[-rounds:]
        return {
            "name": name,
            "tower": Spread.of(tower),
            "language": Spread.of([whole - part for whole, part in zip(taken[name], tower, strict=True)]),
            "first_token": Spread.of(taken[name]),
            "this_over_ours": timing.ratio(taken[name], taken[OURS]),
            "tokens": call.tokens,
        }

    return [row(name, call) for name, call in calls.items()]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table; latencies and ratios are min / median / max."""
    return grid(
        HEAD,
        (
            (
                row["name"],
                *(spread(row[part], 0, 1000) for part in ("tower", "language", "first_token")),
                spread(row["this_over_ours"], 2),
                str(row["tokens"]),
            )
            for row in rows
        ),
    )
