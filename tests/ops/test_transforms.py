"""Every registered operator under `torch.func`, and gradients of gradients, against loops and the specification."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from tldr_compile import ops
from tldr_compile.ops import reference, transforms

B, H, N, M, C = 2, 2, 3, 4, 2
MASKS: dict[str, Callable[[], Tensor | None]] = {
    "no mask": lambda: None,
    "bool of keys": lambda: torch.rand(B, 1, 1, M) < 0.7,
    "additive for all samples": lambda: normal(1, H, N, M),
    "all of one row hidden": lambda: (torch.arange(N) != 1)[None, None, :, None].expand(1, 1, N, M),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def qkv(*lead: int) -> list[Tensor]:
    return [normal(*lead, H, N, C), normal(*lead, H, M, C), normal(*lead, H, M, C)]


Call = Callable[..., tuple[Tensor, ...]]
CALLS: dict[str, Call] = {
    "attend": lambda q, k, v, mask, mass: (ops.attend(q, k, v, scale=0.5, mask=mask, log_mass=mass),),
    "attend, registered": lambda q, k, v, mask, mass: (torch.ops.tldr.attend(q, k, v, 0.5, mask, mass),),
    "attend_and_sharpness": lambda q, k, v, mask, mass: ops.attend_and_sharpness(
        q, k, v, scale=0.5, mask=mask, log_mass=mass
    ),
}


def specified(name: str) -> Call:
    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, mass: Tensor | None) -> tuple[Tensor, ...]:
        both = reference.attention_with_sharpness(q, k, v, scale=0.5, mask=mask, log_mass=mass)
        return both if name == "attend_and_sharpness" else both[:1]

    return call


def of_floats(call: Call, arguments: list[Tensor | None]) -> tuple[Call, list[Tensor]]:
    """The call as a function of its floats alone, and those."""
    places = [at for at, each in enumerate(arguments) if each is not None and each.is_floating_point()]

    def function(*floats: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(places, floats, strict=True))
        return call(*(given.get(at, each) for at, each in enumerate(arguments)))

    return function, [each for each in arguments if each is not None and each.is_floating_point()]


# --- gradients of gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(
    ("name", "with_mass"), [*((name, True) for name in CALLS), ("attend", False), ("attend_and_sharpness", False)]
)
def test_gradients_have_gradients(name: str, with_mass: bool, kind: str) -> None:
    function, floats = of_floats(CALLS[name], [*qkv(B), MASKS[kind](), normal(B, 1, 1, M) if with_mass else None])
    inputs = [each.requires_grad_() for each in floats]
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("name", CALLS)
def test_a_penalty_is_that_of_the_specification(name: str) -> None:
    found = []
    arguments: list[Tensor | None] = [*qkv(B), MASKS["additive for all samples"](), normal(B, 1, 1, M)]
    for call in (CALLS[name], specified(name)):
        function, floats = of_floats(call, arguments)
        inputs = [each.clone().requires_grad_() for each in floats]
        first = torch.autograd.grad([each.sin().sum() for each in function(*inputs)], inputs, create_graph=True)
        found.append(torch.autograd.grad(torch.stack([each.square().sum() for each in first]).sum(), inputs))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_gradient_that_nobody_differentiates_is_fused_attentions() -> None:
    """With a graph behind it it is done again, in the same way: nowhere is there a matrix of all pairs."""
    q, k, v = (each.float().requires_grad_() for each in qkv(B))

    def operators(create_graph: bool) -> set[str]:
        out = ops.attend(q, k, v, log_mass=torch.zeros(B, 1, 1, M)).sum()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as watched:
            torch.autograd.grad(out, (q, k, v), create_graph=create_graph)
        return {event.key for event in watched.key_averages()}

    forward, backward = "aten::_scaled_dot_product_flash_attention_for_cpu", "_backward"
    once, again = operators(False), operators(True)
    assert forward + backward in once & again
    assert forward in again - once
    assert not [name for name in once | again if "softmax" in name]


# --- transforms -------------------------------------------------------------------------------------------------------


def loss(call: Call) -> Callable[..., Tensor]:
    return lambda *inputs: torch.stack([each.sin().sum() for each in call(*inputs)]).sum()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", CALLS)
def test_transforms_give_what_loops_of_autograd_give(name: str, kind: str) -> None:
    """Of three problems that share their masses, and whose samples share the mask."""
    arguments: list[Tensor | None] = [*qkv(3, B), MASKS[kind](), normal(B, 1, 1, M)]
    function, floats = of_floats(lambda *some: (loss(CALLS[name])(*some),), arguments)
    places = tuple(range(len(floats)))
    dims = (0, 0, 0, *(None,) * (len(floats) - 3))

    def scalar(*some: Tensor) -> Tensor:
        return function(*some)[0]

    loops = []
    for each in range(3):
        inputs = [t[each] if dim == 0 else t for t, dim in zip(floats, dims, strict=True)]
        inputs = [t.clone().requires_grad_() for t in inputs]
        loops.append(torch.autograd.grad(scalar(*inputs), inputs))
        for one, other in zip(grad(scalar, argnums=places)(*(t.detach() for t in inputs)), loops[-1], strict=True):
            torch.testing.assert_close(one, other)
    expected = [torch.stack(some) for some in zip(*loops, strict=True)]

    each_apart = vmap(grad(scalar, argnums=places), in_dims=dims)(*floats)
    one_sum = grad(lambda *some: vmap(scalar, in_dims=dims)(*some).sum(), argnums=places)(*floats)
    for apart, summed, wanted, dim in zip(each_apart, one_sum, expected, dims, strict=True):
        torch.testing.assert_close(apart, wanted)
        torch.testing.assert_close(summed, wanted if dim == 0 else wanted.sum(0))


@pytest.mark.parametrize("name", CALLS)
def test_jacobians_are_those_of_the_specification(name: str) -> None:
    arguments: list[Tensor | None] = [*qkv(B), MASKS["additive for all samples"](), normal(B, 1, 1, M)]
    found, expected = (of_floats(call, arguments) for call in (CALLS[name], specified(name)))
    places = tuple(range(5))
    for transform in (jacrev, lambda f, argnums: jacrev(grad(lambda *x: f(*x)[0].sin().sum(), argnums), argnums)):
        one, other = (transform(function, argnums=places)(*floats) for function, floats in (found, expected))
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CALLS)
def test_a_compiler_takes_the_transforms(name: str) -> None:
    inputs = [*qkv(3, B), normal(3, 1, H, N, M), normal(3, B, 1, 1, M)]
    gradient = vmap(grad(loss(CALLS[name]), argnums=(0, 1, 2, 3, 4)))
    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), gradient(*inputs))


@pytest.mark.parametrize("kind", MASKS)
def test_what_is_received_is_differentiated_as_the_specification_is(kind: str) -> None:
    """Twice, of several at once, of one mask for all samples, and through a compiler."""
    q, k, mask = normal(3, B, H, N, C), normal(3, B, H, M, C), MASKS[kind]()
    floats = [mask] if mask is not None and mask.is_floating_point() else []

    def penalty(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def of(*given: Tensor) -> Tensor:
            return operator(*given[:2], scale=0.5, mask=given[2] if floats else mask).sin().sum()

        return lambda *given: torch.stack([each.square().sum() for each in grad(of, (0, 1))(*given)]).sum()

    places = tuple(range(2 + len(floats)))
    batched = [
        vmap(grad(penalty(operator), places), in_dims=(0, 0, *(None for _ in floats)))
        for operator in (ops.received, reference.received)
    ]
    torch.testing.assert_close(batched[0](q, k, *floats), batched[1](q, k, *floats), rtol=1e-10, atol=1e-10)
    inputs = [each.clone().requires_grad_() for each in (q[0], k[0], *floats)]
    assert torch.autograd.gradcheck(
        lambda *given: ops.received(*given[:2], scale=0.5, mask=given[2] if floats else mask), inputs
    )
    if floats:
        compiled = torch.compile(batched[0], backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(q, k, *floats), batched[1](q, k, *floats))


@pytest.mark.parametrize("asked", [False, True])
def test_gradients_of_a_bias_for_all_samples_are_one_for_all(asked: bool) -> None:
    """The operator's own promise: autograd would sum what came too wide."""
    operator = torch.ops.tldr.attend_and_sharpness_backward
    given = normal(3, B, H, N, C), normal(B, N), *qkv(B), 0.5, normal(1, H, N, M), normal(B, 1, 1, M), asked, asked
    found = vmap(operator, in_dims=(0, *(None,) * 9))(*given)
    expected = [torch.stack(some) for some in zip(*(operator(one, *given[1:]) for one in given[0]), strict=True)]
    torch.testing.assert_close(list(found), expected)


