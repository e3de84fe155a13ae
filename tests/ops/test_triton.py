"""The Triton provider against the specification: on a GPU where there is one, otherwise in Triton's interpreter."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch.compiler import assume_constant_result
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.promises import ARGUMENTS, CASES, faked, gives, promise
from tldr_compile import ops
from tldr_compile.ops import blocked, fused, reference, tiled, triton_kernels, triton_matching, triton_parts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

MASKS: dict[str, Callable[[int, int, int, int], Tensor]] = {
    "bool of keys": lambda b, h, q, k: torch.rand(b, 1, 1, k) < 0.7,
    "bool of pairs": lambda b, h, q, k: torch.rand(1, 1, q, k) < 0.5,
    "additive per head": lambda b, h, q, k: torch.randn(1, h, q, k),
    "additive of keys and queries, transposed": lambda b, h, q, k: torch.randn(b, 1, k, q).mT,
    "additive in half precision": lambda b, h, q, k: torch.randn(b, h, q, k).bfloat16(),
    "additive with -inf": lambda b, h, q, k: torch.where(torch.rand(b, h, q, k) < 0.5, -torch.inf, 1.0),
    "all of one row hidden": lambda b, h, q, k: (torch.arange(q) != q // 2)[:, None].expand(1, 1, q, k),
    "everything hidden": lambda b, h, q, k: torch.full((1, 1, 1, k), -torch.inf),
}
TILED = [(name, case) for name, case in CASES if any(each.name == "tiled" for each in ops.PROVIDERS[name].order)]
# NumPy, in which kernels are interpreted, warns of infinities and NaN where a chip says nothing.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    """Tiles so small that the tests' sizes take many of them; one of each, so that nothing is timed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_kernels, "SPAN", 32)
        patch.setattr(triton_matching, "SPAN", 32)
        for name in ("attend_tile", "share_tile", "match_tile"):
            patch.setattr(triton_parts, name, lambda *sizes: triton_parts.Tile(16, 16, 1, 2))
        if DEVICE == "cpu":
            patch.setattr("triton.runtime.interpreter.InterpreterBuilder.create_dot", interpreted_dot)
        yield


def interpreted_dot(self: Any, a: Any, b: Any, total: Any, *precision: Any) -> Any:
    """What the interpreter's own does, but for bfloat16, whose bit patterns it would multiply as integers."""

    def wide(operand: Any) -> Tensor:
        data = torch.from_numpy(operand.data)
        return (data.view(torch.bfloat16) if operand.dtype == tl.bfloat16 else data).float()

    return type(total)((wide(a) @ wide(b)).numpy() + total.data, total.dtype.scalar)


