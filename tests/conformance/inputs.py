"""Inputs for any encoder, by what its `forward` asks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from tests.conformance.shrink import CHANNELS, number, patch, side

TIMES = ("temporal_patch_size", "patch_temporal")
BATCH = 2
FRAMES = 4
Grids = tuple[tuple[int, int, int], ...]
# Two of one size: transformers' exporter takes no other. Larger than windows are, so that a frame has several.
CLIPS: Grids = ((2, 16, 8), (2, 16, 8))
PICTURES: Grids = ((1, 16, 8), (1, 16, 8))
STRIPS = "strips"


@dataclass(frozen=True)
class Facts:
    """What a configuration says about its inputs.

    Attributes:
        channels: of a picture.
        side: pixels across a picture.
        patch: pixels across a patch.
    """

    config: PreTrainedConfig
    channels: int
    side: int
    patch: int

    @property
    def patch_values(self) -> int:
        return self.channels * self.patch**2


def candidates(model: nn.Module, config: PreTrainedConfig, grid: int | None) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Inputs that the model may take, with what they are; the likeliest first. Pictures are `grid` patches across."""
    takes = inspect.signature(model.forward).parameters
    facts = Facts(config, number(config, CHANNELS) or 3, side(config, grid), patch(config))
    for kind, make in KINDS.items():
        made = make(facts, takes)
        if made is not None:
            yield kind, made | _rest(facts, takes, made)


Parameters = Mapping[str, inspect.Parameter]
Maker = Callable[[Facts, Parameters], "dict[str, Tensor] | None"]


