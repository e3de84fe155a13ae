"""Every barrier on the smallest model that runs into it: the reason is told, and the answer is what it means."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tldr_compile
from tldr_compile.passes.plan import barriers

B, T, H, W, C = 2, 2, 3, 4, 8
PLACES = H * W


class Attends(nn.Module):
    """Blocks over the tokens of a clip `[b, 3, t, H, W]`, jointly or frame by frame, and then what runs into something.

    The residual stream is `[b, t·h·w, c]`, frame by frame `[b, t, h·w, c]`, and `[b, t, h, w, c]` on a grid.
    """

    def __init__(self, tail: Callable[[nn.Module, Tensor], Tensor], stream: str) -> None:
        super().__init__()
        self.tail, self.stream = tail, stream
        self.stem, self.qkv = nn.Conv3d(3, C, (1, 2, 2), (1, 2, 2)), nn.Linear(C, 3 * C)
        self.over_tokens = nn.Linear(T * PLACES, T * PLACES)
        self.token = nn.Parameter(torch.ones(1, 1, C))

    def forward(self, clip: Tensor) -> Tensor:
        x = self.stem(clip).permute(0, 2, 3, 4, 1)
        x = x.flatten(1, 3) if self.stream == "joint" else x.flatten(2, 3) if self.stream == "frames" else x
        seen = x.flatten(1, 3) if self.stream == "grid" else x
        q, k, v = self.qkv(F.layer_norm(seen, (C,))).chunk(3, -1)
        return self.tail(self, x + F.scaled_dot_product_attention(q, k, v).reshape(x.shape))


TAILS: dict[str, tuple[str, Callable[[nn.Module, Tensor], Tensor], str]] = {
    "without_rule": ("joint", lambda m, x: torch.renorm(x, 2, 0, 1.0), "it has no typing rule"),
    "without_rule, a conflict": (
        "joint",
        lambda m, x: x.reshape(-1, 3, 8, C).amax(2),
        "its sizes contradict each other: ",
    ),
    "mixing_tokens": ("joint", lambda m, x: m.over_tokens(x.mT), "it mixes the tokens along t·h·w, each by its place"),
    "meeting_across_groupings": (
        "frames",
        lambda m, x: x.amax(1),
        "it reduces over t, and the tokens are grouped differently for each of it",
    ),
    "reducing_a_part": (
        "grid",
        lambda m, x: x.mean((2, 3)),
        "it reduces over a part of t·h·w, whose tokens are grouped together",
    ),
    "holding_a_part": (
        "grid",
        lambda m, x: F.pad(x, (0, 0, 1, 0)),
        "it needs the tokens along t·h·w one by one: ",
    ),
    "taking_the_batch_apart": (
        "joint",
        lambda m, x: torch.cat([m.token[0], torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1).flatten(0, 1)]),
        "it separates the tokens from b, and they are grouped differently for each of it",
    ),
    "pairing_groupings": (
        "frames",
        lambda m, x: x.unsqueeze(2) * x.unsqueeze(1),
        "it pairs entries along t, and the tokens are grouped differently for each of it",
    ),
    "pairing_on_one_axis": ("joint", lambda m, x: (x @ x.mT).flatten(1), "it lays pairs of tokens along t·h·w on one "),
    "nesting_too_deeply": (
        "joint",
        lambda m, x: F.pad(torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1).flatten(1), (1, 0)),
        "it holds the tokens along t·h·w too deep inside of sums and products: ",
    ),
}


def model(name: str) -> Attends:
    stream, tail, _ = TAILS[name]
    torch.manual_seed(0)
    return Attends(tail, stream).eval()


@pytest.mark.parametrize("name", TAILS)
def test_the_reason_is_told_and_the_answer_is_right(name: str) -> None:
    clip = torch.randn(B, 3, T, 2 * H, 2 * W)
    merged = tldr_compile.apply(model(name), (clip,), schedule=[3], grouping="each", verify=True)
    told = [each["reason"] for each in merged.report.to_dict()["restorations"] if each["operator"] != "output"]
    assert any(reason.startswith(TAILS[name][2]) for reason in told), told


def test_every_barrier_has_its_model() -> None:
    assert {name.split(",")[0] for name in TAILS} == {barrier.__name__ for barrier in barriers.BARRIERS}
