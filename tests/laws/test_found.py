"""What was once found broken in models that no family of the others has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tldr_compile
from tldr_compile.errors import NothingToMerge

WIDTH = 8


class Blocks(nn.Module):
    """A forward of its own around attention with weights `weight [2, 3 C, C]`."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, 3 * WIDTH, WIDTH, generator=generator) * 0.5)
        self.stem = nn.Parameter(torch.randn(WIDTH, 3, 1, 2, 2, generator=generator) * 0.3)
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)

    def attend(self, x: Tensor, number: int = 0) -> Tensor:
        """Over the last dimension but one; everything before it is batch."""
        rows = x.reshape(-1, *x.shape[-2:])
        q, k, v = F.linear(rows, self.weight[number]).chunk(3, -1)
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0].reshape(x.shape)

    def patches(self, video: Tensor) -> Tensor:
        """`[B, T, H, W, C]`."""
        return F.conv3d(video, self.stem, stride=(1, 2, 2)).permute(0, 2, 3, 4, 1)

    def spatial(self, x: Tensor) -> Tensor:
        return self.attend(x.flatten(2, 3)).reshape(x.shape)

    def temporal(self, x: Tensor) -> Tensor:
        return self.attend(x.permute(0, 2, 3, 1, 4), 1).permute(0, 3, 1, 2, 4)


def video() -> Tensor:
    return torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def tokens() -> Tensor:
    return torch.randn(2, 12, WIDTH, generator=torch.Generator().manual_seed(1))


def merged(forward: Callable[[Any, Tensor], Any], x: Tensor, **options: Any) -> tldr_compile.MergedModule:
    return tldr_compile.apply(Blocks(forward), (x,), verify=True, **{"schedule": [4], **options})


READERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "channels": lambda s, x: F.linear(x, s.weight[0]),
    "rows transposed": lambda s, x: F.linear(x.transpose(2, 3).flatten(2, 3), s.weight[0]),
    "mean of a row": lambda s, x: x.mean(3),
    "another block": lambda s, x: x + s.spatial(x),
    "a table": lambda s, x: x + s.weight[0, :16].reshape(4, 4, WIDTH),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("schedule", [[4], [0.25]], ids=str)