@pytest.mark.parametrize("in_dim", [0, 2])
def test_matching_many_at_once(in_dim: int) -> None:
    metrics = torch.randn(4, B, 9, 5)
    for call in (ops.match, torch.ops.tldr.match):
        found = vmap(call, in_dims=in_dim)(metrics.movedim(0, in_dim))
        expected = [torch.stack(some) for some in zip(*map(call, metrics), strict=True)]
        torch.testing.assert_close(list(found), expected)
    sources, destinations = metrics[:, :, ::2], metrics[0, :, 1::2]
    similarity, place = vmap(torch.ops.tldr.best, in_dims=(0, None))(sources, destinations)
    products = sources @ destinations.mT
    torch.testing.assert_close(similarity, products.amax(-1))
    assert torch.equal(place, products.argmax(-1))


def test_every_registered_operator_has_a_rule() -> None:
    """Those that have gradients in `TRANSFORMED`; the others as torch has it."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("tldr::")}
    assert len(names) >= 8
    for name in names:
        assert has_kernel(name, transforms.TRANSFORMED) or has_kernel(name, "FuncTorchBatched"), name


def test_forward_mode_over_backward_mode_is_refused_in_words() -> None:
    q, k, v = qkv(B)
    for call in (ops.attend_and_sharpness, ops.sharpness, ops.received):
        given = (k, v) if call is ops.attend_and_sharpness else (k,)
        with pytest.raises(NotImplementedError, match=r"which jacfwd and hessian take: use the backward one"):
            torch.func.hessian(lambda x, c=call, g=given: torch.stack([t.sum() for t in c(x, *g)]).sum())(q)
