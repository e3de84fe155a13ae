"""Attention alone: with its sharpness, and with masses by every road there is, beside dense fused attention."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import timing
from benchmarks.gpu.driver import Jobs, Setup
from benchmarks.gpu.load import FUSED, dtype_on
from tldr_compile import ops
from tldr_compile.ops import reference

HEADS, CHANNELS = 12, 64
SIZES = ((2352, 8), (1568, 8), (4608, 4), (8192, 2))  # tokens and samples
SECONDS_OF_FLEX = 20.0  # which it compiles for every size
EXTRA = 8  # channels: fused attention takes multiples of that

Way = Callable[[], Any]


def kernels(setup: Setup) -> Jobs:
    for tokens, batch in ((64, 2),) if setup.dry else SIZES:
        yield f"{tokens} tokens x {batch}", partial(measure, tokens, batch, setup)


@torch.inference_mode()
def measure(tokens: int, batch: int, setup: Setup) -> dict[str, Any]:
    """Seconds of every way, by how much it is slower than the fastest dense attention, and the error of the output."""
    device = setup.device
    joint = torch.randn(batch, tokens, 3, HEADS, CHANNELS, device=device).to(dtype_on(device))
    q, k, v = joint.permute(2, 0, 3, 1, 4).unbind(0)
    log_mass = (torch.rand(batch, 1, 1, tokens, device=device) * 5 + 1).log()
    one = [tensor[:1].double() for tensor in (q, k, v)]
    scale = CHANNELS**-0.5
    exact = reference.attention_with_sharpness(*one, scale=scale)[0]
    exact_mass = reference.attention_with_sharpness(*one, scale=scale, log_mass=log_mass[:1].double())[0]

    dense = {f"dense, {name}": fused(name, partial(F.scaled_dot_product_attention, q, k, v)) for name in FUSED}
    ours = {"sharpness, ours": lambda: ops.attend_and_sharpness(q, k, v)[0]}
    with_masses = roads(q, k, v, log_mass)
    if device.type == "cuda":
        ours |= {f"sharpness, {name}": fused_and_share(name, q, k, v) for name in FUSED[:2]}
    if device.type == "cuda" and setup.left() > SECONDS_OF_FLEX:
        with_masses["masses, flex_attention"] = flex(q, k, v, log_mass)

    graphs, errors, refused = {}, {}, {}
    for name, way in {**dense, **ours, **with_masses}.items():
        try:
            errors[name] = _error(way(), exact_mass if name in with_masses else exact)
            graphs[name] = graphed(way, device)
        except RuntimeError as error:  # the only sign of a backend that does not take the arguments
            refused[name] = f"{error}".splitlines()[0][:200]
    taken = timing.paired(graphs, device, rounds=2 if setup.dry else 7, least=0.005)
    best = min(dense.keys() & taken.keys(), key=lambda name: timing.Spread.of(taken[name]).median)
    return {
        "tokens": tokens,
        "batch": batch,
        "heads": HEADS,
        "channels": CHANNELS,
        "best": best,
        "ways": [
            {
                "way": name,
                "latency": timing.Spread.of(seconds),
                "over_best_dense": timing.ratio(seconds, taken[best]),
                "output_error": errors[name],
            }
            for name, seconds in taken.items()
        ],
        "refused": refused,
    }


def roads(q: Tensor, k: Tensor, v: Tensor, log_mass: Tensor) -> dict[str, Way]:
    """Attention whose keys count with their mass, by the operator and by fused attention with other inputs."""
    scale = q.shape[-1] ** -0.5
    bias = partial(F.scaled_dot_product_attention, q, k, v, log_mass.to(q.dtype))
    extra = partial(F.scaled_dot_product_attention, *channel(q, k, v, log_mass), scale=scale)
    found: dict[str, Way] = {"masses, ours": partial(ops.attend, q, k, v, log_mass=log_mass)}
    for name in ("CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        found[f"masses, additive mask, {name}"] = fused(name, bias)
    for name in FUSED[:2]:
        found[f"masses, channel of keys, {name}"] = fused(name, lambda: extra()[..., : v.shape[-1]])
        found[f"masses, weighed values, {name}"] = fused(name, weighed(q, k, v, log_mass, pad="FLASH" in name))
    return found


def channel(q: Tensor, k: Tensor, v: Tensor, log_mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Masses as two more channels of the keys, a rounded one and what the rounding lost; values as wide as keys."""
    unscaled = log_mass.mT.expand(*k.shape[:3], 1) * q.shape[-1] ** 0.5
    rounded = unscaled.to(k.dtype)
    lost = (unscaled - rounded).to(k.dtype)
    wide_k = F.pad(torch.cat((k, rounded, lost), -1), (0, EXTRA - 2))
    wide_q = F.pad(torch.cat((q, torch.ones_like(q[..., :2])), -1), (0, EXTRA - 2))
    return wide_q, wide_k, F.pad(v, (0, EXTRA))


