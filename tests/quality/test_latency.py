from __future__ import annotations

import time

import torch
from torch import Tensor
from transformers import VideoMAEForVideoClassification

from tests.laws.support import graphs_for_inductor
from tests.quality.support import config
from tldr_compile import TokenMerging, ops
from tldr_compile.quality import latency
from tldr_compile.quality.budget import Cell


def test_ratios_are_to_the_dense_model() -> None:
    seen: list[Tensor] = []

    def slow(clips: Tensor) -> None:
        time.sleep(0.02)

    calls = {("dense", None): slow, ("fast", 0.5): seen.append}
    told = latency.ratios(calls, ("dense", None), torch.zeros(2), rounds=3)
    assert told["dense", None] == (1, 1, 1)
    assert told["fast", 0.5].max < 0.5
    assert len(seen) == 2 + 3


def test_dense_and_merged_are_compiled_and_timed() -> None:
    model = VideoMAEForVideoClassification(config(side=32, frames=4)).eval()
    cell = Cell("vid-TLDR", 0.5, (TokenMerging(schedule=(0.5,)),), 0.1)
    with graphs_for_inductor() as graphs:
        calls = latency.calls({"dense": model}, "dense", [cell])
        told = latency.ratios(calls, ("dense", None), torch.randn(1, 4, 3, 32, 32), rounds=2)
    merges = [sum(node.target is ops.group for node in graph.graph.nodes) for graph in graphs]
    assert merges == [0, 1]
    assert told["dense", None] == (1, 1, 1)
    assert 0 < told["vid-TLDR", 0.5].min <= told["vid-TLDR", 0.5].max
