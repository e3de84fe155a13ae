"""Small models in the spellings that users have, each of which needs tokens grouped in a way of its own.

Divided attention, windows, blocks that a later operator joins, keys that are not the queries' tokens. No model has
positions, so that equal patches stay equal tokens, unless its line in `MODELS` says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers as T
from torch import Tensor, nn

WIDTH, HEADS, PATCH, BATCH, SITES = 8, 2, 2, 2, 6


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Grouped(nn.Module):
    """`run(model, tokens [b, t, h, w, c])` around some weights, for a video `[b, 3, t, H, W]`."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run
        self.stem = nn.Conv3d(3, WIDTH, (1, PATCH, PATCH), (1, PATCH, PATCH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(SITES))
        self.qkvs = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(SITES))
        self.outs = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(SITES))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(SITES)
        )
        self.merger = nn.Sequential(nn.LayerNorm(4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH))
        self.pool = nn.Conv2d(WIDTH, WIDTH, 2, 2)
        self.pixels = nn.Linear(WIDTH, 3 * PATCH * PATCH)
        self.memory = nn.Parameter(torch.randn(1, 3, WIDTH))
        self.bias = nn.Parameter(torch.randn(HEADS, 9, 9))

    def forward(self, video: Tensor) -> Any:
        return self.run(self, self.stem(video).permute(0, 2, 3, 4, 1).contiguous())

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2)

    def attend(self, x: Tensor, site: int, **options: Any) -> Tensor:
        """Attention along the middle of `[B, n, c]`, after its norm."""
        return self.attend_normed(self.norms[site](x), site, **options)

    def attend_normed(self, x: Tensor, site: int, **options: Any) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkvs[site](x).reshape(B, N, 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, **options)
        return self.outs[site](x.transpose(1, 2).reshape(B, N, C))

    def attend_others(self, x: Tensor, others: Tensor, site: int) -> Tensor:
        """Queries of `x` `[B, n, c]`, keys and values of `others` `[B, m, c]`."""
        wq, wk, wv = self.qkvs[site].weight.chunk(3)
        q, k, v = (self.heads(F.linear(*pair)) for pair in ((x, wq), (others, wk), (others, wv)))
        return self.outs[site](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def block(self, x: Tensor, site: int, **options: Any) -> Tensor:
        x = x + self.attend(x, site, **options)
        return x + self.mlps[site](x)


# --- attention divided between space and time ---


class TimeSformer(nn.Module):
    """The class of transformers, tiny, without positions: its stream is `[b, 1 + h·w·t, c]`."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": 2, "intermediate_size": 16}
        config = T.TimesformerConfig(image_size=3 * PATCH, patch_size=PATCH, num_frames=4, **sizes)
        self.model = T.TimesformerModel(config)
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()  # those of the class are so small that attention hardly shows
        nn.init.zeros_(self.model.embeddings.position_embeddings)
        nn.init.zeros_(self.model.embeddings.time_embeddings)

    def forward(self, video: Tensor) -> Tensor:
        tokens: Tensor = self.model(video.transpose(1, 2)).last_hidden_state
        return tokens.mean(1)


def tokens_of_frames(m: Grouped, x: Tensor, **time: Any) -> Tensor:
    """The stream is `[b·t, h·w, c]`; `time` are options of temporal attention."""
    b, t, h, w, c = x.shape
    n = h * w
    x = x.reshape(b * t, n, c)
    for site in (0, 2):
        y = x.view(b, t, n, c).transpose(1, 2).reshape(b * n, t, c)
        y = y + m.attend(y, site, **time)
        x = y.view(b, n, t, c).transpose(1, 2).reshape(b * t, n, c)
        x = m.block(x, site + 1)
    return x.view(b, t, n, c)


def frames_in_batch(m: Grouped, x: Tensor) -> Tensor:
    return tokens_of_frames(m, x).mean((1, 2))


def causal(m: Grouped, x: Tensor) -> Tensor:
    return tokens_of_frames(m, x, is_causal=True).mean(2)


def causal_by_mask(m: Grouped, x: Tensor) -> Tensor:
    mask = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype).triu(1)
    return tokens_of_frames(m, x, attn_mask=mask).mean(2)


def places_in_batch(m: Grouped, x: Tensor) -> Tensor:
    """The stream is `[b·h·w, t, c]`."""
    b, t, h, w, c = x.shape
    n = h * w
    x = x.flatten(2, 3).transpose(1, 2).reshape(b * n, t, c)
    for site in (0, 2):
        x = x + m.attend(x, site)
        y = x.view(b, n, t, c).transpose(1, 2).reshape(b * t, n, c)
        y = m.attend(y, site + 1)
        x = x + y.view(b, t, n, c).transpose(1, 2).reshape(b * n, t, c)
        x = x + m.mlps[site](x)
    return x.view(b, n, t, c).mean((1, 2))


def four_dimensions(m: Grouped, x: Tensor) -> Tensor:
    """The stream is `[b, t, h·w, c]`; what is not attended is flattened for each attention alone."""
    x = x.flatten(2, 3)
    b, t, n, c = x.shape
    for site in (0, 2):
        x = x + m.attend(x.transpose(1, 2).flatten(0, 1), site).view(b, n, t, c).transpose(1, 2)
        x = x + m.attend(x.flatten(0, 1), site + 1).view(b, t, n, c)
        x = x + m.mlps[site](x)
    return x.mean((1, 2))


def factorised(m: Grouped, x: Tensor) -> Tensor:
    """ViViT's third model: the stream is `[b, t·h·w, c]`."""
    b, t, h, w, c = x.shape
    n = h * w
    x = x.reshape(b, t * n, c)
    for site in (0, 2):
        x = x + m.attend(x.view(b * t, n, c), site).view(b, t * n, c)
        y = x.view(b, t, n, c).transpose(1, 2).reshape(b * n, t, c)
        x = x + m.attend(y, site + 1).view(b, n, t, c).transpose(1, 2).reshape(b, t * n, c)
        x = x + m.mlps[site](x)
    return x.mean(1)


def alternating(m: Grouped, x: Tensor) -> Tensor:
    """Latte: whole blocks alternate between space and time, and a video leaves: `[b, t, 3, H, W]`."""
    b, t, h, w, c = x.shape
    n = h * w
    x = x.reshape(b * t, n, c)
    for site in (0, 2):
        x = m.block(x, site)
        x = x.view(b, t, n, c).permute(0, 2, 1, 3).reshape(b * n, t, c)
        x = m.block(x, site + 1)
        x = x.view(b, n, t, c).permute(0, 2, 1, 3).reshape(b * t, n, c)
    x = m.pixels(x).reshape(b, t, h, w, PATCH, PATCH, 3)
    return torch.einsum("bthwpqc->btchpwq", x).reshape(b, t, 3, h * PATCH, w * PATCH)


def frame_by_frame(m: Grouped, x: Tensor) -> tuple[Tensor, ...]:
    """An encoder of frames, which leave one by one."""
    b, t, h, w, c = x.shape
    x = x.reshape(b * t, h * w, c)
    for site in range(3):
        x = m.block(x, site)
    return x.view(b, t, h * w, c).mean(2).unbind(1)


def two_encoders(m: Grouped, x: Tensor) -> Tensor:
    """ViViT's second model: an encoder of frames, then one over their means."""
    x = torch.stack(frame_by_frame(m, x), 1)
    return m.block(x, 3).mean(1)


# --- windows ---


def windowed(x: Tensor, size: tuple[int, int]) -> Tensor:
    """`[b, h, w, c]` to `[b·h1·w1, h2·w2, c]`."""
    b, h, w, c = x.shape
    x = x.view(b, h // size[0], size[0], w // size[1], size[1], c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size[0] * size[1], c)


def unwindowed(x: Tensor, size: tuple[int, int], h: int, w: int) -> Tensor:
    x = x.view(-1, h // size[0], w // size[1], *size, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, h, w, x.shape[-1])


def regions(h: int, w: int, size: int, shift: int) -> Tensor:
    """Swin's mask `[windows, n, n]`: what was rolled in from the other side is hidden."""
    picture = torch.zeros(1, h, w, 1)
    cuts = (slice(0, -size), slice(-size, -shift), slice(-shift, None))
    for number, (rows, columns) in enumerate((rows, columns) for rows in cuts for columns in cuts):
        picture[:, rows, columns] = number
    seen = windowed(picture, (size, size)).squeeze(-1)
    return (seen.unsqueeze(1) != seen.unsqueeze(2)) * -100.0


def window_attention(m: Grouped, x: Tensor, site: int, size: int, shift: int = 0, masked: bool = False) -> Tensor:
    """Of a picture `[b, h, w, c]` of any size: norm, pad, roll, part, attend, and all back."""
    b, h, w, _ = x.shape
    x = F.pad(m.norms[site](x), (0, 0, 0, -w % size, 0, -h % size))
    height, width = x.shape[1:3]
    if shift:
        x = torch.roll(x, (-shift, -shift), (1, 2))
    options = {}
    if shift and masked:
        options["attn_mask"] = regions(height, width, size, shift).to(x).repeat(b, 1, 1).unsqueeze(1)
    y = m.attend_normed(windowed(x, (size, size)), site, **options)
    x = unwindowed(y, (size, size), height, width)
    if shift:
        x = torch.roll(x, (shift, shift), (1, 2))
    return x[:, :h, :w].contiguous()


def pictures(x: Tensor) -> Tensor:
    """Frames as samples, `[b·t, h, w, c]`."""
    return x.flatten(0, 1)


def swin(m: Grouped, x: Tensor, size: int, shift: int = 0, masked: bool = False) -> Tensor:
    """The stream is `[b, h, w, c]`; every other block is shifted, if there is a shift."""
    x = pictures(x)
    for site in range(3):
        x = x + window_attention(m, x, site, size, shift if site % 2 else 0, masked)
        x = x + m.mlps[site](x)
    return x.mean((1, 2))


def swin_with_bias(m: Grouped, x: Tensor) -> Tensor:
    """The stream is `[b, h·w, c]`, windows are 3 x 3, and a learned bias tells places of a window apart."""
    x = pictures(x)
    b, h, w, c = x.shape
    x = x.view(b, h * w, c)
    for site in range(2):
        parts = windowed(m.norms[site](x).view(b, h, w, c), (3, 3))
        y = m.attend_normed(parts, site, attn_mask=m.bias.unsqueeze(0))
        x = x + unwindowed(y, (3, 3), h, w).view(b, h * w, c)
        x = x + m.mlps[site](x)
    return x.mean(1)


def sam(m: Grouped, x: Tensor) -> Tensor:
    """Windows, then all of the picture, twice; a map leaves, `[b, c, h, w]`."""
    x = pictures(x)
    b, h, w, c = x.shape
    for site in (0, 2):
        x = x + window_attention(m, x, site, 3)
        x = x + m.mlps[site](x)
        x = x + m.attend(x.reshape(b, h * w, c), site + 1).view(b, h, w, c)
        x = x + m.mlps[site + 1](x)
    return x.permute(0, 3, 1, 2)


def windows_alone(m: Grouped, x: Tensor) -> Tensor:
    """No window meets another, and all tokens leave: `[b, h, w, c]`."""
    x = pictures(x)
    for site in range(2):
        x = x + window_attention(m, x, site, 3)
        x = x + m.mlps[site](x)
    return x


def windows_of_time(m: Grouped, x: Tensor) -> Tensor:
    """Windows of 2 frames, 2 rows and 3 columns."""
    b, t, h, w, c = x.shape
    grid = (b, t // 2, 2, h // 2, 2, w // 3, 3, c)
    for site in range(2):
        y = x.view(grid).permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, 12, c)
        y = m.attend(y, site).view(b, t // 2, h // 2, w // 3, 2, 2, 3, c)
        x = x + y.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, t, h, w, c)
        x = x + m.mlps[site](x)
    return x.mean((1, 2, 3))


def maxvit(m: Grouped, x: Tensor) -> Tensor:
    """Windows of 3 x 3, then a grid of 3 x 3: each of its parts holds one place of every window."""
    x = pictures(x)
    b, h, w, c = x.shape
    for site in (0, 2):
        x = x + window_attention(m, x, site, 3)
        x = x + m.mlps[site](x)
        y = x.view(b, 3, h // 3, 3, w // 3, c).permute(0, 2, 4, 1, 3, 5).reshape(-1, 9, c)
        y = m.attend(y, site + 1).view(b, h // 3, w // 3, 3, 3, c)
        x = x + y.permute(0, 3, 1, 4, 2, 5).reshape(b, h, w, c)
        x = x + m.mlps[site + 1](x)
    return x.mean((1, 2))


# --- blocks of 2 x 2 tokens that a later operator joins ---


def of_block_order(m: Grouped, x: Tensor, layers: int) -> Tensor:
    """Qwen-VL's tower: tokens come block by block, and four in a row become one."""
    b, h, w, c = pictures(x).shape
    x = pictures(x).view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h * w, c)
    for site in range(2):
        x = m.block(x, site)
    return shorter(m, m.merger(x.view(b, -1, 4 * c)), layers)


def of_rows(m: Grouped, x: Tensor, joined: Callable[[Grouped, Tensor], Tensor], layers: int) -> Tensor:
    """Tokens row by row, and `joined` makes `[b, h, w, c]` one `[b, h·w / 4, c]`."""
    b, h, w, c = pictures(x).shape
    x = pictures(x).reshape(b, h * w, c)
    for site in range(2):
        x = m.block(x, site)
    return shorter(m, joined(m, x.view(b, h, w, c)), layers)


def shorter(m: Grouped, x: Tensor, layers: int) -> Tensor:
    """More layers over the tokens that are left; without any, the tokens themselves leave."""
    for site in range(3, 3 + layers):
        x = m.block(x, site)
    return x.mean(1) if layers else x


def pixel_shuffle(m: Grouped, x: Tensor) -> Tensor:
    b, h, w, c = x.shape
    return m.merger(x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h * w // 4, 4 * c))


def internvl(m: Grouped, x: Tensor) -> Tensor:
    b, h, w, c = x.shape
    x = x.view(b, h, w // 2, c * 2).permute(0, 2, 1, 3).contiguous()
    x = x.view(b, w // 2, h // 2, c * 4).permute(0, 2, 1, 3).contiguous()
    return m.merger(x.reshape(b, -1, 4 * c))


def patch_merging(m: Grouped, x: Tensor) -> Tensor:
    """Swin's."""
    parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
    return m.merger(torch.cat(parts, -1)).flatten(1, 2)


def strided(m: Grouped, x: Tensor) -> Tensor:
    return m.pool(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)


def largest(m: Grouped, x: Tensor) -> Tensor:
    return F.max_pool2d(x.permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)


# --- keys that are not the tokens that ask ---


def framed(m: Grouped, x: Tensor) -> Tensor:
    """Every frame has a class token, and all attend to all: tokens lie along `t·(1 + h·w)`."""
    b, t, h, w, c = x.shape
    token = m.memory[:, None, :1].expand(b, t, -1, -1)
    x = torch.cat([token, x.flatten(2, 3)], 2).flatten(1, 2)
    for site in range(3):
        x = m.block(x, site)
    return x.view(b, t, 1 + h * w, c)[:, :, 0]


def heads_first(m: Grouped, x: Tensor) -> Tensor:
    """Hiera: heads are laid before the windows, which are whole rows of blocks."""
    x = windowed(pictures(x), (3, 3))
    b, n = BATCH, x.shape[1]
    for site in range(3):
        y = m.qkvs[site](m.norms[site](x)).view(b, -1, n, 3, HEADS, WIDTH // HEADS)
        q, k, v = y.permute(3, 0, 4, 1, 2, 5).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).permute(0, 2, 3, 1, 4).reshape(x.shape)
        x = x + m.outs[site](y)
        x = x + m.mlps[site](x)
    return x.reshape(b, -1, WIDTH).mean(1)


def with_memory(m: Grouped, x: Tensor, tokens: int) -> Tensor:
    """`tokens` learned ones join the keys, and ask nothing."""
    x = pictures(x).flatten(1, 2)
    for site in range(3):
        y = m.norms[site](x)
        memory = m.memory[:, :tokens].expand(x.shape[0], -1, -1)
        x = x + m.attend_others(y, torch.cat([memory, y], 1), site)
        x = x + m.mlps[site](x)
    return x.mean(1)


def block_means(m: Grouped, x: Tensor) -> Tensor:
    b, h, w, c = x.shape
    return x.view(b, h // 2, 2, w // 2, 2, c).mean((2, 4)).flatten(1, 2)


def of_pooled_keys(m: Grouped, x: Tensor, pooled: Callable[[Grouped, Tensor], Tensor]) -> Tensor:
    """PVT and SegFormer: all tokens ask one key for each block of 2 x 2."""
    b, h, w, c = pictures(x).shape
    x = pictures(x).reshape(b, h * w, c)
    for site in range(3):
        y = m.norms[site](x)
        x = x + m.attend_others(y, pooled(m, y.view(b, h, w, c)), site)
        x = x + m.mlps[site](x)
    return x.mean(1)


def of_pooled_tokens(m: Grouped, x: Tensor) -> Tensor:
    """LoFTR: blocks of 2 x 2 attend to each other, and every token gets what its block was told."""
    x = pictures(x)
    b, h, w, c = x.shape
    for site in range(2):
        y = block_means(m, m.norms[site](x))
        y = m.attend(y, site).view(b, h // 2, 1, w // 2, 1, c).expand(-1, -1, 2, -1, 2, -1)
        x = (x.view(y.shape) + y).view(x.shape)
        x = x + m.mlps[site](x)
    return x.mean((1, 2))


# --- the table ---


@dataclass(frozen=True)
class Model:
    """How to make a model, its grid of tokens `(t, h, w)`, and what need not hold for it."""

    make: Callable[[], nn.Module]
    grid: tuple[int, int, int]
    takes: str = ""
    """The coarser grouping that fits: any other may be refused."""
    refused: tuple[str, ...] = ()
    """Words of the texts that may refuse all merging, whatever the grouping."""
    equal: bool = True
    """Whether equal patches in a row stay equal tokens."""

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """In eval mode; the same weights at every call."""
        torch.manual_seed(0)
        return self.make().eval().to(dtype)

    def noise(self) -> Tensor:
        """A video `[b, 3, t, H, W]` of which no two patches are alike."""
        t, h, w = self.grid
        return drawn(BATCH, 3, t, h * PATCH, w * PATCH)

    def rows(self) -> Tensor:
        """A video whose frames are all one, and in which every row of patches repeats one patch."""
        t, h, w = self.grid
        return drawn(BATCH, 3, 1, h * PATCH, PATCH, seed=3).repeat(1, 1, t, 1, w)


IN_PART = "are not held whole by the residual stream"
ELSEWHERE = "are not those of the residual stream"
DEAR = "no merge pays"


def of(
    run: Callable[..., Any],
    *grid: int,
    takes: str = "",
    refused: tuple[str, ...] = (),
    equal: bool = True,
    **options: Any,
) -> Model:
    t, h, w = grid
    return Model(partial(Grouped, partial(run, **options)), (t, h, w), takes, refused, equal)


divided = partial(of, takes="shared", refused=(DEAR,))
windows = partial(of, refused=(IN_PART, ELSEWHERE, DEAR))
"""Some windows the stream does not have, or only in part: padded and rolled ones."""
blocks = partial(of, takes="blocks", refused=(DEAR,))
"""What a block needs of all its tokens is restored, and that may cost more than so small a model saves."""

MODELS: dict[str, Model] = {
    "divided: TimeSformer": Model(TimeSformer, (4, 3, 3), takes="shared", refused=(DEAR,)),
    "divided: frames in the batch": divided(frames_in_batch, 3, 3, 5),
    "divided: places in the batch": divided(places_in_batch, 3, 3, 5),
    "divided: four dimensions": divided(four_dimensions, 3, 3, 5),
    "divided: factorised": divided(factorised, 3, 3, 5),
    "divided: whole blocks, a video leaves": divided(alternating, 3, 3, 5),
    # One grouping for all frames would tell a frame of later ones: none may be shared here.
    "divided: causal": of(causal, 4, 3, 5, refused=(DEAR,)),
    "divided: causal by mask": of(causal_by_mask, 4, 3, 5, refused=(DEAR,)),
    "divided: frames leave one by one": of(frame_by_frame, 3, 3, 5),
    "divided: two encoders": of(two_encoders, 3, 3, 5),
    "divided: one frame": of(frames_in_batch, 1, 3, 5),
    "divided: one place": of(frames_in_batch, 4, 1, 1, refused=("it is temporal",)),
    "windows: no shift": windows(swin, 1, 6, 9, size=3),
    "windows: no shift, of frames": windows(swin, 3, 6, 9, size=3),
    "windows: learned bias": windows(swin_with_bias, 1, 6, 9, equal=False),
    "windows: rolled by half": windows(swin, 1, 8, 12, size=4, shift=2),
    "windows: rolled by half, masked": windows(swin, 1, 8, 12, size=4, shift=2, masked=True),
    "windows: rolled by a third": windows(swin, 1, 6, 9, size=3, shift=1),
    "windows: padded rows": windows(swin, 1, 5, 9, size=3, shift=1),
    "windows: padded": windows(swin, 1, 5, 7, size=3, shift=1, equal=False),
    "windows: then all": windows(sam, 1, 6, 9),
    "windows: then all, padded": windows(sam, 1, 5, 7, equal=False),
    "windows: alone": windows(windows_alone, 1, 6, 9),
    "windows: of time and space": windows(windows_of_time, 4, 6, 9),
    "windows: and grids": windows(maxvit, 1, 6, 9),
    "windows: and grids of their number": windows(maxvit, 1, 9, 9),
    "blocks: in order": blocks(of_block_order, 1, 6, 10, layers=0),
    "blocks: in order, layers follow": blocks(of_block_order, 1, 6, 10, layers=2),
    "blocks: in order, of frames": blocks(of_block_order, 3, 6, 10, layers=0),
    **{
        f"blocks: {name}{', layers follow' if layers else ''}": blocks(of_rows, 1, 6, 10, joined=joined, layers=layers)
        for name, joined in {
            "pixel shuffle": pixel_shuffle,
            "InternVL's": internvl,
            "Swin's": patch_merging,
            "by convolution": strided,
            "by maxima": largest,
        }.items()
        for layers in (0, 2)
    },
    "joint: a class token for every frame": of(framed, 3, 3, 5),
    "windows: heads before them": windows(heads_first, 1, 6, 9),
    "keys: and queries, of blocks": of(of_pooled_tokens, 1, 6, 10),
    "keys: memory": of(with_memory, 1, 3, 5, tokens=3),
    "keys: class token": of(with_memory, 1, 3, 5, tokens=1),
    **{
        f"keys: {name} of blocks": blocks(of_pooled_keys, 1, 6, 10, pooled=pooled)
        for name, pooled in {"means": block_means, "convolution": strided}.items()
    },
}
