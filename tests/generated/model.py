"""A transformer built from a recipe: every field of the recipe is one choice that real models make."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Recipe:
    """What to build. The grid is (frames, rows, columns) of patches; all sizes are small and often odd."""

    embed: str = "conv3d"  # conv3d, frames (a batch of frames), tokens (features [B, N, 12])
    grid: tuple[int, int, int] = (2, 3, 3)
    batch: int = 2
    before: int = 0  # protected tokens before and after
    after: int = 0
    position: str = "learned"  # none, learned, rotary
    layout: str = "batch"  # batch, sequence (first), grid (two dimensions of tokens)
    norm: str = "pre"  # pre, post, none
    branch: str = "serial"  # serial, parallel, scaled (LayerScale), frozen (a branch without attention)
    attention: str = "sdpa"  # sdpa, matmul, bmm, baddbmm, einsum, capped, module
    qkv: str = "fused"  # fused, split, grouped, normed
    bias: str = "none"  # none, relative, inplace
    mlp: str = "gelu"  # gelu, gated, mixing
    tail: str = "mean"  # mean, first, tokens, pooled, dense, states, skip, softmax, frames
    depth: int = 3
    seed: int = 0

    def __str__(self) -> str:
        default = Recipe()
        told = (
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != getattr(default, f.name)
        )
        return f"Recipe({', '.join(told)})"

    @property
    def tokens(self) -> int:
        t, h, w = self.grid
        return h * w * (1 if self.embed == "frames" else t) + self.before + self.after

    def inputs(self, batch: int | None = None) -> tuple[Tensor]:
        t, h, w = self.grid
        b = self.batch if batch is None else batch
        shape = {
            "conv3d": (b, 3, 2 * t, 4 * h, 4 * w),
            "frames": (b, t, 3, 4 * h, 4 * w),
            "tokens": (b, t * h * w, 12),
        }[self.embed]
        return (torch.randn(shape, generator=torch.Generator().manual_seed(self.seed)),)

    def build(self) -> Generated:
        torch.manual_seed(self.seed)
        model = Generated(self).eval()
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn_like(value) * 0.1)
        return model


WIDTH, HEADS = 16, 2


class Generated(nn.Module):
    """The model of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.conv3d = nn.Conv3d(3, WIDTH, (2, 4, 4), (2, 4, 4))
        self.conv2d = nn.Conv2d(3, WIDTH, 4, 4)
        self.linear = nn.Linear(12, WIDTH)
        self.first = nn.Parameter(torch.randn(1, max(recipe.before, 1), WIDTH))
        self.last = nn.Parameter(torch.randn(1, max(recipe.after, 1), WIDTH))
        self.table = nn.Parameter(torch.randn(1, recipe.tokens, WIDTH) * 0.3)
        self.blocks = nn.ModuleList(Block(recipe) for _ in range(recipe.depth))
        self.query = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.score = nn.Linear(WIDTH, 1)
        self.head = nn.Conv2d(WIDTH, 4, 3, padding=1)
        self.norm = nn.LayerNorm(WIDTH)

    def embedded(self, x: Tensor) -> Tensor:
        if self.recipe.embed == "conv3d":
            x = self.conv3d(x).flatten(2).transpose(1, 2)
        elif self.recipe.embed == "frames":
            x = self.conv2d(x.flatten(0, 1)).flatten(2).transpose(1, 2)
        else:
            x = self.linear(x)
        parts = [self.first.expand(x.shape[0], -1, -1)] if self.recipe.before else []
        parts += [x]
        parts += [self.last.expand(x.shape[0], -1, -1)] if self.recipe.after else []
        x = torch.cat(parts, 1)
        return x + self.table if self.recipe.position == "learned" else x

    def forward(self, x: Tensor) -> Any:
        x = self.embedded(x)
        if self.recipe.layout == "sequence":
            x = x.transpose(0, 1)
        if self.recipe.layout == "grid":
            x = x.reshape(x.shape[0], -1, self.recipe.grid[2], WIDTH)
        states = []
        for block in self.blocks:
            x = block(x)
            states.append(x)
        if self.recipe.layout == "sequence":
            x = x.transpose(0, 1)
        if self.recipe.layout == "grid":
            x = x.flatten(1, 2)
        return self.finished(self.norm(x), states)

    def finished(self, x: Tensor, states: list[Tensor]) -> Any:
        recipe = self.recipe
        clip = x[:, recipe.before : x.shape[1] - recipe.after]
        if recipe.tail == "mean":
            return x.mean(1)
        if recipe.tail == "first":
            return x[:, 0] if recipe.before else x.amax(1)
        if recipe.tail == "tokens":
            return {"tokens": x, "mean": clip.mean(1)}
        if recipe.tail == "pooled":
            query = self.query.expand(x.shape[0], -1, -1)
            return F.scaled_dot_product_attention(query[:, None], x[:, None], x[:, None])[:, 0, 0]
        if recipe.tail == "dense":
            rows = clip.transpose(1, 2).reshape(x.shape[0], WIDTH, -1, recipe.grid[2])
            return self.head(rows)
        if recipe.tail == "states":
            return x.mean(1), states
        if recipe.tail == "skip":
            return (states[0] + states[-1]).relu(), x
        if recipe.tail == "softmax":
            return (self.score(x).softmax(1) * x).sum(1)
        frames = x.reshape(-1, recipe.grid[0], *x.shape[1:]) if recipe.embed == "frames" else x[:, None]
        return frames.mean(1)


