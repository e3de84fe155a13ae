"""Spellings of one and the same thing, equal in eager: families of poolings over tokens, and of attention; for law 9.

Every function takes tokens `[B, N, C]`; a family's functions give equal numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS = 8, 2
GRID = (2, 3, 3)
TOKENS = 18

Pool = Callable[[Any, Tensor], Tensor]
Family = dict[str, Pool]


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grid(h: Tensor) -> Tensor:
    return h.view(-1, *GRID, WIDTH)


def masked(h: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens that a mask keeps; here it keeps all."""
    kept = mask[:, : h.shape[1], None]
    return (h * kept).sum(1) / kept.sum(1)


def pairs(s: Any, h: Tensor) -> Tensor:
    return (s.query @ h.transpose(1, 2)) * WIDTH**-0.5


def exponentials(s: Any, h: Tensor) -> Tensor:
    scores = pairs(s, h)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return ((weights @ h) / weights.sum(-1, keepdim=True))[:, 0]


MEANS: Family = {
    "mean": lambda s, h: h.mean(1),
    "sum / N": lambda s, h: h.sum(1) / h.shape[1],
    "mask, a buffer": lambda s, h: masked(h, s.kept),
    "mask, a float input": lambda s, h: masked(h, s.masks[0]),
    "mask, an int input": lambda s, h: masked(h, s.masks[1]),
    "mask, a bool input": lambda s, h: masked(h, s.masks[2]),
    "ones_like @ h": lambda s, h: (torch.ones_like(h[..., :1]).transpose(1, 2) @ h)[:, 0] / h.shape[1],
    "full @ h": lambda s, h: (torch.full((1, h.shape[1]), 1 / h.shape[1]) @ h)[:, 0],
    "einsum": lambda s, h: torch.einsum("bnc->bc", h) / h.shape[1],
    "einsum with ones": lambda s, h: torch.einsum("bnc,bn->bc", h, torch.ones_like(h[..., 0])) / h.shape[1],
    "adaptive_avg_pool1d": lambda s, h: F.adaptive_avg_pool1d(h.transpose(1, 2), 1)[..., 0],
    "channels first": lambda s, h: h.transpose(1, 2).mean(-1),
}
GRID_MEANS: Family = {
    "mean": MEANS["mean"],
    "mean of the grid": lambda s, h: grid(h).mean((1, 2, 3)),
    "mean of means": lambda s, h: grid(h).mean((2, 3)).mean(1),
    "mean of means of rows": lambda s, h: h.view(-1, GRID[0], GRID[1] * GRID[2], WIDTH).mean(2).mean(1),
    "sum of sums / N": lambda s, h: grid(h).sum((2, 3)).sum(1) / h.shape[1],
    "adaptive_avg_pool3d": lambda s, h: F.adaptive_avg_pool3d(grid(h).permute(0, 4, 1, 2, 3), 1).flatten(1),
}
LEARNED: Family = {
    "fused": lambda s, h: F.scaled_dot_product_attention(s.query.expand(len(h), -1, -1), h, h)[:, 0],
    "written out": lambda s, h: (pairs(s, h).softmax(-1) @ h)[:, 0],
    "exponentials": exponentials,
    "weighted sum": lambda s, h: (pairs(s, h).softmax(-1).transpose(1, 2) * h).sum(1),
    "einsum": lambda s, h: torch.einsum("bqn,bnc->bqc", pairs(s, h).softmax(-1), h)[:, 0],
}
LOGARITHMS: Family = {
    "logsumexp": lambda s, h: h.logsumexp(1),
    "written out": lambda s, h: h.exp().sum(1).log(),
    "of the mean": lambda s, h: (h.exp().mean(1) * h.shape[1]).log(),
}
VARIANCES: Family = {
    "var": lambda s, h: h.var(1, correction=0),
    "std": lambda s, h: h.std(1, correction=0).square(),
    "of the centred": lambda s, h: (h - h.mean(1, keepdim=True)).square().mean(1),
    "of the squares": lambda s, h: h.square().mean(1) - h.mean(1).square(),
    "var_mean": lambda s, h: torch.var_mean(h, 1, correction=0)[0],
}
NORMS: Family = {
    "norm": lambda s, h: h.norm(dim=1),
    "vector_norm": lambda s, h: torch.linalg.vector_norm(h, dim=1),
    "written out": lambda s, h: h.square().sum(1).sqrt(),
    "einsum": lambda s, h: torch.einsum("bnc,bnc->bc", h, h).sqrt(),
}
FAMILIES: dict[str, Family] = {
    "means": MEANS,
    "learned pooling": LEARNED,
    "logarithms": LOGARITHMS,
    "variances": VARIANCES,
    "norms": NORMS,
}


