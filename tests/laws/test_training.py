"""Backward through a merged graph, low precision, and what must not happen on the way: a wait for the host."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

import tldr_compile
from tests.laws.support import compiled, every_family, flat_inputs, graphs_for_inductor, merge, tensors
from tests.zoo import Case, case
from tldr_compile import passes
from tldr_compile.passes.check.projection import Projection, full_length
from tldr_compile.passes.check.verify import record

OPTIONS: list[dict[str, Any]] = [{}, {"saliency": "uniform"}, {"metric": "keys"}, {"reduction": "drop"}]


def gradients(outputs: Any, wanted: list[Tensor]) -> list[Tensor]:
    """Of a fixed random mixture of all outputs; zeros where an input has no part in it."""
    generator = torch.Generator().manual_seed(5)
    floats = [each for each in tensors(outputs) if each.is_floating_point()]
    mixed = torch.stack([(each.double() * torch.randn(each.shape, generator=generator)).sum() for each in floats]).sum()
    found = torch.autograd.grad(mixed, wanted, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@every_family
def test_gradients_are_those_of_the_meaning(case: Case, options: dict[str, Any]) -> None:
    """With the same groups, the slope of the merged graph in every parameter and pixel is that of its definition."""
    merged = merge(case, **options)
    inputs = [
        value.detach().clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in flat_inputs(case)
    ]
    wanted = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    outputs, found = record(merged.graph, merged.groupings, inputs)
    meaning = Projection(merged.plan, full_length(merged.plan, found), merged.options)
    ones, twos = gradients(outputs, wanted), gradients(meaning.run(*inputs), wanted)
    largest = max(float(two.abs().max()) for two in twos)  # a bias of keys has no slope but rounding
    for one, two in zip(ones, twos, strict=True):
        assert float((one - two).abs().max()) <= 1e-4 * float(two.abs().max()) + 1e-6 * largest


@pytest.mark.parametrize("road", ["apply", "compile"])
def test_a_fine_tuning_step_learns(road: str) -> None:
    chosen = case("videomae", "sdpa")
    model, (clip,) = chosen.build(), chosen.inputs(4)
    torch._dynamo.reset()
    tuned: Any = (
        tldr_compile.apply(model, (clip,), schedule=chosen.schedule)
        if road == "apply"
        else torch.compile(model, backend=eagerly(chosen))
    )
    target = torch.randn(4, model.config.num_labels, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = (tuned(clip).logits - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


def eagerly(case: Case) -> Any:
    """A backend that merges and then runs the graph as it is: Inductor's part is not what is looked at."""

    def backend(gm: fx.GraphModule, examples: list[Tensor]) -> Any:
        config = tldr_compile.TokenMerging(schedule=case.schedule)
        return passes.merge(passes.analyse(passes.from_dynamo(gm, examples), config), config, tldr_compile.ops).graph

    return backend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_autocast_merges_as_it_is_captured(dtype: torch.dtype) -> None:
    """Under autocast a capture casts as the model would; outputs have the model's dtypes, and its meaning."""
    chosen = case("videomae", "sdpa")
    model, (clip,) = chosen.build(), chosen.inputs()
    with torch.autocast("cpu", dtype):
        expected = model(clip)
        merged = tldr_compile.apply(model, (clip,), schedule=chosen.schedule, verify=True)
        actual = merged(clip)
        torch._dynamo.reset()
        with graphs_for_inductor():
            backend = compiled(model, schedule=list(chosen.schedule))(clip)
    assert actual.logits.dtype == expected.logits.dtype == backend.logits.dtype
    bound = 64 * torch.finfo(dtype).eps * float(expected.logits.abs().max())
    assert (actual.logits - backend.logits).abs().max() <= bound


@every_family
def test_no_operator_waits_for_numbers(case: Case) -> None:
    """Kept counts are static and nothing reads a tensor on the host: a merged graph can be captured as a CUDA graph."""
    merged = merge(case)
    values = [node.meta["val"] for node in merged.graph.graph.find_nodes(op="placeholder")]
    flat = make_fx(merged.graph, tracing_mode="fake")(*[_real(value) for value in values])
    waiting = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    assert not [node for node in flat.graph.nodes if waiting & set(getattr(node.target, "tags", ()))]


