"""The smallest video transformer that merges: 18 tokens (2 x 3 x 3), two blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS, WIDTH, HEADS = 18, 16, 2


def clip(batch: int = 2) -> Tensor:
    """Random pixels `[batch, 3, 4, 12, 12]`; the same at every call."""
    return torch.randn(batch, 3, 4, 12, 12, generator=torch.Generator().manual_seed(1))


def attention(qkv: Tensor) -> Tensor:
    parts = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = parts[0], parts[1], parts[2]  # indexed, not unpacked: a symbolic trace cannot iterate
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(attention(self.qkv(self.norm1(x))))
        return x + self.mlp(self.norm2(x))


class Tiny(nn.Module):
    """`[B, 3, 4, 12, 12] -> [B, 5]`, or a dictionary with the tokens too."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv3d(3, WIDTH, (2, 4, 4), (2, 4, 4))
        self.positions = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 5)

    def embed(self, video: Tensor) -> Tensor:
        return self.patches(video).flatten(2).transpose(1, 2) + self.positions

    def forward(self, video: Tensor, tokens: bool = False) -> Tensor | dict[str, Tensor]:
        x = self.embed(video)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean(1))
        return {"logits": logits, "tokens": x} if tokens else logits