def _pictures(*lead: int, height: int = 1) -> Maker:
    """`[*lead, C, H, W]`, of which a model may take several."""

    def make(facts: Facts, takes: Parameters) -> dict[str, Tensor] | None:
        if (pixels := _pixels(takes)) is None or any("grid_thw" in name and _required(takes, name) for name in takes):
            return None
        shape = (*lead, facts.channels, facts.side // height, facts.side)
        others = [name for name in takes if name.startswith("prompt_") and _required(takes, name)]
        return {name: _random(*shape, seed=seed) for seed, name in enumerate((pixels, *others))}

    return make


def _packed(grids: Grids, layout: str) -> Maker:
    """Patches of several pictures or clips in one row, with their grids."""

    def make(facts: Facts, takes: Parameters) -> dict[str, Tensor] | None:
        grid = next((name for name in takes if name.endswith("grid_thw")), None)
        if grid is None:
            return None
        across, channels, tokens = facts.patch, facts.channels, sum(map(prod, grids))
        time = number(facts.config, TIMES) or 1
        shapes = {
            "flat": (tokens, channels * time * across * across),
            "square": (tokens, channels, across, across),
            "batch": (1, tokens, channels, across, across),
        }
        merge = number(facts.config, ("spatial_merge_size",)) or 1
        shapes["merged"] = (tokens, across * merge, across * merge, channels)
        first = _pixels(takes) or next(iter(takes))
        return {first: _random(*shapes[layout]), grid: torch.tensor(grids)}

    return make


def _padded(facts: Facts, takes: Parameters) -> dict[str, Tensor] | None:
    """Patches of pictures of their own size, padded to one length: `[B, N, C p p]`."""
    pixels = _pixels(takes)
    if pixels is None or "spatial_shapes" not in takes:
        return None
    inputs = {
        pixels: _random(BATCH, 24, facts.patch_values),
        "spatial_shapes": torch.tensor([[6, 4], [4, 5]]),
    }
    mask = next((name for name in takes if name.endswith("attention_mask")), None)
    return inputs if mask is None else inputs | {mask: torch.arange(24) < torch.tensor([[24], [20]])}


def _patches(facts: Facts, takes: Parameters) -> dict[str, Tensor] | None:
    """Patches of pictures of one size: `[B, N, C p p]`, with their places where the model asks for them."""
    pixels = _pixels(takes)
    if pixels is None:
        return None
    places = next((name for name in takes if name.endswith("position_ids") and _required(takes, name)), None)
    known = number(facts.config, ("num_position_embeddings",)) if places is None else None
    tokens = known or 36
    inputs = {pixels: _random(BATCH, tokens, facts.patch_values)}
    if places is not None:
        inputs[places] = torch.cartesian_prod(torch.arange(6), torch.arange(6)).expand(BATCH, 36, 2).contiguous()
    return inputs


def _strip(facts: Facts, takes: Parameters) -> dict[str, Tensor] | None:
    """The patches of several pictures side by side: `[1, C, p, N p]`, with the pictures' grids."""
    pixels = _pixels(takes)
    if pixels is None or "target_sizes" not in takes:
        return None
    grids = torch.tensor(PICTURES)[:, 1:]
    tokens = int(grids.prod(-1).sum())
    return {pixels: _random(1, facts.channels, facts.patch, tokens * facts.patch), "target_sizes": grids}


def _tiled(facts: Facts, takes: Parameters) -> dict[str, Tensor] | None:
    """Pictures cut into tiles: `[B, 1, tiles, C, H, W]`, with the tiles' layout."""
    pixels, tiles = _pixels(takes), number(facts.config, ("max_num_tiles",))
    if pixels is None or tiles is None or "aspect_ratio_ids" not in takes:
        return None
    shape = (BATCH, 1, tiles, facts.channels, facts.side, facts.side)
    mask = torch.ones(BATCH, 1, tiles, dtype=torch.long)
    return {pixels: _random(*shape), "aspect_ratio_ids": mask[..., 0], "aspect_ratio_mask": mask}


def _cubes(facts: Facts, takes: Parameters) -> dict[str, Tensor] | None:
    """Patches of clips with the channels last: `[N, T, p, p, C]`."""
    pixels, time = _pixels(takes), number(facts.config, TIMES)
    if pixels is None or time is None:
        return None
    return {pixels: _random(BATCH * 36, time, facts.patch, facts.patch, facts.channels)}


KINDS: Mapping[str, Maker] = {
    "pictures": _pictures(BATCH),
    "clips": _pictures(BATCH, FRAMES),
    "pairs of pictures": _pictures(BATCH, 2),
    "frames": _pictures(BATCH * FRAMES),
    "pictures of half the height": _pictures(BATCH, height=2),
    "tiles": _tiled,
    STRIPS: _strip,
    "packed patches of clips": _packed(CLIPS, "flat"),
    "packed patches of pictures": _packed(PICTURES, "flat"),
    "packed squares": _packed(PICTURES, "square"),
    "a batch of packed squares": _packed(PICTURES, "batch"),
    "packed merged squares": _packed(PICTURES, "merged"),
    "padded patches": _padded,
    "patches": _patches,
    "cubes": _cubes,
}


def apart(kind: str, inputs: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The dimensions of the inputs in which samples, frames, or the pictures of a row may lie apart."""
    if kind == STRIPS:
        return (3,)
    return (0, 1) if any(value.ndim > 4 for value in inputs.values()) else (0,)


def _rest(facts: Facts, takes: Parameters, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What else `forward` cannot do without: numbers of tokens, and nothing masked."""
    rest = {}
    for name in takes:
        if name in made or not _required(takes, name):
            continue
        if name.endswith("mask"):
            rest[name] = torch.ones(BATCH, 5, dtype=torch.long)
        elif name.endswith("merge_sizes"):
            rest[name] = torch.full((2,), 2)
        elif name.endswith(("ids", "inputs")):
            length = number(facts.config, ("task_seq_len",)) or 5
            rest[name] = torch.arange(BATCH * length).reshape(BATCH, length)
    return rest


def _pixels(takes: Parameters) -> str | None:
    return next((name for name in takes if name.startswith("pixel_values")), None)


def _required(takes: Parameters, name: str) -> bool:
    parameter = takes[name]
    return parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2 + seed))