def _real(value: Any) -> Any:
    return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value


class Block(nn.Module):
    """Features `[B, N, C]`, attention, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


SIGNALS = [name for name, signal in tldr_compile.ops.SIGNALS.items() if "previous" not in signal.reads]
"""Those of features that tell no frames."""


@pytest.mark.parametrize("saliency", SIGNALS)
def test_transforms_of_a_merged_model_are_loops_of_autograd(saliency: str) -> None:
    """Gradients of all samples at once, and apart in inputs and parameters; masses are float32 in every model."""
    x = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    model = Block().double()
    merged, one = (tldr_compile.apply(model, (some,), schedule=[2, 2], saliency=saliency) for some in (x, x[:1]))
    parameters = dict(one.named_parameters())

    def loss(given: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(one, given, (sample[None],)).square().sum()

    samples = [sample.clone().requires_grad_() for sample in x]
    loops = [torch.autograd.grad(loss(parameters, sample), (sample, *parameters.values())) for sample in samples]
    wanted, *expected = (torch.stack(some) for some in zip(*loops, strict=True))
    detached = {name: value.detach() for name, value in parameters.items()}
    apart, inputs = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, 0))(detached, x)
    for name, other in zip(parameters, expected, strict=True):
        torch.testing.assert_close(apart[name], other, rtol=1e-4, atol=1e-5)
    out, transposed = torch.func.vjp(merged, x)
    jacobian = torch.func.jacrev(merged)(x)
    for found in (
        inputs,
        torch.func.grad(lambda clip: merged(clip).square().sum())(x),
        transposed(2 * out)[0],
        torch.tensordot(2 * out, jacobian, 3),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("saliency", SIGNALS)
def test_a_gradient_penalty_has_the_slope_that_its_differences_show(saliency: str) -> None:
    """Where no merge has a part in an attention, that is torch's own, which has second derivatives as `MATH` alone.

    Masses are float32 in every model, which rounds the differences.
    """
    x, step = torch.randn(2, 2, 12, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    merged = tldr_compile.apply(Block().double(), (x,), schedule=[2, 2], saliency=saliency)

    def penalty(clip: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(merged(clip).square().sum(), clip, create_graph=True)
        return slope.square().sum()

    with nullcontext() if saliency == "attention" else sdpa_kernel(SDPBackend.MATH):
        inputs = [(x + by * step).requires_grad_() for by in (-1e-4, 0.0, 1e-4)]
        below, here, above = (penalty(each) for each in inputs)
        (slope,) = torch.autograd.grad(here, inputs[1])
    torch.testing.assert_close((slope * step).sum(), (above - below) / 2e-4, rtol=3e-3, atol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@torch.no_grad()
def test_a_number_that_is_none_stays_in_its_sample(poison: float) -> None:
    x = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(2))
    merged = tldr_compile.apply(Block(), (x,), schedule=[4])
    clean = merged(x)
    x[1, 5, 3] = poison
    spoilt = merged(x)
    assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])
    assert not spoilt[1].isfinite().all()


@torch.no_grad()
def test_scores_beyond_half_precision_overflow_no_exponential() -> None:
    model = Block()
    for layer in (model.block.self_attn,):
        layer.in_proj_weight.mul_(40)
    x = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(2)) * 8
    for dtype in (torch.float16, torch.bfloat16):
        low = tldr_compile.apply(model.to(dtype), (x.to(dtype),), schedule=[4])
        assert low(x.to(dtype)).isfinite().all()


@torch.no_grad()
def test_shift_is_how_far_attention_moved_a_token() -> None:
    """Told by hand: the norm of what attention added, before the first merge."""
    x = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(2))
    model = Block().eval()
    layer = model.block
    normed = layer.norm1(x)
    moved = layer.self_attn(normed, normed, normed, need_weights=False)[0]
    merged = tldr_compile.apply(model, (x,), schedule=[4], saliency="shift", verify=True)
    (decision,) = tldr_compile.inspect(merged, x)
    torch.testing.assert_close(decision.saliency, tldr_compile.ops.saliency(moved.norm(dim=-1)), rtol=1e-4, atol=1e-5)
    kernels = [node for node in merged.graph_module.graph.nodes if node.target is tldr_compile.ops.attend_and_sharpness]
    assert not kernels
