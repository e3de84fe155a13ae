"""Have Inductor compile the operators for a Hopper GPU that need not be here: `python -m tests.ops.inductor_triton`.

A compiler takes less of Triton than a call does: scalars arrive in double precision, globals as text. Nothing is
launched. Prints the kernels that a compiled graph calls, one for each call in its code.
"""

import os
from contextlib import nullcontext
from typing import Any
from unittest import mock

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # read when Inductor is imported

import torch
import torch._inductor.config
import torch._subclasses.fake_tensor
import triton
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import async_compile, compile_fx
from torch._inductor.codecache import PyCodeCache
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.runtime import hints, triton_helpers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.ops.compile_triton import Absent
from tldr_compile import ops
from tldr_compile.ops import tiled

HOPPER = {
    "major": 9,
    "multi_processor_count": 132,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "warp_size": 32,
}


class NoDevice(nullcontext[None]):
    """In place of making a device the current one."""

    def __init__(self, device: object) -> None:
        super().__init__()


def pretend() -> None:
    """Everything that Inductor asks of a device before it launches something."""
    triton.runtime.driver.set_active(Absent(90))
    properties = mock.Mock(minor=0, name="absent", total_memory=80 << 30, gcnArchName="", **HOPPER)
    answers: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "device_count": lambda: 1,
            "synchronize": lambda *device: None,
            "get_device_capability": lambda *device: (9, 0),
            "get_device_properties": lambda *device: properties,
            "get_rng_state": lambda *device: torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda *state: None,
            "_exchange_device": lambda device: 0,
            "_maybe_exchange_device": lambda device: 0,
            "device": NoDevice,
        },
        CudaInterface: {
            "device": NoDevice,
            "current_device": staticmethod(lambda: 0),
            "device_count": staticmethod(lambda: 1),
            "is_available": staticmethod(lambda: True),
            "get_compute_capability": staticmethod(lambda *device: 90),
            "get_device_properties": staticmethod(lambda *device: properties),
            "is_bf16_supported": staticmethod(lambda **emulation: True),
            "is_triton_capable": staticmethod(lambda *device: True),
            "raise_if_triton_unavailable": staticmethod(lambda *device: None),
        },
        CudaInterface.Worker: {
            "current_device": staticmethod(lambda: 0),
            "get_device_properties": staticmethod(lambda *device: properties),
        },
        hints.DeviceProperties: {
            "create": lambda device: hints.DeviceProperties(type="cuda", index=0, cc=90, **HOPPER),  # type: ignore[arg-type]
        },
        torch._C: {"_cuda_getCurrentRawStream": lambda device: 0},
        torch._subclasses.fake_tensor: {"init_gpu_context": lambda *device: None},
        joint_graph: {"lazy_init": lambda *device: None},  # its patterns are traced on the device
        post_grad: {"lazy_init": lambda *device: None},
        triton_helpers: {"set_driver_to_gpu": lambda: None},
        torch._inductor.config: {"joint_graph_constant_folding": False},  # it computes on the device
        tiled: {"_lack_of": lambda device: None},
    }
    for place, names in answers.items():
        for name, answer in names.items():
            setattr(place, name, answer)


def never_launch() -> list[str]:
    """Kernels of graphs are compiled and left; the names of ours are kept in what is returned."""
    compiled: list[str] = []

    def compile_only(self: Any, name: str, code: str, device_str: str = "cuda") -> Any:
        if not name.startswith("triton_"):  # as Inductor calls its own
            getattr(PyCodeCache.load(code), name).precompile(warm_cache_only=True)
            compiled.append(name)
        return mock.Mock()

    async_compile.AsyncCompile.triton = compile_only  # type: ignore[method-assign]
    return compiled


def merged_layer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, log_mass: Tensor) -> tuple[Tensor, ...]:
    """Every kind of call that a merged graph holds, on projections `[B, N, C]`."""
    similarity, destination = ops.match(k)
    q, k, v = (each.unflatten(-1, (12, 64)).transpose(1, 2) for each in (q, k, v))
    first, sharpness = ops.attend_and_sharpness(q, k, v)
    second, sharper = ops.attend_and_sharpness(q, k, v, mask=mask, log_mass=log_mass)
    third = ops.attend(q, k, v, log_mass=log_mass)
    return similarity, destination, sharpness, sharper, (first + second + third).transpose(1, 2).flatten(2)


def main() -> None:
    pretend()
    compiled = never_launch()
    with FakeTensorMode(), torch.no_grad():
        projections = [torch.empty(2, 400, 768, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
        inputs = [*projections, torch.empty(400, 400, device="cuda"), torch.empty(2, 1, 1, 400, device="cuda")]
        graph = make_fx(merged_layer)(*inputs)
    with torch.no_grad():
        compile_fx.compile_fx(graph, inputs)
    print(*sorted(compiled))


if __name__ == "__main__":
    main()
