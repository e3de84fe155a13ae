"""Who computes an operator, how one can tell, and that all of them give what its fake kernel promises."""

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tests.ops.promises import ARGUMENTS, CASES, DTYPES, attention, faked, gives, ordered, promise, skeleton
from tldr_compile import ops
from tldr_compile.ops import blocked, reference, tiled
from tldr_compile.ops.providers import everything

SERVE = {
    "attend": ["native", "fused"],
    "attend_and_sharpness": ["native", "blocked"],
    "received": ["blocked"],
    "match": ["blocked"],
    "energy": ["blocked"],
    "affinity": ["blocked"],
}
"""Those on a CPU; the last also in float64."""


# --- what the fake kernel promises ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "case"), CASES)
def test_every_provider_gives_what_the_fake_kernel_promises(name: str, case: str, dtype: torch.dtype) -> None:
    promised, arguments = promise(name, case, dtype), ARGUMENTS[name][case](dtype)
    served = [each for each in ops.PROVIDERS[name].order if each.serves(*arguments) is None]
    assert [each.name for each in served] == (SERVE[name] if dtype != torch.float64 else SERVE[name][-1:])
    for provider in served:
        assert gives(name, provider, arguments) == [promised] * 2, provider.name
        if provider.visible:
            assert faked(provider.forward, arguments) == promised, provider.name


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_of_an_empty_batch_there_is_nothing(name: str) -> None:
    """Computed, and spelled out in torch's own operators: as many rows as clips, which is none."""
    full = next(iter(ARGUMENTS[name].values()))(torch.float32)
    empty = [each[:0] if isinstance(each, Tensor) and len(each) == 2 else each for each in full]
    for compute in (ops.PROVIDERS[name].run, ops.PROVIDERS[name].decomposition):
        shapes = [[t.shape for t in tensors(compute(*given))] for given in (empty, full)]
        assert [(0, *shape[1:]) for shape in shapes[1]] == shapes[0]


