"""The provider for GPUs: Triton kernels that read every input where it lies and keep the scores on the chip.

Nothing here needs Triton until the first call that it serves.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger("tldr_compile")

# A row of one head is one operand of a product of tiles; float32 is multiplied in three parts, which take their room.
MOST_CHANNELS = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 64}


def serves(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, log_mass: Tensor | None) -> bool:
    """Whether `forward` takes these arguments on their device."""
    return q.is_cuda and _has_triton(q.device) and fits(q, k, v, mask, log_mass)


def fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, log_mass: Tensor | None) -> bool:
    """Whether the kernels take these arguments: well-formed, on one device, of one dtype, masses of keys alone."""
    biases = [bias for bias in (mask, log_mass) if bias is not None]
    batch, heads, _, channels = q.shape
    return (
        k.shape == (batch, heads, k.shape[2], channels)
        and v.shape[:3] == k.shape[:3]
        and 0 not in (*q.shape, *k.shape)
        and q.dtype == k.dtype == v.dtype
        and max(channels, v.shape[3]) <= MOST_CHANNELS.get(q.dtype, 0)
        and all(tensor.device == q.device for tensor in (k, v, *biases))
        and (log_mass is None or log_mass.shape[-2] == 1)
    )


def matches(metric: Tensor) -> bool:
    """Whether `match` takes this metric `[B, N, C]` on its device."""
    return metric.is_cuda and _has_triton(metric.device) and metric.dtype in MOST_CHANNELS and 0 not in metric.shape


def match(metric: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.match`."""
    from . import triton_matching  # noqa: PLC0415 - Triton may be missing, and takes a while to import

    return triton_matching.match(metric)


@cache
def _has_triton(device: torch.device) -> bool:
    """Triton is there, and the device has the matrix units and asynchronous copies that the kernels are written for.

    Of the ways to attend with masses this one was the fastest on a Hopper GPU; docs/gpu.md has the others.
    """
    cuda = torch.version.hip is None and importlib.util.find_spec("triton") is not None
    serves = cuda and torch.cuda.get_device_capability(device) >= (8, 0)
    chosen = "kernels in Triton" if serves else "fused attention under an additive mask, and blocks of scores"
    log.info("attention with masses, attention with saliency and matching on %s: %s", device, chosen)
    return serves


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, log_mass: Tensor | None) -> Tensor:
    """The output of `forward` alone."""
    from . import triton_kernels  # noqa: PLC0415 - as above

    return triton_kernels.attend(q, k, v, scale, mask, log_mass)


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, log_mass: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`reference.attention_with_sharpness` for `q [B, H, Nq, d]`, `k [B, H, Nk, d]`, `v [B, H, Nk, c]`, if served."""
    from . import triton_kernels  # noqa: PLC0415 - as above

    return triton_kernels.attend_and_sharpness(q, k, v, scale, mask, log_mass)
