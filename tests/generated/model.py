"""A transformer built from a recipe."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.generated.attention import HEADS, Attention, Module, laid
from tests.generated.recipe import PATCH, WIDTH, Recipe


def build(recipe: Recipe) -> Generated:
    """The model of a recipe, in eval mode, with weights that its seed draws; norms and biases are not trivial."""
    torch.manual_seed(recipe.seed)
    model = Generated(recipe).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    return model.to(recipe.torch_dtype)


class Generated(nn.Module):
    """Embedding, blocks, tail."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.conv3d = nn.Conv3d(3, WIDTH, (2, 4, 4), (2, 4, 4))
        self.conv2d = nn.Conv2d(3, WIDTH, 4, 4)
        self.linear = nn.Linear(PATCH, WIDTH)
        self.first = nn.Parameter(torch.randn(1, max(recipe.before, 1), WIDTH))
        self.last = nn.Parameter(torch.randn(1, max(recipe.after, 1), WIDTH))
        self.table = nn.Parameter(torch.randn(1, recipe.tokens, WIDTH) * 0.3)
        self.coarse = nn.Parameter(torch.randn(1, WIDTH, 2, 2))
        self.embedding = nn.Embedding(recipe.tokens, WIDTH)
        self.register_buffer("waves", sinusoids(recipe.tokens), persistent=False)
        self.blocks = nn.ModuleList(Block(recipe) for _ in range(recipe.depth))
        self.between = Frames()
        self.joined = nn.Linear(2 * WIDTH, WIDTH)
        self.query = nn.Parameter(torch.randn(1, 2, WIDTH))
        self.decoder = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.score = nn.Linear(WIDTH, 1)
        self.head = nn.Conv2d(WIDTH, 4, 3, padding=1)
        self.norm = nn.LayerNorm(WIDTH)
        if recipe.beside in ("scale", "view"):
            self.finer, self.aside = nn.Conv3d(3, WIDTH, (2, 2, 2), (2, 2, 2)), Frames()

    def forward(self, clip: Tensor, *more: Tensor) -> Any:
        recipe, rest = self.recipe, list(more)
        ids = rest.pop(0) if recipe.position == "ids" else None
        other = rest.pop(0) if recipe.beside in ("view", "text") else clip
        keep = rest.pop(0) if recipe.bias == "padding" else None
        if keep is not None and recipe.per_frame:
            keep = keep.repeat_interleave(recipe.grid[0], 0)
        x = self.positioned(self.embedded(clip, other if recipe.beside == "text" else None), ids)
        if recipe.beside in ("scale", "view"):
            x = x + self.summary(other)
        if self.recipe.layout == "sequence":
            x = x.transpose(0, 1)
        if self.recipe.layout == "grid":
            x = x.reshape(x.shape[0], -1, self.recipe.grid[2], WIDTH)
        if self.recipe.layout == "packed":
            x = x.flatten(0, 1)
        states, maps = [], []
        for number, block in enumerate(self.blocks):
            if self.recipe.joins and number == 1:
                x = x.reshape(-1, self.recipe.grid[0] * self.recipe.tokens, WIDTH)
            if self.recipe.branch == "ushaped" and number and number == len(self.blocks) - 1:
                x = self.joined(torch.cat([x, states[0]], -1))
            x, weights = block(x, keep)
            if self.recipe.branch == "between" and self.recipe.per_frame and self.recipe.layout == "batch":
                x = self.between(x, self.recipe.grid[0])
            if self.recipe.branch == "windows" and self.recipe.paired and not (recipe.leading or recipe.after):
                x = self.between.in_windows(x, recipe.grid[1:])
            states.append(x)
            maps.append(weights)
        if self.recipe.layout == "sequence":
            x = x.transpose(0, 1)
        if self.recipe.layout == "grid":
            x = x.flatten(1, 2)
        if self.recipe.joins or self.recipe.layout == "packed":
            x = x.reshape(-1, self.recipe.tokens, WIDTH)
        return self.finished(self.norm(x), states, maps)

    def summary(self, other: Tensor) -> Tensor:
        """Of a second stream of tokens, from the same clip or another one."""
        stem = self.finer if self.recipe.beside == "scale" else self.conv3d
        x = stem(other).flatten(2).transpose(1, 2)
        return self.aside.attended(x).mean(1, keepdim=True)

    def embedded(self, clip: Tensor, words: Tensor | None = None) -> Tensor:
        if self.recipe.embed == "conv3d":
            x = self.conv3d(clip).flatten(2).transpose(1, 2)
        elif self.recipe.embed == "frames":
            x = self.conv2d(clip.flatten(0, 1)).flatten(2).transpose(1, 2)
        elif self.recipe.embed == "folded":
            x = self.conv2d(clip).flatten(2).transpose(1, 2)
        else:
            x = self.linear(clip)
            x = x.unflatten(0, (-1, self.recipe.clip_tokens)) if self.recipe.embed == "rows" else x
        parts = [self.first.expand(x.shape[0], -1, -1)] if self.recipe.before else []
        parts += [words] if words is not None else []
        parts += [x]
        parts += [self.last.expand(x.shape[0], -1, -1)] if self.recipe.after else []
        return torch.cat(parts, 1)

    def positioned(self, x: Tensor, ids: Tensor | None) -> Tensor:
        position = self.recipe.position
        if position == "interpolated":
            t, h, w = (1 if self.recipe.per_frame else self.recipe.grid[0], *self.recipe.grid[1:])
            fine = F.interpolate(self.coarse, (h, w), mode="bicubic").flatten(2).transpose(1, 2).repeat(1, t, 1)
            return x + F.pad(fine, (0, 0, self.recipe.leading, self.recipe.after))
        added = {"learned": self.table, "sinusoidal": self.waves.to(x.dtype)}.get(position)
        if ids is not None:
            added = self.embedding(ids)
        return x if added is None else x + added

    def finished(self, x: Tensor, states: list[Tensor], maps: list[Tensor | None]) -> Any:
        recipe, tail = self.recipe, self.recipe.tail
        clip = x[:, recipe.leading : x.shape[1] - recipe.after]
        frames = x.reshape(-1, recipe.grid[0], *x.shape[1:]) if recipe.per_frame else x[:, None]
        if tail == "mean":
            return x.mean(1)
        if tail == "first":
            return x[:, 0] if recipe.before else x.amax(1)
        if tail == "tokens":
            return {"tokens": x, "mean": clip.mean(1)}
        if tail == "pooled":
            query = self.query.expand(x.shape[0], -1, -1)
            return F.scaled_dot_product_attention(query[:, None], x[:, None], x[:, None])[:, 0, 0]
        if tail == "decoder":
            return self.decoder(self.query.expand(x.shape[0], -1, -1), x, x)[0]
        if tail == "dense":
            return self.head(clip.transpose(1, 2).reshape(x.shape[0], WIDTH, -1, recipe.grid[2]))
        if tail == "states":
            return x.mean(1), states
        if tail == "attentions":
            return x, [each for each in maps if each is not None]
        if tail == "skip":
            return (states[0] + states[-1]).relu(), x
        if tail == "softmax":
            return (self.score(x).softmax(1) * x).sum(1)
        if tail == "difference":
            return (frames[:, 1:] - frames[:, :-1]).abs().mean(1) if frames.shape[1] > 1 else frames
        if tail == "product":
            return frames.tanh().prod(1)
        if tail == "spelled":
            return self.spelled(x)
        if tail == "blocks" and recipe.paired:
            return self.between.attended(self.joined(in_blocks(clip, *recipe.grid[1:])))
        return frames.mean(1)

    def spelled(self, x: Tensor) -> list[list[Tensor]]:
        """Lists of what is equal."""
        query, ones = self.query[:, :1].expand(x.shape[0], -1, -1), torch.ones_like(x[..., :1])
        scores = query @ x.transpose(1, 2) * WIDTH**-0.5
        return [
            [x.mean(1), x.sum(1) / x.shape[1], (x * ones).sum(1) / ones.sum(1)],
            [F.scaled_dot_product_attention(query, x, x), scores.softmax(-1) @ x],
            [x.var(1, correction=0), (x - x.mean(1, keepdim=True)).square().mean(1)],
        ]


