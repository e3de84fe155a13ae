"""Clips as the calls in which a model reads them, all of one shape."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tldr_compile.errors import OptionError

Clips: TypeAlias = "Tensor | Sequence[Tensor | tuple[Any, ...]]"


class Call(NamedTuple):
    """The arguments of one call, and how many of its clips count: the last call may be filled up."""

    args: tuple[Any, ...]
    clips: int


def calls_of(clips: Clips, batch: int) -> list[Call]:
    """Clips `[K, ...]` in calls of `batch`; of a sequence each entry is a call: a tensor `[B, ...]`, or arguments.

    Raises OptionError for less than two calls, or clips of several shapes: half of them choose, the others report.
    """
    if not isinstance(clips, Iterable):
        raise OptionError(f"clips= is {type(clips).__name__}: give a tensor [K, ...], or a sequence of calls")
    if isinstance(clips, Tensor):
        calls = _batched(clips, min(batch, max(1, len(clips) // 2))) if len(clips) else []
    else:
        calls = [_call(each) for each in clips]
    shapes = {tuple(_shape(each) for each in pytree.tree_leaves(call.args)) for call in calls}
    if len(shapes) > 1:
        told = " and ".join(map(str, sorted(shapes, key=str)[:2]))
        raise OptionError(f"clips= holds calls of several shapes, {told}: resize the clips to one, or tune each apart")
    if len(calls) < 2:
        raise OptionError(
            f"clips= holds {'one clip' if calls else 'no clip'}: at least two are needed, one to choose by and one to "
            "report on, and some hundreds for a choice that can be told from chance"
        )
    return calls


def digest(values: Iterable[Any]) -> str:
    """Of tensors by their bytes, of anything else by how it is written: other values give another."""
    found = hashlib.sha256()
    for each in values:
        if isinstance(each, Tensor):
            found.update(f"{each.dtype} {list(each.shape)}".encode())
            found.update(each.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(each).encode())
    return found.hexdigest()[:16]


def _batched(clips: Tensor, batch: int) -> list[Call]:
    calls = []
    for some in clips.split(batch):
        missing = batch - len(some)
        calls.append(Call((torch.cat([some, *[some[-1:]] * missing]),), len(some)))
    return calls


def _call(given: Tensor | tuple[Any, ...]) -> Call:
    args = given if isinstance(given, tuple) else (given,)
    leaves = pytree.tree_leaves(args) if isinstance(given, tuple | Tensor) else []
    first = next((each for each in leaves if isinstance(each, Tensor) and each.dim() > 0), None)
    if first is None:
        raise OptionError(f"clips= holds {type(given).__name__} without a tensor: give tensors [B, ...], or tuples")
    return Call(args, len(first))


def _shape(value: Any) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else repr(value)
