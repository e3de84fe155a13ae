"""The provider in C++, for float32 and less on CPUs: one pass that costs no more than fused attention.

Inductor's tool chain compiles `attention.cpp` at first use and keeps it in its cache on disk.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from importlib import resources

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocked import relative_mass
from .reference import empty_results

log = logging.getLogger("tldr_compile")

PACKED_BYTES = 64 << 20
"""So much of the keys and values, or one sample of them, is laid out anew at a time."""

_PAD = 16  # as in attention.cpp
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as there too


class _View(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 4), ("kind", ctypes.c_int64))


class _Sizes(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("samples", "heads", "rows", "keys", "channels", "values"))


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled provider. Raises OSError, or `InvalidCxxCompiler` or `CppCompileError` of `torch._inductor.exc`."""
    from torch._inductor.codecache import CppCodeCache  # noqa: PLC0415 - importing Inductor takes seconds

    compiled: ctypes.CDLL = CppCodeCache.load(resources.files(__package__).joinpath("attention.cpp").read_text())
    compiled.scratch_floats.restype = ctypes.c_int64
    return compiled


@functools.cache
def compiles() -> bool:
    """Whether there is a C++ compiler that works; one warning if not."""
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler  # noqa: PLC0415 - as above

    try:
        library()
    except (InvalidCxxCompiler, CppCompileError, OSError) as error:  # OSError: a cache that allows no code or no file
        log.warning(
            "attention with saliency takes about twice as long as it could, since its C++ does not compile: "
            "install a C++ compiler, or name one in the environment variable CXX; if it is not that, name a folder "
            "that may hold programs in TORCHINDUCTOR_CACHE_DIR. The reason: %s",
            error,
        )
        return False
    return True


def takes(q: Tensor, log_mass: Tensor | None) -> bool:
    """Whether `forward` and `attend` are made for these: on a CPU, not in float64, masses that only differ by key."""
    return _refusal(q, log_mass) is None


def _refusal(q: Tensor, log_mass: Tensor | None) -> str | None:
    if q.device.type != "cpu":
        return "it runs on CPUs"
    if q.dtype not in _KINDS:
        return "it computes in float32, which would round its inputs"
    if log_mass is not None and torch.atleast_2d(log_mass).shape[-2] != 1:
        return "its masses differ by query"
    return None


def serves(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, log_mass: Tensor | None
) -> str | None:
    """Why `forward` and `attend` cannot take these arguments, or not here; None where they can."""
    refusal = _refusal(q, log_mass)
    if refusal is not None:
        return refusal
    if k.shape != (*q.shape[:2], v.shape[2], q.shape[3]) or v.shape[:2] != q.shape[:2]:
        return "its queries, keys and values do not fit each other"
    if not k.dtype == v.dtype == q.dtype:
        return "its queries, keys and values have several dtypes"
    return None if compiles() else "its C++ does not compile"


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, log_mass: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`reference.attention_with_sharpness` for `q [B, H, Nq, d]`, `k [B, H, Nk, d]`, `v [B, H, Nk, c]`.

    `log_mass` may not differ by query. Computed in float32; a row's result does not depend on the number of threads.
    """
    out, sharpness = empty_results(q, v)
    _fill(out, sharpness, q, k, v, scale, mask, log_mass)
    return out, sharpness


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, log_mass: Tensor | None
) -> Tensor:
    """The output of `forward` alone."""
    out, _ = empty_results(q, v)
    _fill(out, None, q, k, v, scale, mask, log_mass)
    return out


def _fill(
    out: Tensor,
    sharpness: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    log_mass: Tensor | None,
) -> None:
    """Sample by sample, or as many as `PACKED_BYTES` allows."""
    batch, heads, rows, _ = q.shape
    keys = k.shape[-2]
    mass = relative_mass(log_mass, torch.float32)
    if mask is not None:
        mask = mask.expand(batch, heads, rows, keys)
    if mass is not None:
        mass = F.pad(mass.expand(-1, -1, -1, keys), (0, -keys % _PAD)).contiguous().expand(batch, heads, -1, -1)
    sample_bytes = 4 * heads * _padded(keys) * (k.shape[-1] + _padded(v.shape[-1]))
    depth = max(1, PACKED_BYTES // max(1, sample_bytes))
    for first in range(0, batch, depth):
        part = slice(first, first + depth)
        rest = (None if each is None else each[part] for each in (mask, mass, sharpness))
        _call(out[part], q[part], k[part], v[part], scale, *rest)


def _call(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    mass: Tensor | None,
    sharpness: Tensor | None,
) -> None:
    """Run the C++; `mask [B, H, Nq, Nk]`, `mass [B, H, 1, padded Nk]`."""
    compiled = library()
    keep = mask if mask is not None and mask.dtype == torch.bool else None
    bias = None if mask is None or keep is not None else mask.to(torch.float32)
    batch, heads, rows, channels = q.shape
    keys, values = v.shape[-2:]
    sizes = _Sizes(batch, heads, rows, keys, channels, values)
    floats = functools.partial(q.new_empty, dtype=torch.float32)
    packed_k = floats(batch, heads, _padded(keys), channels)
    packed_v = floats(batch, heads, _padded(keys), _padded(values))
    scratch = floats(torch.get_num_threads(), compiled.scratch_floats(ctypes.byref(sizes)))
    packed = _pointer(packed_k), _pointer(packed_v)
    compiled.pack(_view(k), _view(v), _view(mass), ctypes.byref(sizes), *packed)
    compiled.attend(
        _view(q),
        *packed,
        _view(bias),
        _view(keep),
        _view(mass),
        _view(out),
        _view(None if sharpness is None else sharpness[:, None, :, None]),
        ctypes.c_float(scale),
        ctypes.byref(sizes),
        _pointer(scratch),
    )


def _padded(length: int) -> int:
    return length + -length % _PAD


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _view(tensor: Tensor | None) -> object:
    """The C++ code's `const View&` of a tensor that somebody else keeps alive."""
    if tensor is None:
        return ctypes.byref(_View())
    return ctypes.byref(_View(tensor.data_ptr(), tensor.stride(), _KINDS.get(tensor.dtype, 0)))
