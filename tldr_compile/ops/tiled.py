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
_OTHER_DTYPE = "it computes in float32 and less"


def serves(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, log_mass: Tensor | None
) -> str | None:
    """Why `forward` and `attend` cannot take these arguments on their device; None where they can."""
    lack = _lack(q)
    return misfit(q, k, v, scale, mask, log_mass) if lack is None else lack


def misfit(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, log_mass: Tensor | None
) -> str | None:
    """Why the kernels cannot take these arguments, on whatever device; None where they can."""
    batch, heads, _, channels = q.shape
    if k.shape != (batch, heads, k.shape[2], channels) or v.shape[:3] != k.shape[:3]:
        return "its queries, keys and values do not fit each other"
    if 0 in (*q.shape, *k.shape):
        return "its queries or keys are empty"
    if not q.dtype == k.dtype == v.dtype:
        return "its queries, keys and values have several dtypes"
    if q.dtype not in MOST_CHANNELS:
        return _OTHER_DTYPE
    if max(channels, v.shape[3]) > MOST_CHANNELS[q.dtype]:
        return f"its head dimension {max(channels, v.shape[3])} is above {MOST_CHANNELS[q.dtype]}"
    if any(tensor is not None and tensor.device != q.device for tensor in (k, v, mask, log_mass)):
        return "its tensors are on several devices"
    if log_mass is not None and log_mass.shape[-2] != 1:
        return "its masses differ by query"
    return None


def serves_match(metric: Tensor) -> str | None:
    """Why `match` cannot take this metric `[B, N, C]` on its device; None where it can."""
    lack = _lack(metric)
    if lack is not None:
        return lack
    if metric.dtype not in MOST_CHANNELS:
        return _OTHER_DTYPE
    return "its metric is empty" if 0 in metric.shape else None


def match(metric: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.match`."""
    from . import triton_matching  # noqa: PLC0415 - Triton may be missing, and takes a while to import

    return triton_matching.match(metric)


def _lack(tensor: Tensor) -> str | None:
    return _lack_of(tensor.device) if tensor.is_cuda else "it runs on NVIDIA GPUs"


@cache
def _lack_of(device: torch.device) -> str | None:
    """What is missing: Triton, or the matrix units and asynchronous copies that the kernels are written for.

    Of the ways to attend with masses this one was the fastest on two Hopper GPUs; docs/gpu.md has the others.
    """
    lack = None
    if torch.version.hip is not None:
        lack = "it runs on NVIDIA GPUs"
    elif importlib.util.find_spec("triton") is None:
        lack = "Triton is not installed"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        lack = "it runs on GPUs of compute capability 8.0 or higher"
    chosen = "kernels in Triton" if lack is None else f"not in Triton, since {lack}"
    log.info("attention with masses, attention with saliency and matching on %s: %s", device, chosen)
    return lack


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
