"""Law 11: the report tells what the emitted graph does, and its numbers are those counted while it runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from tldr_compile import MergedModule, ops

MERGING = {name: getattr(ops, name) for name in ("group", "up", "down", "pick")}
VIEWS = ("reshape", "view", "permute", "transpose", "expand", "unsqueeze", "squeeze", "contiguous", "clone")
"""What lays a tensor otherwise and keeps its entries."""


def unaccounted(merged: MergedModule) -> list[str]:
    """Where the report and the emitted graph differ."""
    graph, report = merged.graph_module.graph, merged.report
    done = [site for site in report.sites if site["status"] == "merged"]
    told = {
        "groupings": (len(done), len(calls(graph, "group"))),
        "restorations": (restorations_told(merged), len(restorations(graph))),
        # A report that lists merges and picks is held to them; one that does not yet, is not.
        **{
            name: (len(getattr(report, name)), len(calls(graph, operator)))
            for name, operator in (("merges", "down"), ("picks", "pick"))
            if hasattr(report, name)
        },
    }
    wrong = [
        f"{name}: {said} in the report, {found} in the graph" for name, (said, found) in told.items() if said != found
    ]
    removed = [site["tokens_in"] - site["tokens_out"] for site in done]
    if any(number <= 0 for number in removed):
        wrong.append(f"a merged site removes no token: {removed}")
    return wrong


def calls(graph: fx.Graph, name: str) -> list[fx.Node]:
    """The calls of one of our operators, as a function or as a registered operator."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_function" and (node.target is MERGING[name] or _registered(node.target) == f"tldr::{name}")
    ]


def restorations(graph: fx.Graph) -> list[fx.Node]:
    """Where values get their full length back: each call of `up` but those that restore weights.

    A matrix over pairs of tokens takes two calls with one grouping: it is one restoration.
    """
    found = calls(graph, "up")
    second = [
        node for node in found if _source(node.args[0]) in found and _index(_source(node.args[0])) == _index(node)
    ]
    return [node for node in found if node not in second and not _is_weight(node.args[0])]


def restorations_told(merged: MergedModule) -> int:
    """By the report: a value that several operators read is restored once, along each of its runs."""
    readers: dict[str, Counter[str]] = {}
    for each in merged.report.restorations:
        readers.setdefault(each["value"], Counter())[each["node"]] += 1
    return sum(max(times.values()) for times in readers.values())


def _registered(target: Any) -> str:
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else ""


def _source(node: Any) -> Any:
    """The value that views lay otherwise."""
    while isinstance(node, fx.Node) and _registered(node.target).removeprefix("aten::") in VIEWS:
        node = node.args[0]
    return node


def _index(up: fx.Node) -> Any:
    return _source(up.args[1])


def _is_weight(node: Any) -> bool:
    """Whether a value is made of what groupings told, and of nothing that the model computed."""
    groupings = set(calls(node.graph, "group"))
    seen: set[fx.Node] = set()
    front = [node]
    while front:
        each = front.pop()
        if each in groupings or each in seen:
            continue
        seen.add(each)
        if each.op == "placeholder" or each.target in MERGING.values():
            return False
        front += each.all_input_nodes
    return any(each.target is getitem and each.args[0] in groupings for each in seen)


# --- floating-point operations, counted while a model runs ---


class Counting(TorchDispatchMode):
    """Counts two per multiplication and addition of matrix products, convolutions and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (cost := COSTS.get(func._schema.name.split("::")[1])) is not None:
            self.total += 2 * cost(out, *args)
        return out


def _product(left: Tensor, right: Tensor) -> int:
    return left.numel() * right.shape[-1]


def _attention(q: Tensor, k: Tensor, v: Tensor) -> int:
    return math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])


COSTS: dict[str, Callable[..., int]] = {
    "mm": lambda out, a, b, *_: _product(a, b),
    "bmm": lambda out, a, b, *_: _product(a, b),
    "addmm": lambda out, bias, a, b, *_: _product(a, b),
    "baddbmm": lambda out, bias, a, b, *_: _product(a, b),
    "convolution": lambda out, x, weight, *_: out.numel() * math.prod(weight.shape[1:]),
    "_scaled_dot_product_flash_attention_for_cpu": lambda out, q, k, v, *_: _attention(q, k, v),
    "attend": lambda out, q, k, v, *_: _attention(q, k, v),
    "attend_and_sharpness": lambda out, q, k, v, *_: _attention(q, k, v),
    "received": lambda out, q, k, *_: _attention(q, k, k[..., :0]),
    "best": lambda out, sources, destinations: _product(sources, destinations.mT),
    "energy": lambda out, metric, margin: _product(metric, metric.mT[..., 1:]) // 2,  # every pair once
    "affinity": lambda out, metric: _product(metric, metric.mT),
}


@torch.no_grad()
def gflops(model: Callable[..., Any], args: tuple[Any, ...]) -> float:
    with Counting() as counting:
        model(*args)
    return counting.total / 1e9


def miscounted(dense: Callable[..., Any], merged: MergedModule, args: tuple[Any, ...]) -> list[str]:
    """Where the report's floating-point operations are not those that run."""
    pairs = zip(("before", "after"), merged.report.gflops, (gflops(dense, args), gflops(merged, args)), strict=True)
    return [
        f"GFLOPs {when}: {told:.6g} in the report, {found:.6g} counted"
        for when, told, found in pairs
        if not math.isclose(told, found, rel_tol=1e-9)
    ]


def dearer(merged: MergedModule) -> Iterator[str]:
    """Whether a plan that nobody wrote down costs more than the dense graph."""
    before, after = merged.report.gflops
    if after > before:
        yield f"GFLOPs {before:.6g} -> {after:.6g} ({after / before:.1%})"
