"""Every tile that a kernel may take, timed: what the tables of `tldr_compile.ops.triton_parts` were chosen by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch

from benchmarks import timing
from benchmarks.gpu.driver import Jobs, Setup
from benchmarks.gpu.kernels import graphed
from benchmarks.gpu.load import dtype_on
from tldr_compile import ops

SHAPES = ((8, 12, 2352, 64), (1, 12, 1552, 64), (8, 16, 1568, 128))  # samples, heads, tokens, channels
TILES = (
    *((64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 3), (128, 64, 4, 3)),
    *((128, 128, 8, 2), (128, 128, 8, 3), (64, 128, 4, 2), (64, 32, 4, 3)),
)
TABLES = ("attend_tile", "share_tile", "match_tile")


def tiles(setup: Setup) -> Jobs:
    """A row for every shape and tile; a tile that does not fit the chip is refused."""
    if setup.device.type != "cuda":
        return
    for shape in SHAPES:
        for tile in TILES:
            yield f"{shape}, tile {tile}", partial(measure, shape, tile, setup)


@torch.inference_mode()
def measure(shape: Sequence[int], tile: Sequence[int], setup: Setup) -> dict[str, Any]:
    """Median seconds of each operator when all of its kernels take this tile."""
    from triton.runtime.errors import OutOfResources  # noqa: PLC0415 - may be missing

    calls: dict[str, Callable[[], Any]] = {}
    refused: dict[str, str] = {}
    with taken(tile):
        for name, call in operators(shape, setup.device).items():
            try:
                calls[name] = graphed(call, setup.device)
            except OutOfResources as error:
                refused[name] = f"does not fit: {error}"[:100]
        found = timing.paired(calls, setup.device, rounds=5, least=0.005)
    return {
        "shape": shape,
        "tile": tile,
        "seconds": {name: timing.Spread.of(each).median for name, each in found.items()},
        "refused": refused,
    }


def operators(shape: Sequence[int], device: torch.device) -> Mapping[str, Callable[[], Any]]:
    batch, heads, tokens, channels = shape
    joint = torch.randn(batch, tokens, 3, heads, channels, device=device).to(dtype_on(device))
    q, k, v = joint.permute(2, 0, 3, 1, 4).unbind(0)
    log_mass = torch.rand(batch, 1, 1, tokens, device=device)
    metric = joint[:, :, 0].flatten(2)
    return {
        "masses": partial(ops.attend, q, k, v, log_mass=log_mass),
        "sharpness": partial(ops.attend_and_sharpness, q, k, v),
        "sharpness and masses": partial(ops.attend_and_sharpness, q, k, v, log_mass=log_mass),
        "matching": partial(ops.match, metric),
    }


@contextmanager
def taken(tile: Sequence[int]) -> Iterator[None]:
    """Every kernel takes this tile."""
    from tldr_compile.ops import triton_parts  # noqa: PLC0415 - needs Triton

    chosen = triton_parts.Tile(*tile)
    with mock.patch.multiple(triton_parts, **{name: lambda *sizes: chosen for name in TABLES}):
        yield


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The fastest tile of every operator at every shape, in milliseconds."""
    best: dict[tuple[str, str], tuple[float, str]] = {}
    for row in rows:
        for name, seconds in row.get("seconds", {}).items():
            key, found = (str(row["shape"]), name), (1000 * seconds, str(row["tile"]))
            best[key] = min(best.get(key, found), found)
    return "\n".join(f"{shape} {name:<22} {ms:8.3f} ms, tile {tile}" for (shape, name), (ms, tile) in best.items())
