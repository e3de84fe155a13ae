"""Small models of several streams of tokens; for law 10.

No stream has positions, and rows of every picture are of one patch: neighbouring tokens are equal, and stay so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, TEXT, SIDE, PATCH = 16, 5, 4, 4


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(count: int = 2 * SIDE, seed: int = 1, batch: int = 2) -> Tensor:
    """`[B, 3, 4 * count, 4 * count]`: every row of patches repeats one patch, and so do rows of patches twice as wide.

    At patch size 4 each row has `count` equal tokens, at 8 half as many.
    """
    patch = drawn(batch, 3, count * PATCH, PATCH, seed=seed)
    return patch.repeat(1, 1, 1, count)


def text(batch: int = 2) -> Tensor:
    return drawn(batch, TEXT, WIDTH, seed=5)


class Streams(nn.Module):
    """A forward of its own around some weights."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run
        self.fine, self.coarse = nn.Conv2d(3, WIDTH, 4, 4), nn.Conv2d(3, WIDTH, 8, 8)
        self.small, self.large = nn.Linear(48, WIDTH), nn.Linear(192, WIDTH)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(4))
        self.outs = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)

    def mixed(self, x: Tensor, number: int) -> Tensor:
        """Self-attention along the last dimension but one."""
        q, k, v = self.heads[number](F.layer_norm(x, (WIDTH,))).chunk(3, -1)
        return self.outs[number](F.scaled_dot_product_attention(q, k, v))

    def block(self, x: Tensor, number: int) -> Tensor:
        x = x + self.mixed(x, number)
        return x + F.gelu(F.layer_norm(x, (WIDTH,)))

    def tokens(self, picture: Tensor, stem: nn.Conv2d | None = None) -> Tensor:
        return (self.fine if stem is None else stem)(picture).flatten(2).transpose(1, 2)

    def cut(self, picture: Tensor, size: int) -> Tensor:
        """Patches by reshaping, embedded by a linear layer."""
        count = 2 * SIDE * PATCH // size
        x = picture.reshape(-1, 3, count, size, count, size).permute(0, 2, 4, 3, 5, 1)
        return (self.small if size == PATCH else self.large)(x.reshape(-1, count * count, size * size * 3))


# --- two scales of one picture, or of two ---


def joined(s: Streams, a: Tensor, b: Tensor, how: str) -> Any:
    """One summary of `b` joins the tokens of `a`."""
    a, b = s.block(a, 0), s.block(b, 1)
    summary = b.mean(1, keepdim=True)
    if how == "added":
        return (a + summary).mean(1)
    z = torch.cat([summary, a], 1)
    if how == "softmax":
        return (z @ z[:, :1].transpose(1, 2)).softmax(1).transpose(1, 2) @ z
    return z if how == "tokens" else z.mean(1)


def by_convolution(s: Streams, picture: Tensor, how: str) -> Any:
    return joined(s, s.tokens(picture), s.tokens(picture, s.coarse), how)


def by_reshape(s: Streams, picture: Tensor, how: str) -> Any:
    return joined(s, s.cut(picture, 4), s.cut(picture, 8), how)


def of_two_pictures(s: Streams, one: Tensor, other: Tensor, how: str) -> Any:
    return joined(s, s.tokens(one), s.tokens(other, s.coarse), how)


# --- two views ---


def two_views(s: Streams, one: Tensor, other: Tensor) -> Any:
    a, b = (s.block(s.block(s.tokens(view), 0), 1) for view in (one, other))
    return a.mean(1) - b.mean(1), a, b


def compared_views(s: Streams, one: Tensor, other: Tensor) -> Any:
    """Tokens of two views meet, each view merged in its own way."""
    a, b = (s.block(s.tokens(view), 0) for view in (one, other))
    return a - b, torch.cat([a, b], 1).mean(1)


def crossed_views(s: Streams, one: Tensor, other: Tensor) -> Any:
    """One view asks the other."""
    a, b = s.block(s.tokens(one), 0), s.block(s.tokens(other), 1)
    return (a + F.scaled_dot_product_attention(a, b, b)).mean(1)


# --- text beside a clip ---


def one_stream(s: Streams, picture: Tensor, words: Tensor) -> Any:
    """Text leads, and there is one residual stream."""
    z = torch.cat([words, s.tokens(picture)], 1)
    for number in range(2):
        z = s.block(z, number)
    return z[:, TEXT:].mean(1), z[:, :TEXT], z.mean(1)


def two_streams(s: Streams, picture: Tensor, words: Tensor) -> Any:
    """Joint attention, and a residual stream of its own for each."""
    x, c = s.tokens(picture), words
    for number in range(2):
        y = s.mixed(torch.cat([c, x], 1), number)
        x, c = x + y[:, TEXT:], c + y[:, :TEXT]
        x, c = x + F.gelu(F.layer_norm(x, (WIDTH,))), c + F.gelu(c)
    return x.mean(1), c, x


# --- branches on one residual stream ---


def two_branches(s: Streams, picture: Tensor) -> Any:
    x = s.tokens(picture)
    x = x + s.mixed(x, 0) + s.mixed(x, 1)
    x = x + s.mixed(x, 2)
    return x.mean(1), x


def branches_that_meet(s: Streams, picture: Tensor) -> Any:
    """Each branch has a residual of its own, and merges in its own way."""
    x = s.tokens(picture)
    a, b = s.block(x, 0), s.block(x, 1)
    return s.block(a + b, 2).mean(1), a * b


def beside_an_mlp(s: Streams, picture: Tensor) -> Any:
    x = s.tokens(picture)
    for number in range(2):
        x = x + s.mixed(x, number) + F.gelu(s.outs[2](x))
    return x.mean(1), x