def test_divided_attention_on_a_grid(reader: str, schedule: Any) -> None:
    """Every frame is merged by itself, and attention over frames finds all tokens on the grid again."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.patches(x)
        x = x + s.spatial(x)
        x = x + s.temporal(x)
        return READERS[reader](s, x)

    merged(forward, video(), schedule=schedule)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x + x.new_zeros(x.shape),
        lambda x: torch.cat([x, x.new_ones(2, 12, 4)], -1),
        lambda x: torch.stack([x, x.new_full(x.shape, 2.0, dtype=torch.float32)]),
        lambda x: x.new_zeros(x.shape).scatter(-1, x.argmax(-1, keepdim=True), 1.0) * x,
    ],
)
def test_what_is_made_as_long_as_the_tokens_is_shortened_with_them(read: Callable[[Tensor], Tensor]) -> None:
    merged(lambda s, x: read(x + s.attend(x)), tokens())


@pytest.mark.parametrize(
    "read",
    [
        lambda x: torch.einsum("bnc,amc->banm", x, x).amax(-1).sum(-1),
        lambda x: (x[:, None] * x[None]).sum(-1).mean(-1),
    ],
)
def test_pairs_of_samples(read: Callable[[Tensor], Tensor]) -> None:
    merged(lambda s, x: read(x + s.attend(x)), tokens())


@pytest.mark.parametrize(
    "shift",
    [
        lambda x: torch.cat([x[:, :1], x[:, :-1]], 1),
        lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1),
        lambda x: F.pad(x[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)),
    ],
)
def test_a_shift_along_time_takes_no_site_away(shift: Callable[[Tensor], Tensor]) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.patches(x)
        x = x + s.spatial(x)
        return x + shift(x)

    statuses = [site["status"] for site in merged(forward, video()).report.to_dict()["sites"]]
    assert statuses == ["merged"]


def test_protect_that_takes_tokens_apart_is_refused_in_words() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.patches(x)
        x = x + s.spatial(x)
        return x + s.temporal(x)

    with pytest.raises(NothingToMerge, match="protect=1 would take apart h·w, which is one block of tokens"):
        merged(forward, video(), protect=1, schedule=0.25)


def test_features_of_frames_have_channels() -> None:
    """`[B, T, P, C]`: no attention goes along C, so it is what tokens carry, though no layer made it."""
    features = torch.randn(2, 3, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    module = merged(lambda s, x: x + s.attend(x.flatten(1, 2)).reshape(x.shape), features)
    assert module(features).shape == features.shape


def test_a_schedule_of_zeros_asks_for_no_site() -> None:
    model, x = Blocks(lambda s, x: F.linear(x, s.weight[0])), tokens()
    assert torch.equal(tldr_compile.apply(model, (x,), schedule=[0, 0])(x), model(x))


@torch.no_grad()
def test_one_head_of_keys_for_all_queries() -> None:
    """Keys and values that broadcast over the heads, before and after a merge."""

    def multi(s: Any, x: Tensor, number: int) -> Tensor:
        q, k, v = F.linear(x, s.weight[number]).chunk(3, -1)
        q = q.unflatten(-1, (4, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k[:, None, :, :2], v[:, None, :, :2])
        return out.transpose(1, 2).flatten(2)

    def forward(s: Any, x: Tensor) -> Tensor:
        x = x + multi(s, x, 0)
        return (x + multi(s, x, 1)).mean(1)

    module = merged(forward, tokens())
    assert [site["status"] for site in module.report.to_dict()["sites"]] == ["merged", "left"]


def on_grid(tail: Callable[[Any, Tensor], Any]) -> Blocks:
    """Attention over the places of every frame, and then what is done with pictures `[B·T, C, h, w]`."""

    def forward(s: Any, x: Tensor) -> Any:
        x = s.patches(x).flatten(0, 1)
        b, h, w, c = x.shape
        x = x.flatten(1, 2)
        x = x + s.attend(x)
        return tail(s, x.transpose(1, 2).reshape(b, c, h, w))

    return Blocks(forward).eval()


def unpooled(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(y, places, 2), places


def of_other_tokens(s: Any, x: Tensor) -> Tensor:
    """Rows mixed by a parameter are no places of the clip; attention over them is no site."""
    y = torch.einsum("bchw,rh->brwc", x, s.weight[0, :2, :4]).flatten(1, 2)
    return (y + s.attend(y, 1)).mean(1)


def unshuffled(s: Any, x: Tensor) -> Tensor:
    return F.pixel_unshuffle(x, 2).flatten(2).mean(2)


@pytest.mark.parametrize(
    "tail",
    [
        unpooled,
        lambda s, x: x.contiguous().as_strided((8, 8, 2, 2), (128, 16, 8, 2)),
        of_other_tokens,
        unshuffled,
        lambda s, x: F.pixel_shuffle(x, 2),
        lambda s, x: F.pad(x, (0, 1, 2, 0)).mean((2, 3)),
    ],
    ids=[
        "places of maxima",
        "places in memory",
        "rows mixed",
        "blocks into channels",
        "channels into blocks",
        "padded",
    ],
)
@pytest.mark.parametrize("grouping", ["auto", "each"])
def test_what_reads_a_picture_reads_what_it_did(tail: Callable[[Any, Tensor], Any], grouping: str) -> None:
    model = on_grid(tail)
    merged = tldr_compile.apply(model, (video(),), schedule=[4], grouping=grouping)
    merged.verify((video(),))
    assert merged.report.sites[0]["status"] == "merged"


def test_keys_of_blocks_are_compared_as_all_their_tokens() -> None:
    """Pairs of frames share a key: it stands for both."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.patches(x)
        b, t, h, w, c = x.shape
        x = x.flatten(1, 3)
        pairs = x.view(b, t // 2, 2, h * w, c).mean(2).flatten(1, 2)
        query, key = (F.linear(each, s.weight[n, :WIDTH])[:, None] for n, each in enumerate((x, pairs)))
        return (x + F.scaled_dot_product_attention(query, key, pairs[:, None])[:, 0]).mean(1)

    merged = tldr_compile.apply(Blocks(forward).eval(), (video(),), schedule=[0.4], metric="keys", saliency="uniform")
    merged.verify((video(),))
    assert merged.report.sites[0]["grouping"] == "run t1·h·w; apart b; carried t2"