class Block(nn.Module):
    """Attention and an MLP around a residual stream."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.one = nn.LayerNorm(WIDTH) if recipe.norm != "none" else nn.Identity()
        self.two = nn.LayerNorm(WIDTH) if recipe.norm != "none" else nn.Identity()
        self.attention = Module(recipe) if recipe.attention == "module" else Attention(recipe)
        self.mlp = Mlp(recipe)
        self.scale = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.recipe.branch == "parallel":
            y = self.one(x)
            return x + self.attention(y) + self.mlp(y)
        if self.recipe.norm == "post":
            x = self.one(x + self.attention(x))
            return self.two(x + self.mlp(x))
        if self.recipe.branch == "scaled":
            x = x + self.scale * self.attention(self.one(x))
            return x + self.mlp(self.two(x)) * self.scale
        x = x + self.attention(self.one(x))
        return x + self.mlp(self.two(x))


class Mlp(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.up, self.gate, self.down = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.mix = nn.Linear(recipe.tokens, recipe.tokens)

    def forward(self, x: Tensor) -> Tensor:
        if self.recipe.mlp == "gated":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.recipe.mlp == "mixing" and self.recipe.layout == "batch":
            return self.mix(x.transpose(1, 2)).transpose(1, 2) * 0.1
        return self.down(F.gelu(self.up(x)))


class Module(nn.Module):
    """`nn.MultiheadAttention`, which knows both layouts of a sequence."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=recipe.layout != "sequence")

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1, 2) if x.ndim == 4 else x
        return self.attention(flat, flat, flat, need_weights=False)[0].reshape(x.shape)


class Attention(nn.Module):
    """Self-attention in one of the spellings."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.fused = nn.Linear(WIDTH, 3 * WIDTH)
        self.split = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.few = nn.ModuleList(nn.Linear(WIDTH, WIDTH // HEADS) for _ in range(2))
        self.normed = nn.LayerNorm(WIDTH // HEADS)
        self.relative = nn.Parameter(torch.randn(HEADS, recipe.tokens, recipe.tokens))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.transpose(0, 1) if self.recipe.layout == "sequence" else x.flatten(1, 2) if x.ndim == 4 else x
        q, k, v = self.heads(flat)
        if self.recipe.position == "rotary":
            q, k = rotated(q), rotated(k)
        y = self.attend(q, k, v).transpose(1, 2).reshape(flat.shape)
        y = y.transpose(0, 1) if self.recipe.layout == "sequence" else y.reshape(x.shape)
        return self.out(y)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        if self.recipe.qkv == "split":
            q, k, v = (each(x).view(b, n, HEADS, -1).transpose(1, 2) for each in self.split)
        elif self.recipe.qkv == "grouped":
            q = self.split[0](x).view(b, n, HEADS, -1).transpose(1, 2)
            k, v = (each(x).view(b, n, 1, -1).transpose(1, 2).expand(-1, HEADS, -1, -1) for each in self.few)
        else:
            q, k, v = self.fused(x).reshape(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        return (self.normed(q), self.normed(k), v) if self.recipe.qkv == "normed" else (q, k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.relative if self.recipe.bias == "relative" else None
        scale = q.shape[-1] ** -0.5
        if self.recipe.attention == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        if self.recipe.attention == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q * scale, k)
            return torch.einsum("bhij,bhjd->bhid", self.weighed(scores, bias), v)
        if self.recipe.attention in ("bmm", "baddbmm"):
            b, h, n, d = q.shape
            one, two, three = (each.reshape(b * h, n, -1) for each in (q, k, v))
            if self.recipe.attention == "baddbmm" and bias is not None:
                added = bias.repeat(b, 1, 1)
                return torch.bmm(torch.baddbmm(added, one, two.mT, alpha=scale).softmax(-1), three).view(b, h, n, d)
            return torch.bmm((torch.bmm(one, two.mT) * scale).softmax(-1), three).view(b, h, n, d)
        scores = (q @ k.transpose(-2, -1)) * scale
        if self.recipe.attention == "capped":
            scores = 5 * torch.tanh(scores / 5)
        return self.weighed(scores, bias) @ v

    def weighed(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            scores = scores + bias
        if self.recipe.bias == "inplace":
            scores = scores.clone()
            scores += self.relative[0]
        return F.dropout(scores.softmax(-1, dtype=torch.float32).to(scores.dtype), 0.1, self.training)


def rotated(x: Tensor) -> Tensor:
    """Rotary positions rebuilt from `arange`, half rotated."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * (0.3 ** torch.arange(half))[None]
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin
