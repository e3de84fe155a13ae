"""Every provider against the specification, and the registered operator as torch sees it."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.exc import InvalidCxxCompiler
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tldr_compile import ops
from tldr_compile.ops import blocked, native, reference

MASKS: dict[str, Callable[[int, int, int, int], Tensor]] = {
    "bool of keys": lambda b, h, q, k: torch.rand(b, 1, 1, k) < 0.7,
    "bool of pairs": lambda b, h, q, k: torch.rand(q, k) < 0.5,
    "additive per head": lambda b, h, q, k: torch.randn(1, h, q, k),
    "additive with -inf": lambda b, h, q, k: torch.where(torch.rand(b, h, q, k) < 0.5, -torch.inf, 1.0),
    "all of one row hidden": lambda b, h, q, k: (torch.arange(q) != q // 2)[:, None].expand(q, k),
    "everything hidden": lambda b, h, q, k: torch.full((1, 1, 1, k), -torch.inf),
}


@pytest.fixture(autouse=True, params=["blocked", "native"])
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One of the providers; blocks so small that the tests' sizes take many of them, and end in a partial one."""
    torch.manual_seed(0)
    monkeypatch.setitem(blocked.BLOCK_BYTES, "cpu", 400)
    monkeypatch.setattr(native, "PACKED_BYTES", 4096)
    if request.param == "blocked":
        for each in ops.PROVIDERS.values():
            monkeypatch.setattr(each, "order", [one for one in each.order if one.name != "native"])
    return str(request.param)


