"""Small models that keep samples, frames or packed rows apart, each in its own way; for law 8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, TIME, PLACES, PATCH = 8, 4, 9, 12
BATCH = 2


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attended(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """Attention along the last dimension but one; what stands before is batch."""
    q, k, v = F.linear(F.layer_norm(x, (WIDTH,)), weight).chunk(3, -1)
    return F.scaled_dot_product_attention(q, k, v, **options)


def spatial(x: Tensor, weight: Tensor) -> Tensor:
    return attended(x, weight)


def temporal(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    rows = x.reshape(-1, TIME, *x.shape[1:]).transpose(1, 2)
    return attended(rows, weight, **options).transpose(1, 2).reshape(x.shape)


def causal(x: Tensor, weight: Tensor) -> Tensor:
    return temporal(x, weight, is_causal=True)


def joint(x: Tensor, weight: Tensor) -> Tensor:
    return attended(x.reshape(-1, TIME * x.shape[1], WIDTH), weight).reshape(x.shape)


def pairs(x: Tensor, weight: Tensor) -> Tensor:
    """Two neighbouring frames see each other."""
    return attended(x.reshape(-1, 2 * x.shape[1], WIDTH), weight).reshape(x.shape)


Along = Callable[[Tensor, Tensor], Tensor]


class Folded(nn.Module):
    """`[b*t, 3, H, W]`: frames lie in the batch, and blocks attend along one thing after the other.

    The residual stream is `[b*t, n, c]`, or `[b, t*n, c]` if it is `long`.
    """

    def __init__(self, along: tuple[Along, ...], tail: Callable[..., Any], long: bool = False) -> None:
        super().__init__()
        self.along, self.tail, self.long = along, tail, long
        self.stem = nn.Conv2d(3, WIDTH, 4, 4)
        self.weights = nn.ParameterList(drawn(3 * WIDTH, WIDTH, seed=2 + number) for number in range(len(along)))
        self.mlp = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, frames: Tensor) -> Any:
        x = self.stem(frames).flatten(2).transpose(1, 2)
        shape = (-1, TIME * PLACES, WIDTH) if self.long else (-1, PLACES, WIDTH)
        x, states = x.reshape(shape), []
        for along, weight in zip(self.along, self.weights, strict=True):
            x = x + along(x.reshape(-1, PLACES, WIDTH), weight).reshape(x.shape)
            x = x + F.gelu(self.mlp(F.layer_norm(x, (WIDTH,))))
            states.append(x.reshape(-1, PLACES, WIDTH))
        return self.tail(self, states[-1], states)


# --- what folded models return ---


def clips(x: Tensor) -> Tensor:
    return x.reshape(-1, TIME, PLACES, WIDTH).mean((1, 2))


def of_clips(model: Folded, x: Tensor, states: list[Tensor]) -> Tensor:
    return clips(x)


def of_frames(model: Folded, x: Tensor, states: list[Tensor]) -> Tensor:
    return x.mean(1)


def of_tokens(model: Folded, x: Tensor, states: list[Tensor]) -> Tensor:
    return x


def early(model: Folded, x: Tensor, states: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What each frame was before frames met leaves the model too."""
    return states[0].mean(1), states[0].amax(1), clips(x)


def normed(model: Folded, x: Tensor, states: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A batch norm in training mixes the samples of the second output, not those of the first."""
    return clips(x), model.norm(clips(x))


def contrasted(model: Folded, x: Tensor, states: list[Tensor]) -> tuple[Tensor, Tensor]:
    features = F.normalize(clips(x), dim=-1)
    return features, features @ features.T


def with_loss(model: Folded, x: Tensor, states: list[Tensor]) -> tuple[Tensor, Tensor]:
    return clips(x), clips(x).square().mean()


def folded(*along: Along, tail: Callable[..., Any] = of_clips, long: bool = False) -> Folded:
    return Folded(along, tail, long).eval()


def frames(batch: int = BATCH) -> Tensor:
    return drawn(batch * TIME, 3, 12, 12)


# --- samples in one row, and frames behind a mask ---


class Packed(nn.Module):
    """`[s*n, features]`: the tokens of all samples in one row; attention takes each sample by itself."""

    def __init__(self, tail: str) -> None:
        super().__init__()
        self.tail = tail
        self.embed = nn.Linear(PATCH, WIDTH)
        self.weights = nn.ParameterList(drawn(3 * WIDTH, WIDTH, seed=2 + number) for number in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for weight in self.weights:
            x = x + attended(x.reshape(-1, PLACES, WIDTH), weight).reshape(x.shape)
            x = x + F.gelu(F.layer_norm(x, (WIDTH,)))
        return x if self.tail == "tokens" else x.reshape(-1, PLACES, WIDTH).mean(1)


def packed(batch: int = BATCH) -> Tensor:
    return drawn(batch * PLACES, PATCH)


class Masked(nn.Module):
    """`[b, 3, t, H, W]` attended jointly under a constant mask that hides other frames, fused or written out."""

    def __init__(self, hidden: bool | float, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.stem = nn.Conv3d(3, WIDTH, (1, 4, 4), (1, 4, 4))
        self.weights = nn.ParameterList(drawn(3 * WIDTH, WIDTH, seed=2 + number) for number in range(2))
        frame = torch.arange(TIME).repeat_interleave(PLACES)
        apart = frame[:, None] != frame
        mask = ~apart if hidden is False else torch.zeros(apart.shape).masked_fill(apart, hidden)
        self.register_buffer("mask", mask)

    def forward(self, video: Tensor) -> Tensor:
        x = self.stem(video).flatten(2).transpose(1, 2)
        for weight in self.weights:
            x = x + self.attend(F.linear(F.layer_norm(x, (WIDTH,)), weight))
            x = x + F.gelu(F.layer_norm(x, (WIDTH,)))
        return x.reshape(-1, TIME, PLACES, WIDTH).mean(2)

    def attend(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.chunk(3, -1)
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        scores = q @ k.transpose(1, 2) * WIDTH**-0.5
        if self.mask.dtype == torch.bool:
            return scores.masked_fill(~self.mask, -torch.inf).softmax(-1) @ v
        return (scores + self.mask).softmax(-1) @ v


def video(batch: int = BATCH) -> Tensor:
    return drawn(batch, 3, TIME, 12, 12)