class Frames(nn.Module):
    """Plain attention, beside the blocks' own: over the frames of every place, or over the tokens of another stream."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.norm = nn.Linear(WIDTH, 3 * WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        rows = x.reshape(-1, frames, *x.shape[1:]).transpose(1, 2)
        return x + self.mixed(rows).transpose(1, 2).reshape(x.shape)

    def attended(self, x: Tensor) -> Tensor:
        return x + self.mixed(x)

    def in_windows(self, x: Tensor, picture: tuple[int, int]) -> Tensor:
        (h, w), frames = picture, x.shape[1] // (picture[0] * picture[1])
        rows = x.reshape(-1, frames, h, w // 2, 2, WIDTH).transpose(2, 3)
        mixed = self.mixed(rows.reshape(-1, h * 2, WIDTH)).reshape(rows.shape)
        return x + mixed.transpose(2, 3).reshape(x.shape)

    def mixed(self, rows: Tensor) -> Tensor:
        q, k, v = self.heads(self.norm(rows)).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


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
        if recipe.branch == "twins":
            self.twin = Frames()

    def forward(self, x: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.recipe.norm == "post":
            y, weights = self.attention(x, keep)
            x = self.one(x + y)
            return self.two(x + self.mlp(x)), weights
        normed = self.one(x)
        y, weights = self.attention(normed, keep)
        if self.recipe.branch == "twins":
            x = x + y + self.twinned(normed)
            return x + self.mlp(self.two(x)), weights
        if self.recipe.branch == "parallel":
            return x + y + self.mlp(normed), weights
        if self.recipe.branch == "scaled":
            x = x + self.scale * y
            return x + self.mlp(self.two(x)) * self.scale, weights
        if self.recipe.branch == "inplace":
            x = x.clone()
            x += y
            x += self.mlp(self.two(x))
            return x, weights
        x = x + y
        return x + self.mlp(self.two(x)), weights

    def twinned(self, x: Tensor) -> Tensor:
        if self.recipe.layout == "sequence":
            return self.twin.mixed(x.transpose(0, 1)).transpose(0, 1)
        return self.twin.mixed(laid(x, self.recipe)).reshape(x.shape)


class Mlp(nn.Module):
    """What stands beside attention; a kind that needs a plain sequence `[B, N, C]` and has none is the plain one."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.up, self.gate, self.down = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.mix = nn.Linear(recipe.tokens, recipe.tokens)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.router = nn.Linear(WIDTH, 3)
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        kind, plain = self.recipe.mlp, self.recipe.layout == "batch"
        if kind == "gated":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if kind == "mixing" and plain:
            return self.mix(x.transpose(1, 2)).transpose(1, 2) * 0.1
        if kind == "experts":
            each = torch.stack([expert(x) for expert in self.experts], -1)
            return (each * self.router(x).softmax(-1).unsqueeze(-2)).sum(-1)
        if kind == "routed":
            weight, chosen = self.router(x).softmax(-1).topk(2, -1)
            share = torch.zeros_like(self.router(x)).scatter(-1, chosen, weight)
            return sum(expert(x) * share[..., i : i + 1] for i, expert in enumerate(self.experts))  # type: ignore[return-value]
        if kind == "convolution" and plain and not (self.recipe.leading or self.recipe.after):
            rows = x.transpose(1, 2).reshape(x.shape[0], WIDTH, -1, self.recipe.grid[2])
            return self.depthwise(rows).flatten(2).transpose(1, 2)
        if kind == "squeezed" and plain:
            return x * self.gate(x.mean(1, keepdim=True))[..., :WIDTH].sigmoid()
        return self.down(F.gelu(self.up(x)))


def in_blocks(x: Tensor, h: int, w: int) -> Tensor:
    """Two columns beside each other as one token, `[B, N / 2, 2 C]`: of two rows, where the rows are even."""
    if h % 2:
        return x.reshape(x.shape[0], -1, 2 * WIDTH)
    rows = x.reshape(x.shape[0], -1, h // 2, 2, w // 2, 2, WIDTH).permute(0, 1, 2, 4, 5, 6, 3)
    return rows.reshape(x.shape[0], -1, 4 * WIDTH)[..., : 2 * WIDTH]


def sinusoids(length: int) -> Tensor:
    angle = torch.arange(length)[:, None] / 100 ** (torch.arange(WIDTH // 2) / WIDTH)
    return torch.cat([angle.sin(), angle.cos()], -1)[None]
