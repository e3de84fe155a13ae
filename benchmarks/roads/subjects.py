"""The small models that all roads are tried with."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch._inductor import compile_fx
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

SCHEDULE = 0.2
QUICK = "TLDR_ROADS_WITHOUT_INDUCTOR"
"""Where this is set in the environment, merged graphs run as they are: the tests have no time for Inductor."""


def compiles() -> None:
    """Do as `QUICK` says in this process."""
    if QUICK in os.environ:
        compile_fx.compile_fx = lambda graph, *_, **__: graph.forward


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        rise, fall = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), rise, nn.GELU(), fall)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Encoder(nn.Module):
    """`[B, 3, 4, 32, 32] -> [B, 5]`, 32 tokens; the same weights in every process."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv3d(3, 32, (2, 8, 8), (2, 8, 8))
        self.blocks = nn.ModuleList(Block(32) for _ in range(depth))
        self.head = nn.Linear(32, 5)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.patches(clip).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean(1))
        return logits


def clips(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))


def videomae() -> VideoMAEForVideoClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = VideoMAEConfig(**sizes, image_size=32, patch_size=8, num_frames=4, num_labels=3)
    return VideoMAEForVideoClassification(config).eval()


def pixels(count: int = 2) -> Tensor:
    """As transformers lays them, `[B, T, 3, H, W]`."""
    return clips(count).transpose(1, 2).contiguous()
