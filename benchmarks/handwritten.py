"""Token merging written by hand on the UMT encoder: what the compiler pass is compared with.

`vid-tldr` (arXiv 2403.13347, section 3) and `tome` (arXiv 2210.09461, section 3) materialise their attention maps, as
published; `slice` drops the last tokens and does nothing else, so it is the least that any reduction can cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.umt import UMT, Attention, Block, Output

Method = Literal["vid-tldr", "tome", "slice"]


class Encoded(NamedTuple):
    """Normed tokens `[B, N', C]`, their mass `[B, N', 1]` (None: all 1) and every block's output."""

    tokens: Tensor
    mass: Tensor | None
    hidden: tuple[Tensor, ...]


class Handwritten(nn.Module):
    """A UMT encoder, its weights shared, that removes `schedule[i]` tokens in block `i`."""

    def __init__(self, model: UMT, schedule: Sequence[int | float], method: Method) -> None:
        super().__init__()
        self.model = model
        self.schedule = (*schedule, *[0] * (len(model.blocks) - len(schedule)))
        self.method = method

    def encode(self, video: Tensor) -> Encoded:
        x, mass, hidden = self.model.embed(video), None, []
        blocks = cast("Iterable[Block]", self.model.blocks)
        for block, amount in zip(blocks, self.schedule, strict=True):
            remove = removed(amount, x.shape[1])
            if self.method == "slice":
                x = slice_block(block, x, remove)
            else:
                x, mass = merge_block(block, x, mass, remove, salient=self.method == "vid-tldr")
            hidden.append(x)
        return Encoded(self.model.norm(x), mass, tuple(hidden))

    def forward(self, video: Tensor) -> Output:
        x, mass, hidden = self.encode(video)
        out = self.model.head(mean(x, mass)) if self.model.config.classes else x
        return (out, *hidden) if self.model.config.hidden_states else out


def removed(amount: int | float, tokens: int) -> int:
    """How many of `tokens` a schedule entry removes: at most half."""
    return min(int(amount * tokens) if isinstance(amount, float) else amount, tokens // 2)


def slice_block(block: Block, x: Tensor, remove: int) -> Tensor:
    x = x + block.attn(block.norm1(x))
    x = x[:, : x.shape[1] - remove]
    return x + block.mlp(block.norm2(x))


def merge_block(
    block: Block, x: Tensor, mass: Tensor | None, remove: int, *, salient: bool
) -> tuple[Tensor, Tensor | None]:
    out, scores, keys = attention(block.attn, block.norm1(x), mass)
    x = x + out
    if remove:
        mass = x.new_ones(*x.shape[:2], 1, dtype=torch.float32) if mass is None else mass
        weight = saliency(scores) if salient else torch.ones_like(mass)
        x, mass = merge(x, mass, weight, x if salient else keys.mean(1), remove)
    return x + block.mlp(block.norm2(x)), mass


def attention(layer: Attention, x: Tensor, mass: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, N, C]`, scores `[B, H, N, N]` without the mass, keys `[B, H, N, d]`."""
    q, k, v = layer.heads_of(x)
    scores = (q * layer.scale) @ k.transpose(-2, -1)
    weighed = scores if mass is None else scores + mass.log().to(scores.dtype).mT.unsqueeze(1)
    return layer.join(weighed.softmax(-1) @ v), scores, k


def saliency(scores: Tensor) -> Tensor:
    """Saliency `[B, N, 1]` in float32 of scores `[B, H, N, N]`: sharpness above its mean, 1 for the sharpest token."""
    attended = scores.softmax(-1, dtype=torch.float32).mean(1)
    sharpness = torch.xlogy(attended, attended).sum(-1, keepdim=True)
    above = (sharpness - sharpness.mean(1, keepdim=True)).clamp(min=0)
    top = above.amax(1, keepdim=True)
    return torch.where(top > 0, above / top, 1.0)


def merge(x: Tensor, mass: Tensor, weight: Tensor, metric: Tensor, remove: int) -> tuple[Tensor, Tensor]:
    """Merge the `remove` even tokens closest to an odd one: `[B, N, C]` to `[B, N - remove, C]`, and the mass."""
    metric = F.normalize(metric.float(), dim=-1)
    best, target = (metric[:, ::2] @ metric[:, 1::2].mT).max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True).unsqueeze(-1)
    leaving, staying = order[:, :remove], order[:, remove:].sort(1).values
    target = target.unsqueeze(-1).gather(1, leaving)

    def combine(values: Tensor, source_values: Tensor) -> Tensor:
        channels = values.shape[-1]
        sources, targets = values[:, ::2], values[:, 1::2]
        moved = source_values.gather(1, leaving.expand(-1, -1, channels))
        targets = targets.scatter_add(1, target.expand(-1, -1, channels), moved)
        return torch.cat((sources.gather(1, staying.expand(-1, -1, channels)), targets), dim=1)

    weighed = mass * x.float()
    sources = weight[:, ::2]
    merged_mass = combine(mass, sources * mass[:, ::2])
    merged = combine(weighed, sources * weighed[:, ::2]) / merged_mass
    return merged.to(x.dtype), merged_mass


def mean(x: Tensor, mass: Tensor | None) -> Tensor:
    """Mean `[B, C]` over tokens `[B, N, C]`, weighted by mass."""
    return x.mean(1) if mass is None else ((mass * x.float()).sum(1) / mass.sum(1)).to(x.dtype)
