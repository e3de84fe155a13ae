"""The provider in C++, for float32 and less on CPUs: one pass that costs no more than fused attention.

Inductor's tool chain compiles `attention.cpp` at first use and keeps it in its cache on disk. With `operators.cpp` the
same is a library of two operators of torch, `tldr_native::...`, for programs that run where this package is not.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor
from torch._ops import OpOverload

from .blocked import relative_mass
from .reference import empty_results

log = logging.getLogger("tldr_compile")

PACKED_BYTES = 64 << 20
"""So much of the keys and values, or one sample of them, is laid out anew at a time."""

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in attention.cpp


class _View(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 4), ("kind", ctypes.c_int64))


class _Sizes(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("samples", "heads", "rows", "keys", "channels", "values"))


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled provider. Raises OSError, or `InvalidCxxCompiler` or `CppCompileError` of `torch._inductor.exc`."""
    from torch._inductor.codecache import CppCodeCache  # noqa: PLC0415 - importing Inductor takes seconds

    compiled: ctypes.CDLL = CppCodeCache.load(_source("attention.cpp"))
    return compiled


@functools.cache
def operators_library() -> Path:
    """The library of the operators `tldr_native::...`, which are registered from now on. Raises as `library` does."""
    from torch._inductor.codecache import CppCodeCache  # noqa: PLC0415 - as above

    class Alone(CppCodeCache):
        cpp_compile_command_flags = {"aot_mode": True}  # linked as AOTInductor's own code: not with Python  # noqa: RUF012

    packed = f"constexpr int64_t PACKED_BYTES = {PACKED_BYTES};\n"
    compiled: ctypes.CDLL = Alone.load(_source("attention.cpp") + packed + _source("operators.cpp"))
    return Path(compiled._name)


def operators() -> dict[str, OpOverload]:
    """The operators `tldr_native::...` by the names of those of ours that they compute. Raises as `library` does.

    They take what `serves` takes and raise RuntimeError for the rest; they have no gradients.
    """
    operators_library()
    return {name: getattr(torch.ops.tldr_native, name).default for name in ("attend", "attend_and_sharpness")}


def _source(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text()


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
    return refusal(q, log_mass) is None


def refusal(q: Tensor, log_mass: Tensor | None) -> str | None:
    """Why `takes` says no."""
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
    reason = refusal(q, log_mass)
    if reason is not None:
        return reason
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
    batch, heads, rows, channels = q.shape
    keys, values = v.shape[-2:]
    if mask is not None:
        mask = mask.expand(batch, heads, rows, keys)
    keep = mask if mask is not None and mask.dtype == torch.bool else None
    bias = None if mask is None or keep is not None else mask.to(torch.float32)
    mass = relative_mass(log_mass, torch.float32)
    library().tldr_attend(
        *map(_view, (q, k, v, bias, keep)),
        _view(None if mass is None else mass.expand(batch, heads, 1, keys)),
        _view(out),
        _view(None if sharpness is None else sharpness[:, None, :, None]),
        ctypes.c_float(scale),
        ctypes.byref(_Sizes(batch, heads, rows, keys, channels, values)),
        ctypes.c_int64(PACKED_BYTES),
    )


def _view(tensor: Tensor | None) -> object:
    """The C++ code's `const View&` of a tensor that somebody else keeps alive."""
    if tensor is None:
        return ctypes.byref(_View())
    return ctypes.byref(_View(tensor.data_ptr(), tensor.stride(), _KINDS.get(tensor.dtype, 0)))
