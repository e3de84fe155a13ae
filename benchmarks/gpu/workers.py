"""Rows of models, each in a process of its own: all of them compile at once, and then each is timed while others wait.

Compiling takes most of the time that a GPU is at hand, and runs on one core of many.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import timing
from benchmarks.gpu.load import Load, call_of
from benchmarks.gpu.profiles import Profile, profile_of
from benchmarks.speed import Setting, leading

T = TypeVar("T")


class WorkerError(Exception):
    """What a request raised in its process."""


class Row:
    """Lives in its process: a model, and the calls of one row that are compiled."""

    def __init__(self, model: str, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self._setting = Load(model, 1).setting(device)
        self._calls: dict[Load, timing.Call] = {}

    def compile(self, load: Load) -> dict[str, Any]:
        """Seconds of the first call, bytes that a later one holds, which operators attend, and the output."""
        with load.running():
            setting = Setting(self._setting.model, self._setting.schedule, load.inductor)
            call = call_of(setting, load.inputs(self.device), self.name)
            first = timing.seconds(call, self.device)
            attention = attention_calls(call)
            output = leading(call()).float().cpu().numpy()
            peak = timing.peak_bytes(call, self.device)
        self._calls[load] = call
        self.release()
        return {"first_call": first, "peak_bytes": peak, "attention": attention, "output": output}

    def seconds(self, load: Load, count: int) -> float:
        """Of one call, the mean of `count`, after one that is not counted."""
        call = self._calls[load]
        with load.running():
            call()
            return timing.device_seconds(partial(timing.repeat, call, count), self.device) / count

    def profile(self, load: Load, calls: int) -> Profile:
        with load.running():
            return profile_of(self._calls[load], self.device, calls=calls)

    def release(self) -> None:
        """Give back the memory that only this process could use again."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def weight_bytes(self) -> int:
        return sum(value.nbytes for value in self._setting.model.parameters())


def serve(connection: Connection, model: str, name: str, device: torch.device) -> None:
    """Answer requests, methods of `Row` by name, until there are no more."""
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # there is a process for every core
    torch._dynamo.config.automatic_dynamic_shapes = False  # a second batch is compiled as a user's first one is
    row: Row | None = None
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            row = row or Row(model, name, device)
            connection.send((True, getattr(row, method)(*arguments)))
        except Exception as error:  # noqa: BLE001 - told to who asked
            connection.send((False, f"{type(error).__name__}: {error}"[:500]))


class Worker:
    """A row's process, seen from the one that asks."""

    def __init__(self, model: str, row: str, device: torch.device) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=serve, args=(there, model, row, device), daemon=True)
        self._process.start()
        there.close()
        self._compiled: dict[Load, dict[str, Any]] = {}
        self._asked: list[Load] = []
        self.stopped = False

    def begin(self, load: Load) -> None:
        """Have the load compiled, if nobody has asked for it before."""
        if load not in self._asked and not self.stopped:
            self._asked.append(load)
            self._connection.send(("compile", (load,)))

    def compiled(self, load: Load, wait: float) -> dict[str, Any]:
        """What `Row.compile` tells. Raises TimeoutError after `wait` seconds, and `WorkerError`."""
        self.begin(load)
        if self.stopped:
            raise TimeoutError("its process was stopped")
        if load not in self._compiled:
            self._compiled[load] = self._answer(wait)
        return self._compiled[load]

    def ask(self, method: Callable[..., T], *arguments: Any, wait: float) -> T:
        """The result of a method of `Row`; raises as `compiled`, which comes first."""
        self._connection.send((method.__name__, arguments))
        answer: T = self._answer(wait)
        return answer

    def stop(self) -> None:
        """End the process in whatever it does."""
        self.stopped = True
        self._process.kill()
        self._process.join()

    def _answer(self, wait: float) -> Any:
        if not self._connection.poll(max(0.0, wait)):
            raise TimeoutError(f"no answer in {wait:.0f} s")
        try:
            fine, answer = self._connection.recv()
        except EOFError:
            raise WorkerError(f"its process ended with {self._process.exitcode}") from None
        if not fine:
            raise WorkerError(answer)
        return answer


class Workers:
    """One for every row of every model, from when it is first asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._workers: dict[tuple[str, str], Worker] = {}

    def of(self, load: Load, row: str) -> Worker:
        key = load.model, row
        if key not in self._workers:
            self._workers[key] = Worker(*key, self._device)
        return self._workers[key]

    def begin(self, load: Load) -> None:
        for row in load.rows:
            self.of(load, row).begin(load)

    def stop(self) -> None:
        for worker in self._workers.values():
            worker.stop()


def attention_calls(call: timing.Call) -> dict[str, int]:
    """How often one call asks each operator for attention; none in the replay of a CUDA graph."""
    with profile(activities=[ProfilerActivity.CPU]) as run:
        call()
    return {
        event.key: event.count
        for event in run.key_averages()
        if event.key.startswith(("tldr::", "aten::_scaled_dot_product"))
    }


def difference(found: np.ndarray, first: np.ndarray) -> float:
    """Largest difference as a part of the largest magnitude."""
    return float(np.abs(found - first).max() / np.abs(first).max())
