"""The recipe of a random transformer: every field is one choice that real models make."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

PATCH = 12  # features of a token that comes from outside
TEXT, WIDTH = 2, 16  # tokens of text, and channels of every token


@dataclass(frozen=True)
class Recipe:
    """What to build. The grid is (frames, rows, columns) of patches; all sizes are small and often odd."""

    embed: str = "conv3d"
    # conv3d, frames (a batch of frames), folded (that come so), tokens (features [B, N, PATCH]), rows (all in one row)
    grid: tuple[int, int, int] = (2, 3, 3)
    batch: int = 2
    before: int = 0  # tokens that the model adds before and after those of the clip
    after: int = 0
    position: str = "learned"  # none, learned, sinusoidal, interpolated, ids (an input), arange, table, axial (rotary)
    layout: str = "batch"  # batch, sequence (first), grid (two dimensions of tokens), packed (all samples in one row)
    norm: str = "pre"  # pre, post, none
    branch: str = "serial"
    # serial, parallel, scaled (LayerScale), inplace, ushaped, between (attention over frames), joint (after one block),
    # twins (two attentions on one residual), windows (attention in windows two columns wide)
    attention: str = "sdpa"  # sdpa, matmul, bmm, baddbmm, einsum, capped, sinks, talking, module
    qkv: str = "fused"  # fused, split, grouped, multiquery, normed, prompted (learned tokens among the keys)
    scale: str = "after"  # after, before, both, divided
    bias: str = "none"  # none, relative, inplace, causal, padding (an input)
    mlp: str = "gelu"  # gelu, gated, mixing (of tokens), experts, routed, convolution, squeezed
    tail: str = "mean"
    # mean, first, tokens, pooled, dense, states, skip, softmax, frames, difference, product, attentions, decoder,
    # spelled (what is equal in eager, in several spellings), blocks (neighbours become one, and attention follows)
    beside: str = "none"  # none, scale (another patch size), view (another clip, an input), text (leads, an input)
    dtype: str = "float32"  # float32, float64, bfloat16
    dynamic: bool = False  # the batch
    depth: int = 2
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
    def clip_tokens(self) -> int:
        t, h, w = self.grid
        return h * w * (1 if self.per_frame else t)

    @property
    def per_frame(self) -> bool:
        """Whether the batch is one of frames."""
        return self.embed in ("frames", "folded")

    @property
    def leading(self) -> int:
        """Tokens before those of the clip: the model's own, and text."""
        return self.before + TEXT * (self.beside == "text")

    @property
    def tokens(self) -> int:
        return self.clip_tokens + self.leading + self.after

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}[self.dtype]

    @property
    def joins(self) -> bool:
        """Whether blocks over single frames are followed by blocks over all tokens; tables know one length only."""
        return (
            (self.branch, self.per_frame, self.layout, self.bias) == ("joint", True, "batch", "none")
            and not (self.before or self.after or self.position in ("arange", "table", "axial"))
            and self.mlp not in ("mixing", "convolution")
            and self.depth > 1
        )

    @property
    def paired(self) -> bool:
        """Whether columns can be taken two by two, beside each other in every row of a plain sequence."""
        return self.grid[2] % 2 == 0 and self.layout == "batch"

    @property
    def duplicable(self) -> bool:
        """Are tokens that come in equal still equal at every place where they are read?"""
        return (
            self.embed == "tokens"
            and self.position == "none"
            and self.bias == "none"
            and self.mlp not in ("mixing", "convolution")
            and self.dtype == "float32"
        )

    def inputs(self, batch: int | None = None, duplicates: bool = False) -> tuple[Tensor, ...]:
        """A clip, and what else the model asks for. `duplicates`: neighbours in the clip are equal."""
        t, h, w = self.grid
        b = self.batch if batch is None else batch
        shape = {
            "conv3d": (b, 3, 2 * t, 4 * h, 4 * w),
            "frames": (b, t, 3, 4 * h, 4 * w),
            "folded": (b * t, 3, 4 * h, 4 * w),
            "tokens": (b, t * h * w, PATCH),
            "rows": (b * t * h * w, PATCH),
        }[self.embed]
        generator = torch.Generator().manual_seed(self.seed)
        clip = torch.randn(shape, generator=generator)
        if duplicates:
            clip = clip[:, ::2].repeat_interleave(2, 1)[:, : clip.shape[1]]
        ids = (torch.arange(self.tokens).flip(0)[None],) if self.position == "ids" else ()
        keep = (torch.arange(self.tokens)[None].expand(b, -1) > 0,) if self.bias == "padding" else ()
        added = {"view": shape, "text": (b, TEXT, WIDTH)}
        beside = [torch.randn(added[self.beside], generator=generator)] if self.beside in added else []
        return (clip.to(self.torch_dtype), *ids, *(each.to(self.torch_dtype) for each in beside), *keep)
