"""How much each token has in common with all others, without the matrix of all pairs: block of rows by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .blocked import block_bytes, spans
from .providers import Provider, Providers, everything
from .reference import empty_centrality, near, unit, wide
from .transforms import folded


def energy(metric: Tensor, margin: float) -> Tensor:
    """PiToMe's energy of every token (arXiv 2405.16148, section 3.2, equation 4): high where many are alike.

    The mean over all tokens of what `reference.near` says of their cosines, nothing of its own; `alpha` is 1.
    `metric [B, N, C]`, float, to `[B, N]`, float32 (float64 of float64). `reference.energy` is the specification; this
    has no gradients.

    >>> ops.energy(torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]), 0.5)
    tensor([[ 0.2022,  0.2022, -0.2623]])
    """
    return ENERGY(metric.detach(), margin)


def affinity(metric: Tensor) -> Tensor:
    """How much all tokens' softmaxes over products give to each: AdaMerge's salience (arXiv 2605.27465, equation 2).

    `metric [B, N, C]`, float, to `[B, N]`, float32 (float64 of float64), which sums to `N` before AdaMerge scales it.
    `reference.affinity` is the specification; this has no gradients.

    >>> ops.affinity(torch.tensor([[[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]]]))
    tensor([[1.8654, 0.6954, 0.4392]])
    """
    return AFFINITY(metric.detach())


@torch.library.custom_op("tldr::energy", mutates_args=())
def _energy(metric: Tensor, margin: float) -> Tensor:
    return ENERGY.run(metric, margin)


@torch.library.custom_op("tldr::affinity", mutates_args=())
def _affinity(metric: Tensor) -> Tensor:
    return AFFINITY.run(metric)


@_energy.register_fake
def _energy_fake(metric: Tensor, margin: float) -> Tensor:
    return empty_centrality(metric)


@_affinity.register_fake
def _affinity_fake(metric: Tensor) -> Tensor:
    return empty_centrality(metric)


def _blocked_energy(metric: Tensor, margin: float) -> Tensor:
    """Every pair once: what one says of the other, that says of it."""
    tokens = unit(metric)
    total = tokens.new_zeros(tokens.shape[:2])
    height = max(1, block_bytes(tokens.device) // max(1, _row_bytes(tokens)))
    for first in range(0, tokens.shape[1], height):
        rows, onward = slice(first, first + height), slice(first, None)
        alike = near(tokens[:, rows] @ tokens[:, onward].mT, margin)
        alike.diagonal(0, 1, 2).zero_()
        total[:, onward] += alike.sum(1)
        total[:, rows] += alike[:, :, height:].sum(2)
    return total / tokens.shape[1]


def _decomposed_energy(metric: Tensor, margin: float) -> Tensor:
    tokens = unit(metric)
    place = torch.arange(tokens.shape[1], device=tokens.device)

    def alike(rows: slice) -> Tensor:
        own = place[rows, None] == place
        return near(tokens[:, rows] @ tokens.mT, margin).masked_fill(own, 0).sum(-1)

    return torch.cat([alike(rows) for rows in spans(tokens.shape[1], _row_bytes(tokens))], 1) / tokens.shape[1]


def _blocked_affinity(metric: Tensor) -> Tensor:
    tokens = metric.to(wide(metric.dtype))
    total = tokens.new_zeros(tokens.shape[:2])
    height = max(1, block_bytes(tokens.device) // max(1, _row_bytes(tokens)))
    for first in range(0, tokens.shape[1], height):
        total += _given(tokens, slice(first, first + height))
    return total


def _decomposed_affinity(metric: Tensor) -> Tensor:
    tokens = metric.to(wide(metric.dtype))
    first, *others = (_given(tokens, rows) for rows in spans(tokens.shape[1], _row_bytes(tokens)))
    return sum(others, start=first)


def _given(tokens: Tensor, rows: slice) -> Tensor:
    """What the softmaxes of some rows give to each token, `[B, N]`."""
    return (tokens[:, rows] @ tokens.mT).softmax(-1).sum(1)


def _row_bytes(tokens: Tensor) -> int:
    return tokens.shape[0] * tokens.shape[1] * tokens.element_size()


for _each in ("energy", "affinity"):
    torch.library.register_vmap(f"tldr::{_each}", folded(getattr(torch.ops.tldr, _each)))


@register_flop_formula(torch.ops.tldr.energy)
def _energy_flop(metric: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Every pair once."""
    batch, tokens, channels = metric
    return batch * tokens * (tokens - 1) * channels


@register_flop_formula(torch.ops.tldr.affinity)
def _affinity_flop(metric: Sequence[int], *args: Any, **kwargs: Any) -> int:
    batch, tokens, channels = metric
    return 2 * batch * tokens * tokens * channels


ENERGY: Providers[..., Tensor] = Providers(
    "energy",
    torch.ops.tldr.energy,
    _energy_fake,
    [Provider("blocked", everything, _blocked_energy)],
    _decomposed_energy,
)
AFFINITY: Providers[..., Tensor] = Providers(
    "affinity",
    torch.ops.tldr.affinity,
    _affinity_fake,
    [Provider("blocked", everything, _blocked_affinity)],
    _decomposed_affinity,
)