def weighed(q: Tensor, k: Tensor, v: Tensor, log_mass: Tensor, *, pad: bool) -> Way:
    """Values times their mass, the masses beside them, and their sum as the divisor."""
    scale, channels = q.shape[-1] ** -0.5, v.shape[-1]
    mass = (log_mass - log_mass.amax(-1, keepdim=True)).exp().mT.to(v.dtype)
    values = F.pad(torch.cat((v * mass, mass.expand(*v.shape[:3], 1)), -1), (0, EXTRA - 1))
    wide_q, wide_k = (F.pad(each, (0, EXTRA)) if pad else each for each in (q, k))

    def attend() -> Tensor:
        out = F.scaled_dot_product_attention(wide_q, wide_k, values, scale=scale)
        return out[..., :channels] / out[..., channels : channels + 1]

    return attend


def flex(q: Tensor, k: Tensor, v: Tensor, log_mass: Tensor) -> Way:
    by_key = log_mass[:, 0, 0]

    def add(score: Tensor, sample: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return score + by_key[sample, key]

    return partial(torch.compile(flex_attention, dynamic=False), q, k, v, score_mod=add)


def fused_and_share(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Way:
    """Fused attention that tells `log sum exp` of its rows, and our pass over queries and keys."""
    from tldr_compile.ops import triton_kernels  # noqa: PLC0415 - needs Triton

    scale = q.shape[-1] ** -0.5
    operators = torch.ops.aten
    forward = {
        "CUDNN_ATTENTION": lambda: operators._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale),
        "FLASH_ATTENTION": lambda: operators._scaled_dot_product_flash_attention(q, k, v, scale=scale),
    }[backend]

    def attend() -> Tensor:
        out, log_total = forward()[:2]
        binary = log_total.reshape(*q.shape[:2], -1)[..., : q.shape[2]] * triton_kernels.LOG2_E.value
        triton_kernels.share(q, k, scale, None, binary.contiguous(), None)
        return out

    return attend


def fused(backend: str, call: Way) -> Way:
    def attend() -> Any:
        with sdpa_kernel(SDPBackend.__members__[backend]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for every reason why it refuses
            return call()

    return attend


def graphed(way: Way, device: torch.device) -> Way:
    """The kernels of a call without the host's part: on GPUs the replay of a CUDA graph."""
    if device.type != "cuda":
        return way
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        way()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        way()
    return graph.replay


def _error(out: Tensor, exact: Tensor) -> float:
    """Of the first sample: the norm of the error by the norm of what is exact."""
    return float((out[:1].double() - exact).norm() / exact.norm())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every way at every size: median milliseconds, times the fastest dense attention, error."""
    lines = [f"{'attention':<24} {'way':<46} {'ms':>8} {'x dense':>8} {'error':>8}"]
    for row in rows:
        for way in row.get("ways", ()):
            lines.append(
                f"{row['name']:<24} {way['way']:<46} {1000 * way['latency'][1]:>8.3f} "
                f"{way['over_best_dense'][1]:>8.2f} {way['output_error']:>8.1e}"
            )
        lines += [f"{row['name']:<24} {name:<46} refused: {why[:60]}" for name, why in row.get("refused", {}).items()]
    return "\n".join(lines)
