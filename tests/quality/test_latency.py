from __future__ import annotations

import time

import torch
from torch import Tensor

from benchmarks.quality import latency


def test_ratios_are_to_the_dense_model() -> None:
    seen: list[Tensor] = []

    def slow(clips: Tensor) -> None:
        time.sleep(0.02)

    calls = {("dense", None): slow, ("fast", 0.5): seen.append}
    told = latency.ratios(calls, ("dense", None), torch.zeros(2), rounds=3)
    assert told["dense", None] == (1, 1, 1)
    assert told["fast", 0.5].max < 0.5
    assert len(seen) == 2 + 3
