"""Compile in many processes ahead of time, so that the process that measures finds all code in the caches on disk.

The processes compile by the very path that is measured, and stop short of running what they compiled: memory and the
chip are left to the process that measures, and no kernel is tuned on a chip that others use.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.pool import AsyncResult
from unittest import mock

import torch
import torch._inductor.config
from torch._inductor.output_code import CompiledFxGraph

from benchmarks.gpu.load import Load, call_of
from tldr_compile import ops


class Warm:
    """A pool of processes that compile the rows of loads, in their order."""

    def __init__(
        self, loads: Sequence[Load], device: torch.device, *, processes: int, until: float, fresh: bool
    ) -> None:
        self._until = until
        self._pool = multiprocessing.get_context("spawn").Pool(processes, _alone, (fresh,))
        self._results: dict[tuple[Load, str], AsyncResult[float]] = {
            (load, row): self._pool.apply_async(compile_row, (load, row, device)) for load in loads for row in load.rows
        }

    def wait(self) -> dict[str, float | str | None]:
        """Return when none of the processes runs: all is compiled, or it is `until` (of `time.monotonic`).

        Seconds of every row; None of what was stopped; the error of what raised.
        """
        for result in self._results.values():
            result.wait(max(0.0, self._until - time.monotonic()))
        self.stop()
        return {f"{load.name}, {row}": _told(result) for (load, row), result in self._results.items()}

    def stop(self) -> None:
        """End all processes, also those in the middle of something."""
        self._pool.terminate()
        self._pool.join()

    def has(self, load: Load) -> bool:
        """Whether all rows are compiled."""
        results = [self._results[load, row] for row in load.rows]
        return all(result.ready() and result.successful() for result in results)


@contextmanager
def fresh_caches() -> Iterator[None]:
    """Caches on disk for this process and those that it starts: what they hold was compiled from the code as it is."""
    with tempfile.TemporaryDirectory() as folder:
        places = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
        with mock.patch.dict(os.environ, places):
            trust_operators()
            yield


def trust_operators() -> None:
    """Let AOTAutograd's cache take graphs that call our operators: it knows no Python functions but torch's.

    Their names do not tell when their code changes, so this is for fresh caches alone.
    """
    functions = (getattr(ops, name) for name in ops.__all__)
    names = {f"{function.__module__}.{function.__name__}": "fresh" for function in functions if callable(function)}
    torch._inductor.config.unsafe_marked_cacheable_functions = names


def compile_row(load: Load, row: str, device: torch.device) -> float:
    """Seconds that Dynamo, the backend and Inductor take; nothing runs."""
    torch._dynamo.reset()
    with load.running():
        call = call_of(load.setting(device), load.inputs(device), row)
        start = time.perf_counter()
        with mock.patch.object(CompiledFxGraph, "__call__", _stop):
            try:
                call()
            except Compiled:
                taken = time.perf_counter() - start
            else:
                raise RuntimeError(f"{row} ran without compiled code")
    del call
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return taken


class Compiled(Exception):
    """Raised in place of the first run of compiled code."""


def _stop(graph: CompiledFxGraph, inputs: object) -> None:
    raise Compiled


def _alone(fresh: bool) -> None:
    """There is a process for every core: their compilers need no processes of their own."""
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1
    if fresh:
        trust_operators()


def _told(result: AsyncResult[float]) -> float | str | None:
    if not result.ready():
        return None
    try:
        return result.get()
    except Exception as error:  # noqa: BLE001 - told, and the row compiles anew where it is measured
        return f"{type(error).__name__}: {error}"[:300]