def tensors(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


@pytest.mark.parametrize("biased", [False, True])
def test_the_backward_kernel_gives_what_its_fake_kernel_promises(biased: bool) -> None:
    q, k, v, scale, mask, log_mass = attention(torch.float32)
    mask = mask.float()
    gradients = torch.randn(2, 3, 7, 5), torch.randn(2, 7)
    arguments = *gradients, q, k, v, scale, mask, log_mass, biased, biased
    operator = torch.ops.tldr.attend_and_sharpness_backward
    real = operator(*arguments)
    assert skeleton(real) == faked(operator, arguments)
    assert skeleton(real)[:3] == [(t.shape, t.dtype, torch.empty(t.shape).stride()) for t in (q, k, v)]


def test_the_backward_kernel_of_received_gives_what_its_fake_kernel_promises() -> None:
    q, k, _, scale, mask, _ = attention(torch.float32)
    for given in ((None, False), (mask.float(), True)):
        arguments = torch.randn(2, 9), q, k, scale, *given
        operator = torch.ops.tldr.received_backward
        assert skeleton(operator(*arguments)) == faked(operator, arguments)


def test_matching_is_registered_soundly() -> None:
    torch.library.opcheck(torch.ops.tldr.match, (torch.randn(2, 7, 4),), test_utils=("test_schema", "test_faketensor"))


# --- who is chosen, and that one can see it ---------------------------------------------------------------------------


def test_the_choice_is_logged_once_for_arguments_of_one_kind(caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 5)
    for providers in ops.PROVIDERS.values():
        providers._told.clear()
    with caplog.at_level(logging.DEBUG, "tldr_compile"):
        for _ in range(2):
            ops.attend_and_sharpness(q, k, v)
            ops.attend_and_sharpness(q.double(), k.double(), v.double())
            ops.match(q[:, 0])
    kinds = "q {0} [2, 3, 7, 4] cpu, k {0} [2, 3, 9, 4] cpu, v {0} [2, 3, 9, 5] cpu"
    assert caplog.messages == [
        f"attend_and_sharpness({kinds.format('float32')}): native; not tiled: it runs on NVIDIA GPUs",
        f"attend_and_sharpness({kinds.format('float64')}): blocked; not tiled: it runs on NVIDIA GPUs; "
        "not native: it computes in float32, which would round its inputs",
        "match(metric float32 [2, 7, 4] cpu): blocked; not tiled: it runs on NVIDIA GPUs",
    ]


def test_nothing_is_said_or_put_into_words_unless_somebody_listens(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops.Providers, "_call", None)
    with caplog.at_level(logging.INFO, "tldr_compile"):
        ops.match(torch.randn(2, 11, 4))
    assert not caplog.messages


def test_what_native_and_tiled_refuse_is_said_in_words() -> None:
    q, k, v, scale, mask, log_mass = attention(torch.float32)
    native = ops.PROVIDERS["attend"].order[1].serves
    reasons = [
        native(q.to("meta"), k, v, scale, mask, log_mass),
        native(q, k[:1], v, scale, mask, log_mass),
        native(q, k, v.half(), scale, mask, log_mass),
        native(q, k, v, scale, mask, torch.rand(7, 9)),
        native(q, k, v, scale, mask, log_mass),
        tiled.serves(q, k, v, scale, mask, log_mass),
        tiled.serves_match(q[:, 0]),
    ]
    assert reasons == [
        "it runs on CPUs",
        "its queries, keys and values do not fit each other",
        "its queries, keys and values have several dtypes",
        "its masses differ by query",
        None,
        "it runs on NVIDIA GPUs",
        "it runs on NVIDIA GPUs",
    ]


# --- a provider of one's own ------------------------------------------------------------------------------------------


def in_front(name: str, provider: ops.Provider[..., Any]) -> Any:
    return ordered(name, provider, *ops.PROVIDERS[name].order)


def test_a_hidden_provider_in_front_takes_the_place_of_the_others() -> None:
    """It gets tensors that are there, may lay its results as it likes, and has the operator's gradients."""
    q, k, v = (torch.randn(2, 3, n, 4, requires_grad=True) for n in (7, 9, 9))
    seen: list[tuple[Any, ...]] = []

    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        seen.append(arguments)
        out, sharpness = blocked.forward(*arguments)
        return out.contiguous() + 1, sharpness

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attend_and_sharpness(q, k, v)[0].square().sum()

    expected = ops.attend_and_sharpness(q, k, v)[0] + 1
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    with in_front("attend_and_sharpness", ops.Provider("mine", everything, forward)):
        out, _ = ops.attend_and_sharpness(q, k, v)
        found = torch.autograd.grad(loss(q, k, v), (q, k, v))
        compiled = torch.compile(loss, backend="inductor", fullgraph=True)
        again = torch.autograd.grad(compiled(q, k, v), (q, k, v))
        graph = make_fx(loss)(*(t.detach() for t in (q, k, v))).graph
    assert out.stride() == expected.stride()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((found, again), (wanted, wanted), rtol=1e-4, atol=1e-5)
    assert graph.find_nodes(op="call_function", target=torch.ops.tldr.attend_and_sharpness.default)
    assert all(type(t) is Tensor for arguments in seen for t in arguments[:3])


def test_a_visible_provider_in_front_is_part_of_the_graph() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, log_mass: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, log_mass, scale=scale).sin()

    q, k, v, _, _, log_mass = attention(torch.float32)
    with in_front("attend", ops.Provider("mine", everything, forward, visible=True)):
        graph = make_fx(lambda q, k, v, m: ops.attend(q, k, v, log_mass=m))(q, k, v, log_mass).graph
    assert graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
    assert not graph.find_nodes(op="call_function", target=torch.ops.tldr.attend.default)


def test_a_provider_that_does_not_serve_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    def serves(metric: Tensor) -> str | None:
        return None if metric.shape[1] == 6 else f"its length {metric.shape[1]} is not 6"

    metric = torch.randn(2, 10, 4)
    mine = ops.Provider("mine", serves, lambda metric: reference.match(-metric.flip(1)))
    with in_front("match", mine), caplog.at_level(logging.DEBUG, "tldr_compile"):
        found, other = ops.match(metric), ops.match(metric[:, :6])
    torch.testing.assert_close(found, reference.match(metric))
    torch.testing.assert_close(other, reference.match(metric[:, :6].flip(1)))
    first, second = caplog.messages
    assert first == (
        "match(metric float32 [2, 10, 4] cpu): blocked; not mine: its length 10 is not 6; not tiled: it runs on "
        "NVIDIA GPUs"
    )
    assert second == "match(metric float32 [2, 6, 4] cpu): mine"


def test_results_that_nobody_was_promised_are_refused() -> None:
    def forward(metric: Tensor) -> tuple[Tensor, Tensor]:
        similarity, destination = reference.match(metric)
        return similarity, destination.int()

    with (
        in_front("match", ops.Provider("mine", everything, forward)),
        pytest.raises(RuntimeError, match=r"the provider 'mine' of match\(metric .*\) gives int32 \[2, 3\], not int64"),
    ):
        ops.match(torch.randn(2, 6, 4))


def test_where_nobody_serves_everybody_says_why() -> None:
    with (
        ordered("match", ops.Provider("mine", lambda metric: "it is closed", reference.match)),
        pytest.raises(NotImplementedError, match=r"no provider of match\(.* cpu\) serves it; mine: it is closed"),
    ):
        ops.match(torch.randn(2, 6, 4))
