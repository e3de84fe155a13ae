"""What was measured so far, in a folder that an interrupted run goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from tldr_compile.config import TokenMerging
from tldr_compile.errors import OptionError
from tldr_compile.records.outputs import check_folder
from tldr_compile.tuning.answers import Far

FILE = "measured.jsonl"

Solved = tuple[float, float]
"""The fraction that meets a budget, and the part of the dense operations that merging by it costs."""


class Store:
    """Answers by configuration and call, and fractions by way and budget; lines of JSON where there is a folder."""

    def __init__(self, folder: Path | None, about: Mapping[str, Any]) -> None:
        """`about`: the model, the clips and the objective, which the folder has to be of.

        Raises OptionError for a folder that is of others, that another run writes to, or that takes no files.
        """
        self._known: dict[tuple[str, int], Far] = {}
        self._solved: dict[tuple[str, tuple[float, ...], float], Solved] = {}
        self._file = None
        if folder is None:
            return
        check_folder("folder", folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise OptionError(f"{folder} is in use by another run: wait for it, or give another folder") from None
        path = folder / FILE
        try:
            if path.exists():
                self._read(path, about)
        except OptionError:
            self._lock.release()
            raise
        self._file = path.open("a", encoding="utf-8")
        if path.stat().st_size == 0:
            self._write(dict(about))

    def has(self, config: TokenMerging, call: int) -> bool:
        return (_key(config), call) in self._known

    def get(self, config: TokenMerging, call: int) -> Far:
        return self._known[_key(config), call]

    def put(self, config: TokenMerging, call: int, far: Far) -> None:
        self._known[_key(config), call] = far
        values = {"distance": far.distance.tolist(), "same": far.same.tolist()}
        self._write({"config": _key(config), "call": call, **values})

    def solved(self, options: TokenMerging, weights: tuple[float, ...], budget: float) -> Solved | None:
        return self._solved.get((_key(options), weights, budget))

    def put_solved(self, options: TokenMerging, weights: tuple[float, ...], budget: float, solved: Solved) -> None:
        self._solved[_key(options), weights, budget] = solved
        self._write({"options": _key(options), "weights": weights, "budget": budget, "solved": solved})

    def close(self) -> None:
        """Another run may use the folder from here on."""
        if self._file is not None:
            self._file.close()
            self._lock.release()

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def _read(self, path: Path, about: Mapping[str, Any]) -> None:
        lines = path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # the run was cut there
            os.truncate(path, sum(map(len, lines[:-1])))
            lines.pop()
        for number, text in enumerate(lines):
            try:
                line = json.loads(text)
                if number == 0:
                    _check_about(path, line, about)
                elif "solved" in line:
                    fraction, part = map(float, line["solved"])
                    self._solved[line["options"], tuple(line["weights"]), line["budget"]] = fraction, part
                else:
                    far = Far(torch.tensor(line["distance"]), torch.tensor(line["same"]))
                    self._known[line["config"], line["call"]] = far
            except (ValueError, KeyError, TypeError, AttributeError):  # no JSON, or JSON of something else
                raise OptionError(f"{path} is damaged in line {number + 1}: remove it to start anew") from None


def _check_about(path: Path, found: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    for name, value in about.items():
        if found.get(name) != value:
            raise OptionError(
                f"{path} was made with {name} {found.get(name)!r}, and this run has {value!r}: give another folder, or "
                "remove that file to start anew"
            )


def _key(config: TokenMerging) -> str:
    """Fields at their default are left out, so that an option that a later version adds changes no key."""
    default = asdict(TokenMerging())
    return json.dumps({name: value for name, value in asdict(config).items() if value != default[name]}, sort_keys=True)
