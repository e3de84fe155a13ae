"""Self-attention in the spellings that real models use."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.generated.recipe import WIDTH, Recipe

HEADS = 4
SMALL = WIDTH // HEADS


class Module(nn.Module):
    """`nn.MultiheadAttention`, which knows both layouts of a sequence."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=recipe.layout != "sequence")

    def forward(self, x: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        flat = laid(x, self.recipe)
        padding = None if keep is None else ~keep
        asked = self.recipe.tail == "attentions"
        y, weights = self.attention(flat, flat, flat, key_padding_mask=padding, need_weights=asked)
        return y.reshape(x.shape), weights


class Attention(nn.Module):
    """Projections to heads, and one spelling of what is between them and the output."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.fused = nn.Linear(WIDTH, 3 * WIDTH)
        self.split = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.few = nn.ModuleList(nn.Linear(WIDTH, 2 * SMALL) for _ in range(2))
        self.one = nn.ModuleList(nn.Linear(WIDTH, SMALL) for _ in range(2))
        self.norm = nn.LayerNorm(SMALL)
        self.relative = nn.Parameter(torch.randn(HEADS, recipe.tokens, recipe.tokens))
        self.sink = nn.Parameter(torch.randn(HEADS))
        self.talk = nn.Linear(HEADS, HEADS)
        self.out = nn.Linear(WIDTH, WIDTH)
        cos, sin = angles(recipe)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        if recipe.qkv == "prompted":
            self.prompt = nn.Parameter(torch.randn(2, 1, HEADS, 2, SMALL))

    def forward(self, x: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        flat = x.transpose(0, 1) if self.recipe.layout == "sequence" else laid(x, self.recipe)
        q, k, v = self.heads(flat)
        if self.recipe.position in ("arange", "table", "axial"):
            cos, sin = angles(self.recipe) if self.recipe.position == "arange" else (self.cos, self.sin)
            q, k = (rotated(each, cos.to(each.dtype), sin.to(each.dtype)) for each in (q, k))
        if self.recipe.qkv == "prompted":
            added = [each.expand(k.shape[0], -1, -1, -1) for each in self.prompt.unbind(0)]
            k, v = (torch.cat(both, 2) for both in zip(added, (k, v), strict=True))
        y, weights = self.attend(q, k, v, self.mask(keep))
        y = y.transpose(1, 2).reshape(flat.shape)
        y = y.transpose(0, 1) if self.recipe.layout == "sequence" else y.reshape(x.shape)
        return self.out(y), weights

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        if self.recipe.qkv == "split":
            q, k, v = (each(x).view(b, n, HEADS, -1).transpose(1, 2) for each in self.split)
        elif self.recipe.qkv == "grouped":
            q = self.split[0](x).view(b, n, HEADS, -1).transpose(1, 2)
            k, v = (each(x).view(b, n, 2, -1).transpose(1, 2) for each in self.few)
            if self.recipe.attention != "sdpa":
                k, v = (each.repeat_interleave(HEADS // 2, 1) for each in (k, v))
        elif self.recipe.qkv == "multiquery":
            q = self.split[0](x).view(b, n, HEADS, -1).transpose(1, 2)
            k, v = (each(x).view(b, n, 1, -1).transpose(1, 2).expand(-1, HEADS, -1, -1) for each in self.one)
        else:
            q, k, v = self.fused(x).reshape(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        return (self.norm(q), self.norm(k), v) if self.recipe.qkv == "normed" else (q, k, v)

    def mask(self, keep: Tensor | None) -> Tensor | None:
        if self.recipe.bias == "causal":
            return torch.ones(self.recipe.tokens, self.recipe.tokens, dtype=torch.bool).tril()
        if keep is not None:
            return keep[:, None, None]
        return self.relative if self.recipe.bias == "relative" else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The output `[B, H, N, d]` and, where they exist, the probabilities."""
        spelling = self.recipe.attention
        if spelling == "sdpa":
            grouped = self.recipe.qkv == "grouped"
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped), None
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
        if spelling in ("bmm", "baddbmm"):
            return self.batched(q, k, v, mask)
        q, k, after = self.scaled(q, k)
        if spelling == "einsum":
            weights = self.weighed(torch.einsum("bhid,bhjd->bhij", q, k) * after, mask)
            return torch.einsum("bhij,bhjd->bhid", weights, v), weights
        scores = q @ k.transpose(-2, -1)
        scores = scores / (1 / after) if self.recipe.scale == "divided" else scores * after
        if spelling == "capped":
            scores = 5 * torch.tanh(scores / 5)
        if spelling == "talking":
            scores = self.talk(scores.transpose(1, 3)).transpose(1, 3)
        if spelling == "sinks":
            beside = self.sink.view(1, HEADS, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
            weights = self.weighed(torch.cat([scores, beside], -1), None)[..., :-1]
        else:
            weights = self.weighed(scores, mask)
        return weights @ v, weights

    def scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float]:
        if self.recipe.scale == "before":
            return q * SMALL**-0.5, k, 1.0
        if self.recipe.scale == "both":
            return q * SMALL**-0.25, k * SMALL**-0.25, 1.0
        return q, k, SMALL**-0.5

    def batched(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        b, h, n, d = q.shape
        one, two, three = (each.reshape(b * h, each.shape[2], -1) for each in (q, k, v))
        if self.recipe.attention == "baddbmm" and mask is not None:
            added = mask.expand(b, h, n, n).reshape(b * h, n, n)
            weights = torch.baddbmm(added, one, two.mT, alpha=SMALL**-0.5).softmax(-1)
        else:
            scores = torch.bmm(one, two.mT) * SMALL**-0.5
            weights = (scores if mask is None else (scores.view(b, h, n, -1) + mask).view(scores.shape)).softmax(-1)
        return torch.bmm(weights, three).view(b, h, n, d), weights.view(b, h, n, -1)

    def weighed(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            scores = scores + mask
        if self.recipe.bias == "inplace":
            scores = scores.clone()
            scores += self.relative[0, 0, 0]
        return F.dropout(scores.softmax(-1, dtype=torch.float32).to(scores.dtype), 0.1, self.training)


def laid(x: Tensor, recipe: Recipe) -> Tensor:
    """`[B, N, C]` of a grid, and of all samples in one row."""
    if recipe.layout == "packed":
        return x.reshape(-1, recipe.tokens, WIDTH)
    return x.flatten(1, 2) if x.ndim == 4 else x


def angles(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Rotary cosines and sines `[N, d]`: by place in the sequence, or axial, by frame, row and column."""
    place = torch.arange(recipe.tokens)
    if recipe.position == "axial":
        t, h, w = (1 if recipe.per_frame else recipe.grid[0], *recipe.grid[1:])
        axes = torch.meshgrid(*map(torch.arange, (t, h, w)), indexing="ij")
        clip = torch.stack([axes[0] * 2 + axes[1], axes[2]], -1).flatten(0, 2)
        angle = F.pad(clip, (0, 0, recipe.leading, recipe.after)).float()
    else:
        angle = place[:, None] * (0.3 ** torch.arange(SMALL // 2))[None]
    return torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin
