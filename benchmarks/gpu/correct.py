"""Whether what the device computes is right: attention, its gradients, the golden encoders, compiled models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import tldr_compile
from benchmarks.golden import ENCODERS, at_full_length, golden_encoder
from benchmarks.gpu.driver import Jobs, Row, Setup
from benchmarks.gpu.load import SPECS, TINY
from benchmarks.speed import difference
from tldr_compile import ops
from tldr_compile.ops import reference

# Norm of the error by norm of the exact result.
OUTPUT = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
GRADIENT = {torch.bfloat16: 3e-2, torch.float16: 6e-3, torch.float32: 1e-4}
SHARPNESS = 1e-4  # largest error, of any dtype: it is computed in float32
GOLDEN = 1e-5  # of the largest magnitude, as on CPUs
MODEL = {torch.bfloat16: 5e-2, torch.float32: 1e-4}  # of the largest magnitude: bfloat16 rounds otherwise when fused

LOW_ROWS = 3  # every third row

Mask = Callable[[int, torch.dtype, torch.device], Tensor]

MASKS: dict[str, Mask | None] = {
    "": None,
    "bool of keys": lambda n, dtype, device: _first_kept(torch.rand(1, 1, 1, n, device=device) < 0.7),
    "bool of pairs": lambda n, dtype, device: _first_kept(torch.rand(1, 1, n, n, device=device) < 0.5),
    "additive": lambda n, dtype, device: torch.randn(1, 1, n, n, device=device).to(dtype),
    "additive float32": lambda n, dtype, device: torch.randn(1, 1, n, n, device=device),
    "rows at -1e4": lambda n, dtype, device: _low_rows(n, -1e4, dtype, device),
    "rows at the lowest": lambda n, dtype, device: _low_rows(n, torch.finfo(dtype).min, dtype, device),
}


@dataclass(frozen=True)
class Case:
    """Self-attention over `tokens`, random anew in every run."""

    dtype: torch.dtype
    tokens: int
    channels: int = 64
    mask: str = ""
    masses: bool = False

    def __str__(self) -> str:
        masses = "masses" if self.masses else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join(filter(None, (dtype, f"N={self.tokens} d={self.channels}", self.mask, masses)))

    def inputs(self, device: torch.device) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None, Tensor | None]:
        """`q, k, v [B, H, N, d]` as views of one projection, the mask, and the masses' logarithm."""
        joint = torch.randn(2, self.tokens, 3, 3, self.channels, device=device).to(self.dtype)
        q, k, v = joint.permute(2, 0, 3, 1, 4).unbind(0)
        mask = MASKS[self.mask]
        log_mass = (torch.rand(2, 1, 1, self.tokens, device=device) * 5 + 1).log() if self.masses else None
        return (q, k, v), None if mask is None else mask(self.tokens, self.dtype, device), log_mass


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Channels and masks vary together with dtypes and lengths: every pair of choices that can matter is there somewhere.
FORWARD = (
    Case(BF16, 1569, 64, masses=True),
    Case(BF16, 1569, 64),
    Case(BF16, 2000, 64, "additive float32", masses=True),
    Case(BF16, 2000, 64, "additive float32"),
    Case(FP16, 1569, 64, "bool of keys", masses=True),
    Case(FP32, 1569, 64, masses=True),
    Case(BF16, 37, 80, "additive", masses=True),
    Case(BF16, 2000, 128, "bool of pairs"),
    Case(FP16, 2000, 80, masses=True),
    Case(FP32, 37, 64, "bool of pairs", masses=True),
    Case(FP32, 2000, 80, "additive"),
    Case(FP16, 37, 128, "additive"),
    Case(BF16, 1, 64, masses=True),
    Case(FP32, 1569, 128, masses=True),
    Case(FP16, 1, 64),
    Case(FP32, 1, 80),
)
# Lengths that leave 64 beyond a multiple of 128.
BACKWARD = (
    Case(BF16, 192, 64, "rows at -1e4"),
    Case(BF16, 1600, 64, "rows at the lowest"),
    Case(BF16, 1600, 64, "rows at -1e4", masses=True),
    Case(BF16, 1600, 64, masses=True),
    Case(FP16, 192, 80, "rows at -1e4", masses=True),
    Case(FP32, 192, 64, "rows at the lowest", masses=True),
)


def correct(setup: Setup) -> Jobs:
    device = setup.device
    yield from (*_models(device), *_encoders(device))
    for case in FORWARD:
        yield f"attention {_sized(case, setup)}", partial(forward, _sized(case, setup), device)
    for case in BACKWARD:
        yield f"gradients {_sized(case, setup)}", partial(backward, _sized(case, setup), device)


def forward(case: Case, device: torch.device) -> Row:
    """The errors of `attend`, and of `attend_and_sharpness`."""
    (q, k, v), mask, log_mass = case.inputs(device)
    out, sharpness = _exact(q, k, v, mask, log_mass)
    found, found_sharpness = ops.attend_and_sharpness(q, k, v, mask=mask, log_mass=log_mass)
    alone = ops.attend(q, k, v, mask=mask, log_mass=log_mass)
    errors = {"both": relative(found, out), "attend": relative(alone, out)}
    off = float((found_sharpness.double() - sharpness).abs().max())
    ok = all(error <= OUTPUT[case.dtype] for error in errors.values()) and off <= SHARPNESS  # NaN is no less
    return {**errors, "sharpness": off, "bound": OUTPUT[case.dtype], "ok": ok}


def backward(case: Case, device: torch.device) -> Row:
    """The errors of all gradients, the largest one of `attend` and of `attend_and_sharpness`.

    As with padding, nothing reads the rows that the mask makes low: they must only do no harm.
    """
    (q, k, v), mask, log_mass = case.inputs(device)
    weights = torch.randn_like(v), torch.randn(q.shape[0], q.shape[2], device=device)
    if case.mask.startswith("rows"):
        weights[0][:, :, ::LOW_ROWS] = weights[1][:, ::LOW_ROWS] = 0

    def gradients(function: Callable[..., Any], dtype: torch.dtype | None = None) -> list[Tensor]:
        leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in (q, k, v)]
        masses = None if log_mass is None else log_mass.to(dtype or log_mass.dtype).detach().requires_grad_()
        results = function(*leaves, mask=mask, log_mass=masses)
        loss = sum((result * weight.to(result.dtype)).sum() for result, weight in zip(results, weights, strict=False))
        return list(torch.autograd.grad(loss, [*leaves, *([] if masses is None else [masses])]))

    exact = partial(reference.attention_with_sharpness, scale=case.channels**-0.5)

    def exact_output(*args: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return exact(*args, **options)[:1]

    def output(*args: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return (ops.attend(*args, **options),)

    errors = {
        "both": _worst(gradients(ops.attend_and_sharpness), gradients(exact, torch.float64)),
        "attend": _worst(gradients(output), gradients(exact_output, torch.float64)),
    }
    ok = all(error <= GRADIENT[case.dtype] for error in errors.values())
    return {**errors, "bound": GRADIENT[case.dtype], "ok": ok}


def relative(found: Tensor, exact: Tensor) -> float:
    """The norm of the error by the norm of what is exact; NaN if anything found is."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def _exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, log_mass: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = (tensor.double() for tensor in (q, k, v))
    return reference.attention_with_sharpness(*wide, scale=q.shape[-1] ** -0.5, mask=mask, log_mass=log_mass)


def _worst(found: list[Tensor], exact: list[Tensor]) -> float:
    return max((relative(one, two) for one, two in zip(found, exact, strict=True)), key=lambda e: (e != e, e))


# --- models -----------------------------------------------------------------------------------------------------------


def _models(device: torch.device) -> Jobs:
    cuda = device.type == "cuda"
    schedule = {"options": {"schedule": list(SPECS[TINY].schedule)}}
    yield "compiled, float32", partial(twins, device, FP32, **schedule)
    if cuda:
        sliced = {"options": {**schedule["options"], "reduction": "slice"}}  # else rounding decides which tokens merge
        yield "compiled, bfloat16, sliced", partial(twins, device, BF16, **sliced)
        # A mode goes with the default schedule.
        yield "compiled with CUDA graphs", partial(twins, device, FP32, mode="reduce-overhead")


@torch.inference_mode()
def twins(device: torch.device, dtype: torch.dtype, **options: Any) -> Row:
    """The backend against `apply` on inputs that change; calls after the first two may not wait for the device."""
    torch._dynamo.reset()
    counters.clear()
    spec = SPECS[TINY]
    with device:
        model = spec.build().to(dtype)
    videos = [torch.randn(2, *spec.shape, device=device, dtype=dtype) for _ in range(4)]
    with exact_products():
        compiled = torch.compile(model, backend="tldr", **options)
        merged = tldr_compile.apply(model, (videos[0],), **options.get("options", {}))
        errors = [difference(compiled(video), merged(video)) for video in videos]
        with no_waiting(device):
            last = compiled(videos[0])
        errors.append(difference(last, merged(videos[0])))
    skips = counters["inductor"]["cudagraph_skips"]
    off = max(errors)
    return {"off": off, "bound": MODEL[dtype], "cudagraph_skips": skips, "ok": off <= MODEL[dtype] and not skips}


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Raise where the host waits for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def exact_products() -> Iterator[None]:
    """Convolutions in float32, which are otherwise rounded to TF32 on GPUs."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def _encoders(device: torch.device) -> Jobs:
    for name in ENCODERS:
        for attn in ("sdpa", "eager"):
            yield f"golden {name} {attn}", partial(golden, name, attn, device)


@torch.inference_mode()
def golden(name: str, attn: Any, device: torch.device) -> Row:
    """The authors' numbers, merged and dense, block by block."""
    encoder = golden_encoder(name, attn)
    model, video = encoder.model.to(device), encoder.video.to(device)
    with exact_products():
        merged = tldr_compile.apply(model, (video,), schedule=encoder.schedule)
        restored, dense = merged(video), model(video)
        expected = at_full_length(encoder, tldr_compile.inspect(merged, video))
    pairs = zip((*restored, *dense), (*expected, *encoder.base), strict=True)
    off = max(difference(found.cpu(), expected) for found, expected in pairs)
    return {"off": off, "bound": GOLDEN, "ok": off <= GOLDEN}


# --- masks ------------------------------------------------------------------------------------------------------------


def _first_kept(keep: Tensor) -> Tensor:
    """A mask that hides no row altogether."""
    keep[..., 0] = True
    return keep


def _low_rows(tokens: int, low: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A random additive mask, some of its rows so low that scores hardly differ or not at all."""
    mask = torch.randn(1, 1, tokens, tokens, device=device).to(dtype)
    mask[:, :, ::LOW_ROWS] = low
    return mask


def _sized(case: Case, setup: Setup) -> Case:
    return replace(case, tokens=min(case.tokens, 200)) if setup.dry else case
