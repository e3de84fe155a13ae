"""What is measured: a video, a tower for it, and a tower as transformers' exporter captures it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tldr_compile import exporters

CPU = torch.device("cpu")
FRACTION = 0.3  # of the tokens, at every layer that sees a whole frame


@dataclass(frozen=True)
class Size:
    """A video as `t, h, w` patches, what the models are configured with, and what compiles the towers."""

    grid: tuple[int, int, int]
    sight: Mapping[str, Any]
    text: Mapping[str, Any] = field(default_factory=dict)
    backend: str = "inductor"

    def compiled(self, tower: nn.Module) -> Callable[..., Any]:
        return torch.compile(tower, backend=self.backend)

    @property
    def schedule(self) -> list[float]:
        """`FRACTION` where a layer sees a whole frame; windows are left alone."""
        whole = self.sight["fullatt_block_indexes"]
        return [FRACTION if layer in whole else 0.0 for layer in range(self.sight["depth"])]


# The tower of Qwen2.5-VL-3B and 8 frames of 448 x 448, two of which are one in time.
FULL_TOWER = Size(
    (4, 32, 32),
    {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
)  # fmt: skip
# For such a video tower and language model cost about the same, as they do in Qwen2.5-VL-3B.
FULL_ANSWER = Size(
    FULL_TOWER.grid,
    {
        "depth": 16, "hidden_size": 512, "intermediate_size": 1368, "num_heads": 8, "out_hidden_size": 1024,
        "fullatt_block_indexes": [3, 7, 11, 15],
    },
    {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "head_dim": 128,
        "num_attention_heads": 8, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
)  # fmt: skip
# To see that everything runs.
TINY = Size(
    (2, 16, 16),
    {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    },
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    backend="eager",  # Inductor takes a minute for a part, whatever the size
)  # fmt: skip


class Exported(nn.Module):
    """A tower as transformers' exporter captures it, called like a merged one, which says `None` if nothing merges."""

    def __init__(self, tower: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.dtype, self.spatial_merge_size = tower.dtype, tower.spatial_merge_size
        program, self.preparation = exporters.capture(tower, (), inputs)
        self.graph = program.module()

    def forward(self, hidden_states: Tensor, grid_thw: Tensor) -> tuple[Any, None]:
        return self.graph(**self.preparation((), {"hidden_states": hidden_states, "grid_thw": grid_thw})), None
