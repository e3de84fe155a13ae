"""Which line of the user's own source a node or an exception comes from."""

from __future__ import annotations

import os
import sysconfig
import traceback

import torch
from torch import fx

_TORCH = os.path.dirname(torch.__file__) + os.sep


def line_of(node: fx.Node) -> str | None:
    """The innermost line of the user's code that the tracer noted for a node, or else its module; None without either.

    `"model.py", line 80, in forward`.
    """
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    places = [line.removeprefix("File ") for line in lines if line.startswith('File "') and 'File "<' not in line]
    users = [place for place in places if not place.startswith(f'"{_TORCH}')]
    if places:
        return (users or places)[-1]
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    return f"in {modules[-1][0] or modules[-1][1]}" if modules else None


def where(node: fx.Node) -> str:
    """A node by name, with its line."""
    line = line_of(node)
    return f"{node.name} ({line})" if line else node.name


def raised_at(reason: BaseException) -> str:
    """The innermost line of the user's code that an exception came through; nothing if there is none."""
    frames = traceback.extract_tb(reason.__traceback__)[1:]  # the first is whoever caught it
    users = [frame for frame in frames if not frame.filename.startswith((_TORCH, "<")) and not _is_pythons(frame)]
    return f'"{users[-1].filename}", line {users[-1].lineno}, in {users[-1].name}' if users else ""


def _is_pythons(frame: traceback.FrameSummary) -> bool:
    return frame.filename.startswith(sysconfig.get_path("stdlib")) and "site-packages" not in frame.filename
