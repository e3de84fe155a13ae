"""Judge many encoders, each in a process of its own that can crash or hang without harm to the rest."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import IO

import torch

from tests.conformance.encoders import Encoder
from tests.conformance.verdict import CRASHED, NOT_BUILT, Record

BUILDING = "building it"
MEMORY = 12 * 2**30  # bytes of address space of a process

Judge = Callable[[Encoder, Callable[[str], None]], Record]


@dataclass
class _Running:
    """A process that judges an encoder."""

    encoder: Encoder
    process: ForkProcess
    reader: Connection
    complaints: IO[str]
    started: float = field(default_factory=time.monotonic)
    stage: str = BUILDING

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


def walk(encoders: Sequence[Encoder], judge: Judge, *, jobs: int, limit: float) -> Iterator[Record]:
    """The records of all encoders as they come, `jobs` at a time, for at most `limit` seconds each.

    The processes are forks of this one: what it has imported they need not import.
    """
    torch.set_num_threads(1)  # also because a fork has no threads
    waiting, running = list(reversed(encoders)), list[_Running]()
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_start(waiting.pop(), judge))
        wait([each.reader for each in running], timeout=1.0)
        for each in list(running):
            record = _look(each, limit)
            if record is not None:
                running.remove(each)
                each.complaints.close()
                yield record | {"seconds": round(each.seconds, 1)}


def _start(encoder: Encoder, judge: Judge) -> _Running:
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open for as long as the process runs
    process = context.Process(target=_child, args=(encoder, judge, writer, complaints.fileno()), daemon=True)
    process.start()
    writer.close()
    return _Running(encoder, process, reader, complaints)


def _child(encoder: Encoder, judge: Judge, writer: Connection, complaints: int) -> None:
    os.dup2(complaints, sys.__stderr__.fileno() if sys.__stderr__ else 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stderr = os.fdopen(2, "w")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    writer.send(judge(encoder, writer.send))


def _look(running: _Running, limit: float) -> Record | None:
    """The record if there is one by now: the process's own, or that it ended or was stopped without one."""
    facts: Record = running.encoder.facts
    try:
        while running.reader.poll():
            said = running.reader.recv()
            if not isinstance(said, str):
                running.process.join()
                return said
            running.stage = said
    except EOFError:
        running.process.join()
        return facts | {"verdict": CRASHED, "reason": f"{running.stage}: {_complaint(running)}"}
    if running.seconds < limit:
        return None
    running.process.kill()
    running.process.join()
    verdict = NOT_BUILT if running.stage == BUILDING else CRASHED
    return facts | {"verdict": verdict, "reason": f"{running.stage}: not done in {limit:g} seconds"}


def _complaint(running: _Running) -> str:
    """What a process said last: the exception of a traceback, or how it was killed."""
    code = running.process.exitcode or 0
    if code < 0:
        return f"killed by signal {-code}"
    running.complaints.seek(0)
    text = running.complaints.read().rpartition("Traceback (most recent call last):")[2]
    lines = [line for line in text.splitlines() if line and not line.startswith("  ")]
    return " ".join(lines) or f"it ended with {code}"
