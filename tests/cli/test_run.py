"""Where the tokens of a merge lie on the picture, however they were grouped."""

from __future__ import annotations

import torch

from tldr_compile.cli.run import on_grid
from tldr_compile.inspection import Decision

NOTHING = torch.empty(0)


def decision(run: dict[str, int], apart: dict[str, int], joined: dict[str, int] | None = None) -> Decision:
    names, sizes = zip(*((tuple(each), tuple(each.values())) for each in (run, apart, joined or {})), strict=True)
    return Decision(0, names[0], sizes[0], names[1], sizes[1], names[2], sizes[2], NOTHING, NOTHING, NOTHING)


def test_joint_tokens_are_the_first_sample() -> None:
    values = torch.arange(2 * 24).reshape(2, 24)
    grid = on_grid(decision({"t": 2, "h": 3, "w": 4}, {"b": 2}), values)
    assert grid is not None
    assert torch.equal(grid, values[0].reshape(2, 3, 4))


def test_one_grouping_for_all_frames_is_shown_over_all_of_them() -> None:
    values = torch.arange(12)[None]
    grid = on_grid(decision({"h": 3, "w": 4}, {"b": 1}, {"t": 2}), values)
    assert grid is not None
    assert torch.equal(grid, values.reshape(3, 4).expand(2, 3, 4))


def test_windows_and_blocks_are_put_together_again() -> None:
    """Windows of 2 x 2 on a grid of 4 x 6, and blocks of 2 x 2 on the same."""
    place = torch.arange(24).reshape(1, 2, 2, 3, 2)  # t, h1, h2, w1, w2
    windows = on_grid(
        decision({"h2": 2, "w2": 2}, {"b": 1, "t": 1, "h1": 2, "w1": 3}), place.permute(0, 1, 3, 2, 4).reshape(6, 4)
    )
    assert windows is not None
    assert torch.equal(windows, torch.arange(24).reshape(1, 4, 6))
    blocks = on_grid(decision({"h1": 2, "w1": 3}, {"t": 1}, {"h2": 2, "w2": 2}), torch.arange(6)[None])
    assert blocks is not None
    assert torch.equal(blocks[0, ::2, ::2], torch.arange(6).reshape(2, 3))
    assert torch.equal(blocks[0, 1::2, 1::2], torch.arange(6).reshape(2, 3))


def test_tokens_without_rows_have_no_picture() -> None:
    assert on_grid(decision({"n": 6}, {"b": 1}), torch.arange(6)[None]) is None
