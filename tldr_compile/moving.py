"""A merged graph where its module is moved to: another device, another dtype."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensorMode

from tldr_compile import ops
from tldr_compile.errors import CaptureError
from tldr_compile.passes.sources import where

Casts = Mapping[torch.dtype, torch.dtype]
"""Floating-point dtypes and what they become."""


aten = torch.ops.aten

# Fake tensors do not tell that these take operands of one dtype.
_OF_ONE_DTYPE = frozenset(
    {
        torch.nn.functional.linear,
        aten.linear.default,
        aten.matmul.default,
        aten.bmm.default,
        aten.mm.default,
        aten.addmm.default,
        aten.baddbmm.default,
        aten.convolution.default,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        aten.scaled_dot_product_attention.default,
        ops.attend,
        ops.attend_and_sharpness,
    }
)


def casts(fn: Callable[[Tensor], Tensor], tensors: Iterable[Tensor]) -> Casts:
    """What `fn`, which moves a module's tensors, makes of their dtypes, where that is another."""
    found = {each.dtype: each.device for each in tensors if each.is_floating_point()}
    made = {dtype: fn(torch.empty(0, dtype=dtype, device=device)).dtype for dtype, device in found.items()}
    return {dtype: new for dtype, new in made.items() if new != dtype}


def check(graph: fx.GraphModule, dtypes: Casts) -> None:
    """Raise `CaptureError` where a graph does not run with inputs and parameters of these dtypes; nothing is computed.

    What the model was told to compute in a dtype, and what it makes by itself, stays in that.
    """
    placeholders = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    mode = detect_fake_mode(placeholders)
    env = None if mode is None else mode.shape_env
    with FakeTensorMode(shape_env=env, allow_non_fake_inputs=True), torch.no_grad(), _unlogged():
        _Trial(graph, dtypes).run(*(_cast(each, dtypes) for each in placeholders))


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keep torch from logging the traceback of what fails with fake tensors: `check` says it."""
    log = logging.getLogger(FakeTensorMode.__module__)
    log.addFilter(_is_no_traceback)
    try:
        yield
    finally:
        log.removeFilter(_is_no_traceback)


def _is_no_traceback(record: logging.LogRecord) -> bool:
    return record.exc_info is None


def _cast(value: Any, dtypes: Casts) -> Any:
    if not isinstance(value, Tensor):
        return value
    dtype = dtypes.get(value.dtype, value.dtype)
    return torch.empty_strided(value.shape, value.stride(), dtype=dtype, device=value.device)


def retype(graph: fx.GraphModule, dtypes: Casts) -> None:
    """Note what inputs and parameters are now: the next `check` begins there."""
    for node in graph.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if isinstance(value, Tensor) and value.dtype in dtypes:
            node.meta["val"] = value.to(dtypes[value.dtype])


class _Trial(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, dtypes: Casts) -> None:
        super().__init__(graph)
        self.dtypes = dtypes
        self.extra_traceback = False

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        dtypes = {each.dtype for each in args if isinstance(each, Tensor) and each.is_floating_point()}
        if target in _OF_ONE_DTYPE and len(dtypes) > 1:
            raise RuntimeError(f"{target.__name__} of {' and '.join(sorted(map(str, dtypes)))}")
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except RuntimeError as reason:
            first, *_ = str(reason).splitlines()
            moves = ", ".join(f"{old} to {new}" for old, new in self.dtypes.items())
            raise CaptureError(
                f"the model was captured in other dtypes, and its graph does not run when they go from {moves}: "
                f"{where(n)}: {first}. Move the model itself (model.to(dtype)) and apply tldr_compile to that"
            ) from reason


def move(graph: fx.GraphModule, before: torch.device, after: torch.device) -> None:
    """Let what `graph` makes by itself (position ids, tables) be born on the new device, where strides may differ."""

    def moved(value: Any) -> Any:
        return after if value == before and isinstance(value, torch.device) else value

    for node in graph.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, moved)
        node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
        if node.op == "get_attr":
            setattr(graph, node.target, getattr(graph, node.target).to(after))
    graph.recompile()
