"""The kernels alone, beside what PyTorch has for the same: yields nothing yet."""

from __future__ import annotations

from benchmarks.gpu.driver import Jobs, Setup


def kernels(setup: Setup) -> Jobs:
    yield from ()