def qkv(b: int, h: int, n: int, m: int, d: int = 4, c: int = 5, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(b, h, n, d, **options), torch.randn(b, h, m, d, **options), torch.randn(b, h, m, c, **options)


def log_masses(b: int, m: int, **options: Any) -> Tensor:
    return (torch.rand(b, 1, 1, m, **options) * 5 + 1).log()


def both(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> list[tuple[Tensor, Tensor]]:
    """The output of attention alone, that beside sharpness, and sharpness; beside each what the specification says."""
    results = ops.attend(q, k, v, scale=0.5, **options), *ops.attend_and_sharpness(q, k, v, scale=0.5, **options)
    out, sharp = reference.attention_with_sharpness(q, k, v, scale=0.5, **options)
    return list(zip(results, (out, out, sharp), strict=True))


sizes = st.integers(1, 23)


@settings(max_examples=60)
@given(b=st.integers(1, 5), h=st.integers(1, 3), n=sizes, m=sizes, budget=st.integers(1, 4000), with_mass=st.booleans())
def test_equals_the_specification_for_any_size(b: int, h: int, n: int, m: int, budget: int, with_mass: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(blocked.BLOCK_BYTES, "cpu", budget)
        for found, expected in both(*qkv(b, h, n, m), log_mass=log_masses(b, m) if with_mass else None):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_mass", [False, True])
def test_blocks_and_threads_change_nothing(with_mass: bool) -> None:
    """Several blocks on one thread, the last of them partial, and lower blocks on three."""
    q, k, v = qkv(2, 2, 250, 2350, d=20, c=40)
    log_mass, threads = log_masses(2, 2350) if with_mass else None, torch.get_num_threads()
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(ops.attend_and_sharpness(q, k, v, scale=0.5, log_mass=log_mass))
    torch.set_num_threads(threads)
    expected = reference.attention_with_sharpness(q, k, v, scale=0.5, log_mass=log_mass)
    for one, other, exact in zip(*found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(one, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("provider", ["native"], indirect=True)
def test_threads_that_only_the_environment_sets(provider: str) -> None:
    """Another thread then counts otherwise: what it writes beside its scratch memory ends the process."""
    code = """
import torch
from tldr_compile import ops
for rows in range(1, 200):
    ops.attend_and_sharpness(*torch.randn(3, 1, 2, rows, 8))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("with_mass", [False, True])
def test_any_strides(with_mass: bool) -> None:
    q, k, _ = torch.randn(2, 11, 3, 3, 8).permute(2, 0, 3, 1, 4)
    v = torch.randn(2, 3, 5, 11).mT
    mask = torch.rand(11, 3, 11, 2).permute(3, 1, 0, 2)
    log_mass = torch.rand(2, 11, 3).mT[:, :, None] if with_mass else None
    for one in (mask, mask < 0.5):
        for found, expected in both(q, k, v, mask=one, log_mass=log_mass):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("batch", "rows"), [(0, 7), (2, 0)])
def test_nothing_in_nothing_out(batch: int, rows: int) -> None:
    out, sharp = ops.attend_and_sharpness(*qkv(batch, 2, rows, 9), log_mass=log_masses(1, 9))
    assert (out.shape, sharp.shape) == ((batch, 2, rows, 5), (batch, rows))


@pytest.mark.parametrize("provider", ["native"], indirect=True)
def test_nothing_to_attend_to_gives_zeros(provider: str) -> None:
    out, sharp = ops.attend_and_sharpness(*qkv(2, 2, 7, 0))
    assert not out.any()
    assert not sharp.any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    q, k, v = qkv(1, 2, 7, 20)
    q[0, 1, 3] = value
    for found, expected in both(q, k, v, mask=torch.arange(20) < 18, log_mass=log_masses(1, 20)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert found.isnan().nonzero().tolist() == [[0, 3]]


def test_masses_that_differ_by_query() -> None:
    for found, expected in both(*qkv(2, 3, 7, 9), log_mass=torch.rand(2, 1, 7, 9)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("provider", ["native"], indirect=True)
def test_without_a_compiler_one_warning_and_the_same_results(
    provider: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> None:
        raise InvalidCxxCompiler

    q, k, v = qkv(2, 2, 7, 9)
    expected = ops.attend_and_sharpness(q, k, v)
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", missing)
        native.compiles.cache_clear()
        found = [ops.attend_and_sharpness(q, k, v) for _ in range(2)]
    native.compiles.cache_clear()
    torch.testing.assert_close(found, [expected] * 2, rtol=1e-5, atol=1e-5)
    (message,) = caplog.messages
    assert "install a C++ compiler, or name one in the environment variable CXX" in message
    assert "No working C++ compiler found" in message


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("with_mass", [False, True])
def test_masks_enter_both_results_and_masses_only_the_output(kind: str, with_mass: bool) -> None:
    q, k, v = qkv(3, 2, 11, 13)
    mask, log_mass = MASKS[kind](3, 2, 11, 13), log_masses(3, 13) if with_mass else None
    for found, expected in both(q, k, v, mask=mask, log_mass=log_mass):
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ops.sharpness(q, k, scale=0.5, mask=mask), found, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [None, *MASKS])
def test_what_keys_receive_is_the_mean_over_heads_and_queries(kind: str | None) -> None:
    q, k, _ = qkv(3, 2, 11, 13)
    mask = None if kind is None else MASKS[kind](3, 2, 11, 13)
    found = ops.received(q, k, scale=0.5, mask=mask)
    torch.testing.assert_close(found, reference.received(q, k, scale=0.5, mask=mask), rtol=1e-5, atol=1e-6)
    rows = reference.safe_softmax(reference.masked(q @ k.mT / 2, mask))
    torch.testing.assert_close(found, ops.received_of(3 * rows), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.sum(-1), rows.sum(-1).mean((1, 2)))  # 1, less what hidden queries do not give


def test_output_is_that_of_scaled_dot_product_attention() -> None:
    q, k, v = qkv(2, 3, 17, 17)
    log_mass, mask = log_masses(2, 17), torch.rand(17, 17) < 0.8
    expected = F.scaled_dot_product_attention(q, k, v, log_mass.masked_fill(~mask, -torch.inf))
    found, _ = ops.attend_and_sharpness(q, k, v, mask=mask, log_mass=log_mass)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ops.attend(q, k, v, mask=mask, log_mass=log_mass), expected, rtol=1e-5, atol=1e-5)


def test_masses_count_as_so_many_equal_keys() -> None:
    q, k, v = qkv(1, 2, 7, 5)
    times = torch.tensor([1, 4, 2, 1, 3])
    expected = ops.attend(q, k.repeat_interleave(times, 2), v.repeat_interleave(times, 2))
    torch.testing.assert_close(ops.attend(q, k, v, log_mass=times.log()), expected, rtol=1e-5, atol=1e-5)
    found, _ = ops.attend_and_sharpness(q, k, v, log_mass=times.log())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_sample_without_mass_gives_zeros() -> None:
    log_mass = torch.full((2, 1, 1, 5), -torch.inf)
    log_mass[1] = 0
    for found, expected in both(*qkv(2, 2, 7, 5), log_mass=log_mass):
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_attend_keeps_a_causal_mask_beside_masses() -> None:
    q, k, v = qkv(1, 2, 6, 6)
    plain = ops.attend(q, k, v, is_causal=True)
    weighed = ops.attend(q, k, v, is_causal=True, log_mass=torch.zeros(6))
    torch.testing.assert_close(weighed, plain, rtol=1e-5, atol=1e-5)
    assert (plain[:, :, 0] == v[:, :, 0]).all()


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=str)
def test_any_leading_dimensions(lead: tuple[int, ...]) -> None:
    q, k, v = (torch.randn(*lead, 2, n, 4) for n in (9, 7, 7))
    mask, log_mass = torch.rand(*lead, 2, 9, 7) < 0.8, torch.rand(*lead, 1, 1, 7)
    for found, expected in both(q, k, v, mask=mask, log_mass=log_mass):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_heads_and_samples_broadcast() -> None:
    """One head of keys for all queries (multi-query attention spelled out), one sample of values for all."""
    q, k, v = torch.randn(2, 3, 9, 4), torch.randn(2, 1, 7, 4), torch.randn(1, 7, 5)
    for found, expected in both(q, k, v, log_mass=log_masses(2, 7)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_grouped_queries_share_keys() -> None:
    q, (k, v) = torch.randn(2, 6, 9, 4), torch.randn(2, 2, 2, 7, 4)
    found, sharp = ops.attend_and_sharpness(q, k, v, enable_gqa=True)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, enable_gqa=True), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ops.sharpness(q, k, enable_gqa=True), sharp, rtol=0, atol=0)
    assert torch.equal(ops.received(q, k, enable_gqa=True), ops.received(q, k.repeat_interleave(3, 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_only_at_the_end(dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 2, 9, 9, dtype=dtype)
    exact, exact_sharpness = reference.attention_with_sharpness(q.float(), k.float(), v.float(), scale=0.5)
    found, sharp = ops.attend_and_sharpness(q, k, v, scale=0.5)
    assert (found.dtype, sharp.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(sharp, exact_sharpness, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, exact.to(dtype))


def test_autocast_does_not_reach_the_scores() -> None:
    q, k, v = qkv(2, 2, 9, 9)
    _, expected = ops.attend_and_sharpness(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        _, sharp = ops.attend_and_sharpness(q, k, v)
    torch.testing.assert_close(sharp, expected, rtol=0, atol=0)


def test_sharpness_of_a_row_that_attends_to_one_key_is_zero_and_has_a_finite_gradient() -> None:
    q = torch.tensor([[[[1000.0]]]], requires_grad=True)
    k = torch.tensor([1.0, -1.0, -1.0]).view(1, 1, 3, 1)
    sharp = ops.sharpness(q, k, scale=1.0)
    (gradient,) = torch.autograd.grad(sharp.sum(), q)
    assert sharp.item() == 0
    assert gradient.item() == 0


@pytest.mark.parametrize("kind", [None, *MASKS])
def test_gradients_are_those_of_the_specification(kind: str | None) -> None:
    q, k, v = qkv(3, 2, 11, 13, dtype=torch.float64)
    log_mass = log_masses(3, 13, dtype=torch.float64)
    mask = None if kind is None else MASKS[kind](3, 2, 11, 13)
    if mask is not None and mask.is_floating_point():
        mask = mask.double()
    inputs = [t.requires_grad_() for t in (q, k, v, log_mass, mask) if t is not None and t.is_floating_point()]
    weights = torch.randn(3, 2, 11, 5, dtype=torch.float64), torch.randn(3, 11, dtype=torch.float64)

    def gradients(results: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(results, inputs, weights)

    found = gradients(ops.attend_and_sharpness(q, k, v, scale=0.5, mask=mask, log_mass=log_mass))
    expected = gradients(reference.attention_with_sharpness(q, k, v, scale=0.5, mask=mask, log_mass=log_mass))
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_is_registered_soundly(biased: bool, dtype: torch.dtype) -> None:
    q, k, v = (t.requires_grad_() for t in qkv(2, 3, 7, 9, dtype=dtype))
    mask = torch.randn(1, 3, 7, 9).requires_grad_() if biased else None
    log_mass = log_masses(2, 9).requires_grad_() if biased else None
    torch.library.opcheck(torch.ops.tldr.attend_and_sharpness, (q, k, v, 0.5, mask, log_mass))
    grads = torch.randn(2, 3, 7, 9)[..., :5].to(dtype), torch.randn(2, 7)
    arguments = *grads, *(t.detach() for t in (q, k, v)), 0.5, mask, log_mass, biased, biased
    torch.library.opcheck(
        torch.ops.tldr.attend_and_sharpness_backward, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("provider", ["native"], indirect=True)
def test_fused_attention_serves_gradients_and_the_provider_what_needs_none(provider: str) -> None:
    q, k, v = qkv(2, 3, 7, 9)
    log_mass = log_masses(2, 9)
    def operators() -> set[str]:
        graph = make_fx(lambda *t: ops.attend(*t[:3], log_mass=t[3]), pre_dispatch=True)(q, k, v, log_mass).graph
        return {str(node.target) for node in graph.nodes if node.op == "call_function"}

    served = ops.attend(q, k, v, log_mass=log_mass)
    assert "tldr.attend.default" in operators()
    q.requires_grad_()
    assert "tldr.attend.default" not in operators()
    torch.testing.assert_close(ops.attend(q, k, v, log_mass=log_mass), served, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert "tldr.attend.default" in operators()


def test_attention_alone_has_gradients_where_a_graph_holds_it() -> None:
    """As a program does that was exported without gradients, and is trained."""
    inputs = [t.requires_grad_() for t in (*qkv(2, 3, 7, 9), log_masses(2, 9))]
    q, k, v, log_mass = inputs
    torch.library.opcheck(torch.ops.tldr.attend, (q, k, v, 0.5, None, log_mass))
    found = torch.autograd.grad(torch.ops.tldr.attend(q, k, v, 0.5, None, log_mass).square().sum(), inputs)
    expected = torch.autograd.grad(ops.attend(q, k, v, scale=0.5, log_mass=log_mass).square().sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_forward_mode_is_refused_instead_of_dropped() -> None:
    q, k, v = qkv(1, 2, 7, 9)
    for call in (ops.attend_and_sharpness, ops.attend):
        with pytest.raises(NotImplementedError, match=r"no forward-mode derivative \(torch.func.jvp\)"):
            torch.func.jvp(lambda x, call=call: call(x, k, v, log_mass=log_masses(1, 9)), (q,), (q,))


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = qkv(1, 2, 7, 9)
    with pytest.raises(RuntimeError):
        ops.attend(q, k[..., :3], v, log_mass=log_masses(1, 9))


def test_compiles_whole_with_gradients_and_a_dynamic_batch() -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor, log_mass: Tensor) -> Tensor:
        out, sharp = ops.attend_and_sharpness(q, k, v, log_mass=log_mass)
        return (out * out).sum() + (ops.saliency(sharp) * v.sum((1, 3))).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 5):
        inputs = [t.requires_grad_() for t in (*qkv(batch, 2, 9, 9), log_masses(batch, 9))]
        expected, found = (torch.autograd.grad(f(*inputs), inputs) for f in (loss, compiled))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_stays_one_node_in_a_graph_and_counts_its_products() -> None:
    q, k, v = qkv(2, 3, 7, 9)
    graph = make_fx(lambda *t: ops.attend_and_sharpness(*t), tracing_mode="symbolic")(q, k, v).graph
    assert [node for node in graph.nodes if node.target is torch.ops.tldr.attend_and_sharpness.default]
    assert not [node for node in graph.nodes if "softmax" in str(node.target)]
    with FlopCounterMode(display=False) as counted:
        ops.attend_and_sharpness(q, k, v)
    with FlopCounterMode(display=False) as expected:
        reference.attention_with_sharpness(q, k, v, scale=0.5)
    assert counted.get_total_flops() == expected.get_total_flops() == 2 * 2 * 3 * 7 * 9 * (4 + 5)
    with FlopCounterMode(display=False) as counted:
        ops.received(q.requires_grad_(), k).sum().backward()
    assert counted.get_total_flops() == (1 + 3) * 2 * 2 * 3 * 7 * 9 * 4


def test_no_matrix_of_all_pairs_exists(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocked.BLOCK_BYTES, "cpu", 64 * 2048 * 4)
    q, k, v = (t.requires_grad_() for t in qkv(1, 2, 2048, 2048))

    def largest_allocation(function: Callable[..., tuple[Tensor, ...]], *given: Tensor) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            torch.autograd.grad(sum(each.square().sum() for each in function(*given, scale=0.5)), given)
        return max(event.self_cpu_memory_usage for event in watched.events())

    pairs = 2048 * 2048 * 4
    assert largest_allocation(ops.attend_and_sharpness, q, k, v) < pairs / 4
    if provider == "blocked":  # the only one that it has
        assert largest_allocation(ops.received, q, k) < pairs / 4
    assert largest_allocation(reference.attention_with_sharpness, q, k, v) >= pairs
