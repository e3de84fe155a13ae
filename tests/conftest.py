"""What every test starts from: a fixed seed, nothing compiled or registered by another test, one thread per worker."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Tracing a model takes seconds and varies with the machine: a deadline would only make tests flaky.
settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")

torch.set_num_threads(1)

# Without a GPU, Triton's kernels are interpreted: whatever imports triton first decides that for the whole process.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Triton has wheels for Linux alone.
collect_ignore = [] if sys.platform == "linux" else ["ops/test_triton.py"]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    from tldr_compile import ops  # noqa: PLC0415  It imports triton.

    torch.manual_seed(0)
    registries = (ops.SIGNALS, ops.METRICS, ops.REDUCTIONS)
    before = [dict(registry) for registry in registries]
    yield
    torch.compiler.reset()
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)
