"""Compile the Triton provider for a GPU that need not be here: `python -m tests.ops.compile_triton 90 bfloat16`.

A program of its own, since a process either compiles kernels or interprets them.
"""

import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from tldr_compile.ops import tiled, triton_parts


class Absent:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def never_launch() -> list[str]:
    """Calls of kernels compile them and end there; their names are kept in what is returned."""
    compiled: list[str] = []
    run = triton.JITFunction.run

    def compile_only(kernel: Any, *args: Any, **options: Any) -> None:
        compiled.extend(run(kernel, *args, **{**options, "warmup": True}).asm)

    triton.JITFunction.run = compile_only
    return compiled


def main(capability: int, *names: str) -> None:
    triton.runtime.driver.set_active(Absent(capability))
    triton_parts.wrapped = lambda kernel: kernel  # what a graph would see of it compiles nothing
    compiled = never_launch()

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    masks = {"bfloat16": torch.bool, "float16": torch.float16, "float32": None}
    for dtype, mask_dtype in ((getattr(torch, name), masks[name]) for name in names):
        q, k, v = empty(3, 2, 2, 100, 48, dtype=dtype)
        mask = None if mask_dtype is None else empty(100, 100, dtype=mask_dtype)
        log_mass = None if mask_dtype is torch.bool else empty(2, 1, 1, 100, dtype=torch.float32)
        tiled.forward(q, k, v, 0.5, mask, log_mass)
        tiled.forward(q, k, v[..., :0], 0.5, mask, None)
        tiled.attend(q, k, v, 0.5, mask, log_mass)
        tiled.match(q[:, 0])
    print(compiled.count("cubin"))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
