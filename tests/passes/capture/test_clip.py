"""Which inputs carry the video, told by their rank and by what parameters embed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tldr_compile.passes.capture import clip_inputs, from_export


def found(model: nn.Module, *inputs: Any) -> set[str]:
    captured = from_export(torch.export.export(model, inputs))
    return {captured.names[name] for name in clip_inputs(captured)}


class Packed(nn.Module):
    """Rows of patches, beside tables of the same rank."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.table, self.mix = nn.Linear(12, 8), nn.Embedding(5, 8), nn.Linear(8, 8)

    def forward(self, patches: Tensor, weights: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        x = self.embed(patches) + (self.table(places) * weights[:, :, None]).sum(1)
        x, _ = x.split(4, 1)
        return self.mix(F.pad(x, (0, 4)) + mask @ F.pad(x, (0, 4)))


def test_what_parameters_embed_is_the_clip_and_not_its_tables() -> None:
    tables = torch.rand(6, 2), torch.zeros(6, 6), torch.randint(5, (6, 2))
    assert found(Packed(), torch.randn(6, 12), *tables) == {"patches"}


class Pair(nn.Module):
    def __init__(self, embedded: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8) if embedded else None

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        if self.embed is not None:
            one, two = self.embed(one), self.embed(two)
        return one.sum() + (two @ two.mT).sum()


@pytest.mark.parametrize("embedded", [True, False])
def test_several_inputs_of_one_rank_are_all_of_it(embedded: bool) -> None:
    assert found(Pair(embedded), torch.randn(2, 6, 4), torch.randn(2, 6, 4)) == {"one", "two"}


def test_pixels_are_a_clip_as_numbers_too() -> None:
    class Scaled(nn.Module):
        def forward(self, video: Tensor, scale: Tensor) -> Tensor:
            return video.float() * scale.sum()

    assert found(Scaled(), torch.zeros(1, 3, 2, 4, 4, dtype=torch.uint8), torch.rand(2, 2)) == {"video"}
