"""Every road that a merged model can take, with the real library, to the numbers that `apply` gives."""

from __future__ import annotations

import pytest
import torch
from torch._inductor import compile_fx
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from benchmarks.roads.roads import HERE, ROADS, Road
from benchmarks.roads.subjects import QUICK, SCHEDULE, Encoder, clips


@pytest.mark.parametrize("road", [each for each in ROADS if each.test == HERE], ids=lambda each: each.name)
def test_it_leads_to_the_same_numbers(road: Road, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_fx, "compile_fx", lambda graph, *_, **__: graph.forward)
    monkeypatch.setenv(QUICK, "1")  # for its other processes
    far = road.walk()
    assert tuple(far) == road.ends
    assert max(far.values()) <= road.bound


@torch.no_grad()
def test_a_compiled_model_that_was_quantised_is_told_what_to_do() -> None:
    model = Encoder().eval()
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"Int8Tensor, .*quantize_\(merged, config\)"):
        torch.compile(model, backend="tldr", options={"schedule": SCHEDULE})(clips())