# --- attention ---


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q * q.shape[-1] ** -0.5, k)
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = [each.flatten(0, 1) for each in (q, k, v)]
    scores = torch.bmm(rows[0], rows[1].transpose(1, 2)) / q.shape[-1] ** 0.5
    return torch.bmm(scores.softmax(-1), rows[2]).view(q.shape)


ATTENTIONS = {"fused": fused, "written out": written_out, "einsum": einsum, "bmm": batched}


class Encoder(nn.Module):
    """`[B, 3, 2, 12, 12]` to what `finish` makes of the tokens `[B, (1 +) 18, C]` after two blocks."""

    def __init__(
        self,
        finish: Callable[[Any, Tensor], Any],
        leading: int = 0,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor] = fused,
    ) -> None:
        super().__init__()
        self.finish, self.attend, self.leading = finish, attend, leading
        self.stem = nn.Conv3d(3, WIDTH, (1, 4, 4), (1, 4, 4))
        self.cls = nn.Parameter(drawn(1, leading, WIDTH))
        self.positions = nn.Parameter(drawn(1, TOKENS + leading, WIDTH, seed=2) * 0.2)
        self.weights = nn.ParameterList(drawn(3 * WIDTH, WIDTH, seed=3 + number) * 0.5 for number in range(2))
        self.query = nn.Parameter(drawn(1, 1, WIDTH, seed=9))
        self.register_buffer("kept", torch.ones(1, TOKENS + leading))

    def forward(self, video: Tensor, *masks: Tensor) -> Any:
        self.masks = masks
        x = self.stem(video).flatten(2).transpose(1, 2)
        if self.leading:
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        x = x + self.positions
        for weight in self.weights:
            heads = F.linear(F.layer_norm(x, (WIDTH,)), weight).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            y = self.attend(heads[0], heads[1], heads[2]).transpose(1, 2).flatten(2)
            x = x + y
        return self.finish(self, F.layer_norm(x, (WIDTH,)))


def video(batch: int = 2) -> Tensor:
    return drawn(batch, 3, GRID[0], 12, 12)


def masks(leading: int = 0, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Of ones, as float, int and bool inputs."""
    ones = torch.ones(batch, TOKENS + leading)
    return ones, ones.long(), ones.bool()


def families(s: Any, h: Tensor) -> dict[str, dict[str, Tensor]]:
    """All families over all tokens, and beside class tokens over those of the clip alone."""
    found = {name: {key: pool(s, h) for key, pool in family.items()} for name, family in FAMILIES.items()}
    clip = h[:, s.leading :]
    grids = {key: pool(s, clip) for key, pool in GRID_MEANS.items()}
    if not s.leading:
        return {**found, "grids": grids}
    return {**found, "clip": {key: pool(s, clip) for key, pool in MEANS.items() if "mask" not in key}, "grids": grids}


def sums(s: Any, h: Tensor) -> dict[str, Tensor]:
    return {"ones": torch.ones_like(h).sum(1), "sum": h.sum(1), "mean": h.mean(1)}


def counts(s: Any, h: Tensor) -> dict[str, Tensor]:
    """How many entries over all tokens are positive: integers that leave, and numbers that are read as floats."""
    positive = h > 0
    return {
        "sum": positive.sum(1),
        "count_nonzero": positive.count_nonzero(1),
        "iterated": positive.sum(2).sum(1),
        "float": positive.to(h.dtype).sum(1),
        "share": positive.to(h.dtype).mean(1),
        "share of counts": positive.sum(1) / h.shape[1],
    }


def maps(s: Any, h: Tensor) -> dict[str, Tensor]:
    """Rows that add up to 1 over tokens, from softmax and written out; they leave the model at full length."""
    scores = h @ h.transpose(1, 2) * WIDTH**-0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return {
        "softmax": scores.softmax(-1),
        "written out": weights / weights.sum(-1, keepdim=True),
        "of a query": (h @ s.query[0].T).softmax(1).transpose(1, 2),
    }


def everything(s: Any, h: Tensor) -> dict[str, Any]:
    """In one graph, so that one merge serves every spelling."""
    return {"tokens": h, "families": families(s, h), "sums": sums(s, h), "counts": counts(s, h), "maps": maps(s, h)}
