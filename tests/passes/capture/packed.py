"""A tower whose frames are packed one behind the other in rows, with attention inside frames spelled in many ways."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

FRAMES, PER_FRAME, PIXELS, WIDTH, HEADS = 3, 12, 10, 16, 2
UNEQUAL = (10, 14, 12)


def rows() -> Tensor:
    """Pixels of patches `[frames * patches, pixels]`; the same at every call."""
    return torch.randn(FRAMES * PER_FRAME, PIXELS, generator=torch.Generator().manual_seed(2))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
    weights = F.dropout(scores.softmax(-1).to(q.dtype), 0.1, training=False)
    return (weights @ v).transpose(1, 2).contiguous()


def in_frames(kind: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention inside frames, of heads `[T, H, d]`."""
    if kind.startswith("varlen"):
        length = max(UNEQUAL) if "different" in kind else PER_FRAME
        at = torch.arange(FRAMES + 1, dtype=torch.int32) * PER_FRAME
        return varlen_attn(q, k, v, at, at, length, length)
    if kind == "batched":
        q, k, v = (each.unflatten(0, (FRAMES, PER_FRAME)).transpose(1, 2) for each in (q, k, v))
        return attend(q, k, v).flatten(0, 1)
    lengths = UNEQUAL if "different" in kind else (PER_FRAME,) * FRAMES
    heads = (each.transpose(0, 1).unsqueeze(0) for each in (q, k, v))
    pieces = zip(*(torch.split(each, list(lengths), dim=2) for each in heads), strict=True)
    one = by_hand if "by hand" in kind else attend
    return torch.cat([one(*each) for each in pieces], 1)[0]


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).unbind(1)
        x = x + self.out(in_frames(self.kind, q, k, v).flatten(1))
        return x + self.mlp(self.norm2(x))


class Tower(nn.Module):
    """`[T, pixels] -> [T, width]`, all frames in one row of tokens; its weights are the same for every `kind`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(PIXELS, WIDTH)
        self.blocks = nn.ModuleList(Block(kind) for _ in range(2))
        self.eval()

    def forward(self, rows: Tensor) -> Tensor:
        x = self.embed(rows)
        for block in self.blocks:
            x = block(x)
        return x
