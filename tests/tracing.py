"""Small functions as captured graphs, quickly: for tests of one pass, where a whole capture would say nothing more."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from tldr_compile.passes.capture.canonicalize import Captured, from_dynamo
from tldr_compile.passes.fx_utils import operator_name


def captured(function: Callable[..., Any], *inputs: Tensor, mode: Literal["fake", "symbolic"] = "fake") -> Captured:
    """`function` of `inputs` in pre-dispatch ATen; tensors that it closes over are constants."""

    def flat(*arguments: Tensor) -> tuple[Any, ...]:
        return tuple(pytree.tree_leaves(function(*arguments)))

    graph = make_fx(flat, pre_dispatch=True, tracing_mode=mode, _allow_non_fake_inputs=True)(*inputs)
    return Captured(graph, frozenset(), {})


def canonical(function: Callable[..., Any], *inputs: Tensor) -> Captured:
    """The same in the one dialect, as every capture is."""
    mode = FakeTensorMode()
    return from_dynamo(captured(function, *inputs).graph, [mode.from_tensor(each) for each in inputs])


def number(*shape: int, seed: int = 0) -> Tensor:
    """Random entries; the same for the same shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + math.prod(shape)))


def named(graph: fx.Graph, name: str) -> list[fx.Node]:
    """The calls of an ATen operator, overloads alike."""
    return [node for node in graph.nodes if operator_name(node) == f"aten::{name}"]
