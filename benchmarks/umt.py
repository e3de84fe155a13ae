"""A plain UMT video encoder: a ViT with joint space-time attention, written as a user would write it.

It knows nothing of token merging. Its parameter names are those of the published checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class UMTConfig:
    """Sizes of an encoder. `classes=0` returns the tokens; `hidden_states` returns every block's output beside them."""

    image: int = 224
    frames: int = 12
    patch: int = 16
    tubelet: int = 1
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: int = 4
    norm_eps: float = 1e-6
    classes: int = 0
    attn: Literal["sdpa", "eager"] = "sdpa"
    hidden_states: bool = False

    @property
    def tokens(self) -> int:
        """Number of space-time tokens of one clip."""
        return (self.frames // self.tubelet) * (self.image // self.patch) ** 2


Output: TypeAlias = "Tensor | tuple[Tensor, ...]"


class PatchEmbed(nn.Module):
    """Video `[B, 3, T, H, W]` to tokens `[B, t*h*w, C]`."""

    def __init__(self, config: UMTConfig) -> None:
        super().__init__()
        size = (config.tubelet, config.patch, config.patch)
        self.proj = nn.Conv3d(3, config.dim, kernel_size=size, stride=size)

    def forward(self, video: Tensor) -> Tensor:
        return self.proj(video).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention over tokens `[B, N, C]`; one projection, biases on queries and values only."""

    def __init__(self, config: UMTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.scale = (config.dim // config.heads) ** -0.5
        self.attn = config.attn
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.dim))
        self.v_bias = nn.Parameter(torch.zeros(config.dim))
        self.proj = nn.Linear(config.dim, config.dim)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, H, N, d]`."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def join(self, out: Tensor) -> Tensor:
        """Heads `[B, H, N, d]` back to `[B, N, C]`."""
        return self.proj(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads_of(x)
        if self.attn == "sdpa":
            return self.join(F.scaled_dot_product_attention(q, k, v))
        return self.join(((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v)


class Mlp(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block on tokens `[B, N, C]`."""

    def __init__(self, config: UMTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = Mlp(config.dim, config.mlp_ratio * config.dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UMT(nn.Module):
    """Video `[B, 3, T, H, W]` to tokens `[B, N, C]`, or to logits `[B, classes]` of the mean token."""

    pos_embed: Tensor

    def __init__(self, config: UMTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.register_buffer("pos_embed", sinusoid(config.tokens, config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.classes) if config.classes else nn.Identity()

    def embed(self, video: Tensor) -> Tensor:
        """Tokens `[B, N, C]` with their positions."""
        return self.patch_embed(video) + self.pos_embed

    def forward(self, video: Tensor) -> Output:
        x = self.embed(video)
        hidden: list[Tensor] = []
        for block in self.blocks:
            x = block(x)
            hidden.append(x)
        x = self.norm(x)
        out = self.head(x.mean(1)) if self.config.classes else x
        return (out, *hidden) if self.config.hidden_states else out


def sinusoid(tokens: int, dim: int) -> Tensor:
    """Fixed position table `[1, tokens, dim]`: sines on even channels, cosines on odd ones."""
    rates = torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
    angles = torch.arange(tokens).unsqueeze(1) * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :dim].unsqueeze(0)
