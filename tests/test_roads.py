"""Every road that a merged model can take, with the real library, to the numbers that `apply` gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch._inductor import compile_fx
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from benchmarks.roads.roads import HERE, ROADS, Road
from benchmarks.roads.subjects import QUICK, SCHEDULE, Encoder, clips
from tldr_compile import CaptureError, MergedModule, apply


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_fx, "compile_fx", lambda graph, *_, **__: graph.forward)


@pytest.mark.parametrize("road", [each for each in ROADS if each.test == HERE], ids=lambda each: each.name)
@pytest.mark.usefixtures("without_inductor")
def test_it_leads_to_the_same_numbers(road: Road, monkeypatch: pytest.MonkeyPatch) -> None:
    if road.needs is not None:
        pytest.importorskip(road.needs)
    monkeypatch.setenv(QUICK, "1")  # for its other processes
    far = road.walk()
    assert tuple(far) == tuple(road.ends)
    assert max(far.values()) <= road.bound


@torch.no_grad()
def test_a_compiled_model_that_was_quantised_is_told_what_to_do() -> None:
    model = Encoder().eval()
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"Int8Tensor, .*quantize_\(merged, config\)"):
        torch.compile(model, backend="tldr", options={"schedule": SCHEDULE})(clips())


# --- layers sharded one by one ---


@pytest.fixture
def one_of_two() -> Iterator[None]:
    """This process is the first of two, of which the other is made up: nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def layered() -> Encoder:
    model = Encoder().eval()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def merged() -> MergedModule:
    return apply(Encoder().eval(), (clips(),), schedule=SCHEDULE)


@pytest.mark.parametrize("options", [{"protect": 0}, {"schedule": [6, 4]}], ids=str)
@pytest.mark.usefixtures("one_of_two", "without_inductor")
def test_a_sequence_for_layers_that_are_sharded_one_by_one_is_refused(options: dict[str, object]) -> None:
    ways = r"(?s)attention is spread over several: .*Encoder.forward .*fully_shard\(tldr_compile.apply\("
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=ways):
        torch.compile(layered(), backend="tldr", options=options)(clips())


@pytest.mark.usefixtures("one_of_two", "without_inductor")
def test_a_fraction_merges_in_each_layer_and_says_so() -> None:
    with pytest.warns(UserWarning, match=r"merged in 2 graphs of one call .*depend on where the model is broken"):
        torch.compile(layered(), backend="tldr", options={"schedule": SCHEDULE, "protect": 0})(clips())


@pytest.mark.usefixtures("one_of_two")
def test_a_layer_of_a_merged_module_is_not_sharded_and_leaves_no_trace() -> None:
    module = merged()
    layers = [module.get_submodule(f"blocks.{k}") for k in range(2)]
    for asked in (*layers, layers):
        with pytest.raises(CaptureError, match=r"by itself: nobody calls it.* as one \(fully_shard\(merged\)\)"):
            fully_shard(asked)
    with pytest.raises(CaptureError, match="no layers to go through one by one"):
        iter(module.blocks)
    fully_shard(module)
    assert all(isinstance(each, DTensor) for each in module.parameters())


@pytest.mark.usefixtures("one_of_two")
def test_a_sharded_model_is_to_be_merged_before() -> None:
    with pytest.raises(CaptureError, match=r"sharded \(DTensor\): apply tldr_compile to the model before"):
        apply(layered(), (clips(),), schedule=SCHEDULE)