def qkv(b: int, h: int, n: int, m: int, d: int = 4, c: int = 5, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(b, h, n, d, **options), torch.randn(b, h, m, d, **options), torch.randn(b, h, m, c, **options)


def log_masses(b: int, m: int) -> Tensor:
    return (torch.rand(b, 1, 1, m) * 5 + 1).log()


def run(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, log_mass: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    inputs = [None if t is None else t.to(DEVICE) for t in (q, k, v, mask, log_mass)]
    assert tiled.misfit(inputs[0], inputs[1], inputs[2], 0.5, *inputs[3:]) is None
    out, sharpness = tiled.forward(inputs[0], inputs[1], inputs[2], 0.5, *inputs[3:])
    return out.cpu(), sharpness.cpu()


def check(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, log_mass: Tensor | None = None, **tolerance: Any
) -> None:
    expected = reference.attention_with_sharpness(q, k, v, scale=0.5, mask=mask, log_mass=log_mass)
    for found, wanted in zip(run(q, k, v, mask, log_mass), expected, strict=True):
        torch.testing.assert_close(found, wanted, **{"rtol": 1e-5, "atol": 1e-5, **tolerance})


sizes = st.integers(1, 70)
channels = st.sampled_from([4, 7, 16, 20])


@settings(max_examples=25)
@given(b=st.integers(1, 2), h=st.integers(1, 3), n=sizes, m=sizes, d=channels, c=channels, with_mass=st.booleans())
def test_equals_the_specification_for_any_size(b: int, h: int, n: int, m: int, d: int, c: int, with_mass: bool) -> None:
    check(*qkv(b, h, n, m, d, c), log_mass=log_masses(b, m) if with_mass else None)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("with_mass", [False, True])
def test_masks_enter_both_results_and_masses_only_the_output(kind: str, with_mass: bool) -> None:
    q, k, v = qkv(2, 2, 21, 37)
    mask, log_mass = MASKS[kind](2, 2, 21, 37), log_masses(2, 37) if with_mass else None
    check(q, k, v, mask, log_mass)
    out, sharpness = run(q, k, v, mask, log_mass)
    assert out.isfinite().all()
    assert run(q, k, v[..., :0], mask)[1].equal(sharpness)


def test_a_row_that_sees_no_key_gives_zeros() -> None:
    mask = torch.ones(1, 1, 21, 37, dtype=torch.bool)
    mask[:, :, 20] = False
    out, sharpness = run(*qkv(1, 2, 21, 37), mask, log_masses(1, 37))
    assert (out[:, :, 20] == 0).all()
    assert sharpness[:, 20].item() == 0
    assert (sharpness[:, :20] < 0).all()


def test_a_row_under_the_lowest_finite_number_sees_all_keys_alike() -> None:
    q, k, v = qkv(2, 2, 21, 37)
    log_mass = log_masses(2, 37)
    out, sharpness = run(q, k, v, torch.full((1, 1, 21, 1), torch.finfo(torch.float32).min), log_mass)
    alike = log_mass.softmax(-1) @ v
    torch.testing.assert_close(out, alike.expand_as(out), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sharpness, torch.tensor(1 / 37).log().expand(2, 21), rtol=1e-5, atol=1e-5)


def test_a_sample_without_mass_gives_zeros() -> None:
    log_mass = torch.full((2, 1, 1, 37), -torch.inf)
    log_mass[1] = 0
    check(*qkv(2, 2, 21, 37), log_mass=log_mass)


def test_masses_per_head_that_no_float_holds() -> None:
    q, k, v = qkv(2, 2, 21, 37)
    log_mass = torch.linspace(300, 305, 2 * 37).view(1, 2, 1, 37)
    exact = reference.attention_with_sharpness(q.double(), k.double(), v.double(), scale=0.5, log_mass=log_mass)
    torch.testing.assert_close(run(q, k, v, log_mass=log_mass)[0], exact[0].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 2.0**-12, 0.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_masses_alone_at_any_scale(scale: float, dtype: torch.dtype) -> None:
    """Keys without mass, one sample without any, and scales at which masses in units of scores would be infinite."""
    q, k, v = qkv(2, 2, 21, 37, dtype=dtype)
    log_mass = log_masses(2, 37)
    log_mass[..., ::3] = -torch.inf
    log_mass[1] = -torch.inf
    inputs = [each.to(DEVICE) for each in (q, k, v, log_mass)]
    expected, sharpness = reference.attention_with_sharpness(q, k, v, scale=scale, log_mass=log_mass)
    close = {"rtol": 0, "atol": 4e-3 if dtype == torch.float16 else 1e-5}
    torch.testing.assert_close(tiled.attend(*inputs[:3], scale, None, inputs[3]).cpu(), expected, **close)
    both = tiled.forward(*inputs[:3], scale, None, inputs[3])
    torch.testing.assert_close(both[0].cpu(), expected, **close)
    torch.testing.assert_close(both[1].cpu(), sharpness, rtol=1e-5, atol=1e-5)


def test_a_row_that_attends_to_one_key_has_sharpness_zero() -> None:
    k = torch.tensor([1.0, -1.0, -1.0]).view(1, 1, 3, 1)
    _, sharpness = run(torch.tensor([[[[1000.0]]]]), k, k)
    assert sharpness.item() == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_stays_in_its_row(value: float) -> None:
    q, k, v = qkv(1, 2, 21, 37)
    bias = torch.zeros(1, 1, 21, 37)
    bias[..., 3, 20] = value
    out, sharpness = run(q, k, v, bias)
    wrong = torch.arange(21) == 3
    assert out.isnan().equal(wrong[:, None].expand(1, 2, 21, 5))
    assert sharpness.isnan().equal(wrong[None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_single(dtype: torch.dtype) -> None:
    """Of the half precision numbers only attention times values is rounded before it is summed up."""
    q, k, v = qkv(2, 2, 21, 37, 20, 16, dtype=dtype)
    log_mass = log_masses(2, 37).to(dtype)
    exact = reference.attention_with_sharpness(q.float(), k.float(), v.float(), scale=0.5, log_mass=log_mass)
    out, sharpness = run(q, k, v, log_mass=log_mass)
    assert (out.dtype, sharpness.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(sharpness, exact[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.float(), exact[0], rtol=0, atol=torch.finfo(dtype).eps * 3)


def test_reads_the_parts_of_a_joint_projection_where_they_lie() -> None:
    joint = torch.randn(2, 21, 3, 2, 16)
    q, k, v = joint.permute(2, 0, 3, 1, 4)
    check(q, k, v.flip(-1), log_mass=log_masses(2, 42)[..., ::2])
    check(q.expand(2, 2, 21, 16), k[:1].expand(2, 2, 21, 16), v)


@pytest.mark.parametrize(("allowed", "exact"), [("none", True), ("ieee", True), ("tf32", False)])
def test_float32_is_rounded_before_products_only_where_torch_may(allowed: str, exact: bool) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = allowed
    try:
        assert triton_parts.common(torch.zeros(1, 1), triton_parts.Tile(16, 16, 1, 2))["EXACT"] == exact
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@triton.jit
def write_places(to, zero, row_stride, column_stride):  # type: ignore[no-untyped-def]
    row, column = tl.arange(0, 4), tl.arange(0, 4)
    tl.store(
        to + row[:, None] * 4 + column[None, :], triton_parts._places(zero, row, row_stride, column, column_stride)
    )


def test_offsets_beyond_32_bits() -> None:
    found = torch.zeros(4, 4, dtype=torch.int64, device=DEVICE)
    write_places[(1,)](found, 0, 2**31 - 1, 2**30)
    place = torch.arange(4)
    assert found.cpu().equal(place[:, None] * (2**31 - 1) + place * 2**30)


@pytest.mark.parametrize(("capability", "dtypes"), [("80", ["float16"]), ("90", ["bfloat16", "float32"])])
def test_compiles_for_a_gpu_that_is_not_here(capability: str, dtypes: list[str], tmp_path: Path) -> None:
    """The interpreter takes what no compiler would."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.compile_triton", capability, *dtypes],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(6 * len(dtypes))]


def test_inductor_compiles_the_kernels_of_a_graph_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """It takes less of Triton than a call does."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.inductor_triton"],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["_attend", "_attend", "_attend", "_match", "_share", "_share"]


# --- who serves what --------------------------------------------------------------------------------------------------


Arguments = tuple[Tensor | None, ...]
"""q, k, v, mask and log_mass."""

REFUSED: dict[str, tuple[str, Callable[[Tensor, Tensor, Tensor], Arguments]]] = {
    "float64": ("float32 and less", lambda q, k, v: (q.double(), k.double(), v.double(), None, None)),
    "two dtypes": ("several dtypes", lambda q, k, v: (q, k, v.half(), None, None)),
    "keys of fewer samples": ("do not fit", lambda q, k, v: (q, k[:1], v[:1], None, None)),
    "values of fewer heads": ("do not fit", lambda q, k, v: (q, k, v[:, :1], None, None)),
    "no key": ("empty", lambda q, k, v: (q, k[:, :, :0], v[:, :, :0], None, None)),
    "no query": ("empty", lambda q, k, v: (q[:, :, :0], k, v, None, None)),
    "no head": ("empty", lambda q, k, v: (q[:, :0], k[:, :0], v[:, :0], None, None)),
    "wide heads": (
        "head dimension 80 is above 64",
        lambda q, k, v: (q.repeat(1, 1, 1, 20), k.repeat(1, 1, 1, 20), v, None, None),
    ),
    "wide values": ("head dimension 100 is above 64", lambda q, k, v: (q, k, v.repeat(1, 1, 1, 20), None, None)),
    "a mask from elsewhere": ("several devices", lambda q, k, v: (q, k, v, torch.zeros(9, 7, device="meta"), None)),
    "masses of pairs": ("masses differ by query", lambda q, k, v: (q, k, v, None, torch.zeros(1, 1, 9, 7))),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_the_kernels_cannot_do_is_not_theirs(why: str) -> None:
    q, k, v = qkv(2, 2, 9, 7)
    assert tiled.misfit(q, k, v, 0.5, torch.zeros(1, 1, 9, 7), log_masses(2, 7)) is None
    reason, changed = REFUSED[why]
    one, other, values, mask, log_mass = changed(q, k, v)
    assert reason in tiled.misfit(one, other, values, 0.5, mask, log_mass)  # type: ignore[arg-type, operator]


def served_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the device had what the kernels need."""
    monkeypatch.setattr(tiled, "_lack", lambda tensor: None)


def test_the_operator_asks_who_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(2, 2, 21, 37)
    asked: list[str] = []

    def noting(provider: ops.Provider[..., Any]) -> ops.Provider[..., Any]:
        return replace(provider, forward=lambda *args: asked.append(provider.name) or blocked.forward(*args))  # type: ignore[func-returns-value]

    providers = ops.PROVIDERS["attend_and_sharpness"]
    monkeypatch.setattr(providers, "order", list(map(noting, providers.order)))
    ops.attend_and_sharpness(q, k, v)
    served_everywhere(monkeypatch)
    ops.attend_and_sharpness(q, k, v)
    ops.attend_and_sharpness(q.double(), k.double(), v.double())
    assert asked == ["native", "tiled", "blocked"]


def test_masses_and_matching_go_to_the_kernels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(2, 2, 21, 37)
    log_mass, metric = log_masses(2, 37), torch.randn(2, 9, 5)
    expected = ops.attend(q, k, v, log_mass=log_mass), *ops.match(metric)
    called: list[str] = []
    for module, name in ((triton_kernels, "attend"), (triton_matching, "match")):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, n=name, f=kernel: called.append(n) or f(*args))
    served_everywhere(monkeypatch)
    found = ops.attend(q, k, v, log_mass=log_mass), *ops.match(metric)
    assert called == ["attend", "match"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Unlaunched:
    """A kernel that is never launched."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **options: None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "case"), TILED)
def test_the_kernels_give_what_the_fake_kernel_promises(
    name: str, case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a part of a graph, which has no other fake kernel than the code around them, and when they run."""
    served_everywhere(monkeypatch)
    (provider,) = (each for each in ops.PROVIDERS[name].order if each.name == "tiled")
    arguments = tuple(t.to(DEVICE) if isinstance(t, Tensor) else t for t in ARGUMENTS[name][case](dtype))
    promised = promise(name, case, dtype)
    assert gives(name, provider, arguments) == [promised] * 2
    monkeypatch.setattr(triton_parts, "wrapped", lambda kernel: Unlaunched())
    assert faked(provider.forward, arguments) == promised


@pytest.mark.parametrize("with_mass", [False, True])
def test_fused_attention_never_sees_a_mask_of_another_dtype(with_mass: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN would read its bits as if they were of the queries' dtype."""
    q, k, v = (each.bfloat16().requires_grad_() for each in qkv(1, 2, 21, 21, 8, 8))
    seen: list[torch.Tensor] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def noting(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(mask)
        return original(q, k, v, mask, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    ops.attend(q, k, v, mask=torch.randn(21, 21), log_mass=log_masses(1, 21) if with_mass else None)
    assert [mask.dtype for mask in seen] == [torch.bfloat16]


@pytest.mark.parametrize(
    ("device", "grad", "masked", "with_mass", "cudnn"),
    [
        ("cpu", True, True, False, False),
        ("cpu", True, False, True, False),
        ("cpu", True, True, True, False),
        ("cpu", True, False, False, True),  # no mask
        ("cpu", False, True, False, True),  # no gradients
        ("another", True, True, False, True),
    ],
)
def test_cudnn_never_takes_gradients_under_a_mask(
    device: str, grad: bool, masked: bool, with_mass: bool, cudnn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be NaN. As if the CPU were where cuDNN is."""
    monkeypatch.setattr(fused, "CUDNN_DEVICE", device)
    q, k, v = (each.requires_grad_(grad) for each in qkv(1, 2, 21, 21, 8, 8))
    seen: list[bool] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "attention" in str(function):
                seen.append(torch.backends.cuda.cudnn_sdp_enabled())
            return function(*args, **(kwargs or {}))

    with Noting():
        ops.attend(
            q, k, v, mask=torch.randn(21, 21) if masked else None, log_mass=log_masses(1, 21) if with_mass else None
        )
    assert seen == [cudnn]
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("allowed", "chosen"), [("FLASH_ATTENTION", "flash_attention"), ("MATH", "softmax")])
def test_a_compiler_chooses_attention_as_it_is_told(
    allowed: str, chosen: str, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what may attend where gradients pass a mask, in graphs with their gradients; `whole` is traced by Dynamo."""
    monkeypatch.setattr(fused, "CUDNN_DEVICE", "cpu")
    monkeypatch.setattr(fused, "_without_cudnn", assume_constant_result(lambda: [getattr(SDPBackend, allowed)]))
    inputs = *(each.requires_grad_() for each in qkv(1, 2, 21, 21, 8, 8)), torch.randn(21, 21)
    graphs: list[str] = []

    def noting(graph: GraphModule, inputs: Any) -> Any:
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return ops.attend(q, k, v, mask=mask)

    if whole:
        torch.compile(attend, fullgraph=True, backend=aot_autograd(fw_compiler=noting))(*inputs).sum().backward()
    else:
        aot_function(attend, noting)(*inputs).sum().backward()
    assert len(graphs) == 2
    assert all(chosen in graph for graph in graphs)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_what_a_user_allows_is_what_attends_without_cudnn() -> None:
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        assert fused._without_cudnn() == [SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        assert fused._without_cudnn() == [SDPBackend.MATH]


def test_triton_is_not_imported_before_it_serves() -> None:
    program = (
        "import sys, torch, tldr_compile; from tldr_compile import ops; x = torch.ones(1, 1, 2, 4);"
        "ops.attend_and_sharpness(x, x, x); ops.match(x[0]);"
        "print(any(name.startswith('tldr_compile.ops.triton_') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


# --- matching ---------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(b=st.integers(1, 2), n=st.integers(2, 90), c=st.integers(3, 40))
def test_matches_as_the_specification(b: int, n: int, c: int) -> None:
    metric = torch.randn(b, c, n).mT
    similarity, destination = (result.cpu() for result in tiled.match(metric.to(DEVICE)))
    best, place = reference.match(metric)
    torch.testing.assert_close(similarity, best, rtol=1e-5, atol=1e-5)
    assert destination.dtype == torch.int64
    assert destination.equal(place)


def test_between_equal_destinations_the_first_wins() -> None:
    metric = torch.randn(1, 2, 5).repeat(1, 35, 1)
    metric[:, 6] = 0
    assert (tiled.match(metric.to(DEVICE))[1] == 0).all()


def test_half_precision_is_matched_as_if_it_were_single() -> None:
    metric = torch.randn(2, 71, 48).bfloat16()
    similarity, destination = (result.cpu() for result in tiled.match(metric.to(DEVICE)))
    best, place = reference.match(metric)
    torch.testing.assert_close(similarity, best, rtol=1e-5, atol=1e-5)
    assert destination.equal(place)


def test_what_is_no_number_joins_a_token() -> None:
    metric = torch.randn(1, 9, 5)
    metric[:, 4] = torch.nan
    assert (tiled.match(metric.to(DEVICE))[1] < 4).all()
