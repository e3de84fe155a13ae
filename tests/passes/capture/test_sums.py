"""Sums in disguise: each is said in sums, means and softmax, and gives what the operator gives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from tests.tracing import canonical, named, number
from tldr_compile.passes.capture.attention import SDPA, fuse
from tldr_compile.passes.capture.canonicalize import Captured, from_export
from tldr_compile.passes.capture.sums import DECOMPOSITIONS
from tldr_compile.passes.fx_utils import operator_name
from tldr_compile.passes.sizes import size

aten = torch.ops.aten
Function = Callable[[Tensor], Any]
X = number(3, 4, 5, 6)
DIMS = (1, (0, -2), (1, 2, 3), None)

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)


def written(x: Tensor, dim: int, highest: Function | None = None) -> Tensor:
    powers = (x - highest(x) if highest else x).exp()
    return powers / powers.sum(dim, keepdim=True)


def total_put_back(x: Tensor) -> Tensor:
    powers = (x - x.amax(1).unsqueeze(1)).exp()
    return powers / powers.sum(1).unsqueeze(1).expand_as(powers)


def by_reciprocal(x: Tensor) -> Tensor:
    powers = x.exp()
    return powers.sum(-1, keepdim=True).reciprocal() * powers


def every(function: Callable[..., Any], **choices: Sequence[Any]) -> Function:
    """A function with all combinations of some options."""
    options = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    return lambda x: [function(x, **each) for each in options]


MOMENTS: dict[str, Function] = {
    **{
        f.__name__: every(f, dim=DIMS, correction=(0, 1, 2.5), keepdim=(False, True))
        for f in (torch.var, torch.std, torch.var_mean, torch.std_mean)
    },
    "var of everything": lambda x: x.var(),
    "var, unbiased": lambda x: (aten.var.dim(x, [1]), aten.var.dim(x, [1], False, True), aten.var.default(x, False)),
    "std, unbiased": lambda x: (aten.std.dim(x, [1], False), aten.std.default(x)),
    "no dimensions are all": lambda x: aten.var.dim(x, []),
    "fewer entries than the correction": lambda x: (x.var(1, correction=9), x.std(1, correction=4)),
    "of one entry": lambda x: x[:, :1].var(1),
}
NORMS: dict[str, Function] = {
    "vector norm": every(torch.linalg.vector_norm, ord=(1, 2, math.inf), dim=DIMS, keepdim=(False, True)),
    "norm": lambda x: (x.norm(), x.norm(dim=1), x.norm(1, dim=(1, 2), keepdim=True)),
    "norm of ATen": lambda x: (aten.norm.Scalar(x), aten.norm.ScalarOpt_dim(x, None, [1]), aten.norm.Scalar(x, 1)),
    "linalg": lambda x: (torch.linalg.norm(x), torch.linalg.norm(x, 1, dim=1), torch.linalg.norm(x, dim=(1, 2))),
    "normalized": lambda x: F.normalize(x, dim=1),
    "norm of large numbers": lambda x: (torch.linalg.vector_norm(x * 300, 2, 1), (x * 300).std(1)),
    "norm in another dtype": lambda x: torch.linalg.vector_norm(x, 2, 1, dtype=torch.float64),
}
EXPONENTIALS: dict[str, Function] = {
    "logsumexp": lambda x: (x.logsumexp(1), x.logsumexp((0, -1), keepdim=True)),
    "logsumexp of large numbers": lambda x: (x * 1000).logsumexp(1),
    "logsumexp of nothing": lambda x: (
        x.masked_fill(x > x[:1], -torch.inf)[:1].masked_fill(x == x, -torch.inf).logsumexp(1)
    ),
    "logsumexp of infinity": lambda x: x.masked_fill(x > 0, torch.inf).logsumexp(1),
    "log_softmax": lambda x: (x.log_softmax(1), F.log_softmax(x * 1000, -1), x.log_softmax(0, torch.float64)),
    "_log_softmax": lambda x: aten._log_softmax.default(x, 2, False),
    "softmax": lambda x: written(x, 1),
    "softmax, highest": lambda x: written(x, -1, lambda x: x.amax(-1, keepdim=True)),
    "softmax, highest of max": lambda x: written(x, 2, lambda x: x.max(2, keepdim=True)[0]),
    "softmax, highest cut off": lambda x: written(x, 2, lambda x: x.detach().amax(2, keepdim=True).detach()),
    "softmax, total put back": total_put_back,
    "softmax by a reciprocal": by_reciprocal,
    "softmax, the highest of all": lambda x: written(x, 1, lambda x: x.max()),
}
COUNTS: dict[str, Function] = {
    "count_nonzero": lambda x: ((x > 0).count_nonzero(), x.count_nonzero(1), x.relu().count_nonzero((0, -1))),
}
POOLS: dict[str, Function] = {
    "adaptive": lambda x: (
        F.adaptive_avg_pool1d(x[0], 1),
        F.adaptive_avg_pool2d(x, 1),
        F.adaptive_avg_pool3d(x, 1),
        F.adaptive_avg_pool3d(x, (None, 1, 1)),
        aten._adaptive_avg_pool2d.default(x, [1, 6]),
    ),
    "whole": lambda x: (
        F.avg_pool1d(x[0], 6),
        F.avg_pool2d(x, (5, 6)),
    ),
    "whole volume": lambda x: F.avg_pool3d(x, (4, 1, 6), stride=1),
}
DECOMPOSED = {**MOMENTS, **NORMS, **EXPONENTIALS, **COUNTS, **POOLS}


def said(function: Function, x: Tensor = X) -> fx.GraphModule:
    return fuse(canonical(function, x))[0].graph


def names(graph: fx.GraphModule) -> set[str]:
    return {operator_name(node) for node in graph.graph.nodes if node.op == "call_function"}


def assert_is(given: Any, wanted: Any, dtype: torch.dtype) -> None:
    exact = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}[dtype]
    for one, other in zip(given, pytree.tree_leaves(wanted), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        torch.testing.assert_close(one, other, rtol=exact, atol=exact, equal_nan=True)


@every_dtype
@pytest.mark.parametrize("function", DECOMPOSED.values(), ids=list(DECOMPOSED))
@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_gives_what_the_operator_gives(function: Function, dtype: torch.dtype) -> None:
    x = X.to(dtype)
    if dtype.itemsize == 2 and function in (NORMS["norm in another dtype"], POOLS["whole volume"]):
        pytest.skip("the operator has no such kernel")
    graph = said(function, x)
    left = names(graph) & (set(DECOMPOSITIONS) - {"aten::div", "aten::mul", "aten::true_divide"})
    assert not left
    assert_is(graph(x), function(x), dtype)
    for node in graph.graph.output_node().all_input_nodes:
        assert isinstance(node.meta["val"], Tensor)


@pytest.mark.parametrize("name", [name for name in EXPONENTIALS if name.startswith("softmax")])
def test_a_softmax_that_is_written_out_is_one(name: str) -> None:
    graph = said(EXPONENTIALS[name])
    assert len(named(graph.graph, "softmax")) == 1
    assert not names(graph) & {"aten::exp", "aten::div", "aten::mul", "aten::sum"}
    assert ("aten::sub" in names(graph)) == (name == "softmax, the highest of all")


LEFT: dict[str, tuple[Function, str]] = {
    "another norm": (lambda x: torch.linalg.vector_norm(x, 3, 1), "linalg_vector_norm"),
    "no norm": (lambda x: torch.linalg.vector_norm(x, 0, 1), "linalg_vector_norm"),
    "norm of a matrix": (lambda x: torch.linalg.norm(x, 1, dim=(1, 2)), "linalg_norm"),
    "complex numbers": (lambda x: torch.view_as_complex(x[..., :2]).var(1), "var"),
    "a pool to a grid": (lambda x: F.adaptive_avg_pool2d(x, (1, 3)), "adaptive_avg_pool2d"),
    "a pool of windows": (lambda x: F.avg_pool2d(x, (5, 3)), "avg_pool2d"),
    "a pool that leaves some out": (lambda x: F.avg_pool2d(x, (4, 6)), "avg_pool2d"),
    "a pool of every other": (lambda x: F.avg_pool2d(x, (5, 1), stride=(1, 6)), "avg_pool2d"),
    "a pool of more than there is": (lambda x: F.avg_pool2d(x, (5, 6), padding=(1, 1), stride=9), "avg_pool2d"),
    "a pool with its own divisor": (lambda x: F.avg_pool2d(x, (5, 6), divisor_override=7), "avg_pool2d"),
    "a total of something else": (lambda x: x.exp() / (x + 1).exp().sum(1, keepdim=True), "div"),
    "a total over two dimensions": (lambda x: (e := x.exp()) / e.sum((1, 2), keepdim=True), "div"),
    "a total that is put elsewhere": (lambda x: (e := x[:, :3, :3].exp()) / e.sum(1).unsqueeze(2), "div"),
    "a total with something beside": (lambda x: (e := x.exp()) / (e.sum(1, keepdim=True) + 1), "div"),
    "a quotient of powers to base two": (lambda x: (e := x.exp2()) / e.sum(1, keepdim=True), "div"),
    "a quotient that is rounded": (
        lambda x: torch.div(e := x.exp(), e.sum(1, keepdim=True), rounding_mode="floor"),
        "div",
    ),
}


@pytest.mark.parametrize(("function", "name"), LEFT.values(), ids=list(LEFT))
def test_what_is_no_such_sum_is_left_alone(function: Function, name: str) -> None:
    graph = said(function)
    assert named(graph.graph, name)
    assert str(graph.graph) == str(copied(function).graph)


def copied(function: Function) -> fx.GraphModule:
    """A graph as finding attention leaves it that has none."""
    return canonical(function, X).graph


def test_a_graph_without_such_operators_is_unchanged() -> None:
    def model(x: Tensor) -> Tensor:
        return F.layer_norm((x * 2 / 3).softmax(1).mean(1).sum(0), (6,)).amax(0)

    assert str(said(model).graph) == str(copied(model).graph)


def test_the_captured_graph_is_left_alone() -> None:
    found = canonical(lambda x: x.var(1), X)
    before = str(found.graph.graph)
    fuse(found)
    assert str(found.graph.graph) == before


def test_a_lower_score_than_the_highest_of_another_dimension_stays_subtracted() -> None:
    graph = said(lambda x: written(x, 1, lambda x: x.amax(2, keepdim=True)))
    (softmax,) = named(graph.graph, "softmax")
    assert operator_name(softmax.args[0]) == "aten::sub"  # type: ignore[arg-type]
    assert_is(graph(X), written(X, 1, lambda x: x.amax(2, keepdim=True)), torch.float32)


def test_attention_whose_softmax_is_written_out_is_found() -> None:
    q, k, v = (number(2, 4, 6, 5, seed=seed) for seed in range(3))

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return written(q @ k.mT, -1, lambda x: x.amax(-1, keepdim=True)) @ v

    fused, (attention,), misses = fuse(canonical(model, q, k, v))
    assert not misses
    assert attention.node.target is SDPA
    torch.testing.assert_close(fused.graph(q, k, v)[0], model(q, k, v))


@pytest.mark.parametrize("function", [lambda x: x.std(1), lambda x: torch.linalg.vector_norm(x, 2, 1)])
def test_gradients_are_those_of_the_operator_even_at_zero(function: Function) -> None:
    x = X.clone()
    x[0] = 0
    graph = said(function)
    gradients = []
    for each in (graph, function):
        leaf = x.clone().requires_grad_()
        (value,) = pytree.tree_leaves(each(leaf))
        value.square().sum().add(value.sum()).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


class Model(torch.nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def dynamic(function: Function, dims: dict[int, Any]) -> Captured:
    return from_export(torch.export.export(Model(function), (X,), dynamic_shapes={"x": dims}))


DYNAMIC = {0: torch.export.Dim("a", max=64), 2: torch.export.Dim("b", max=64)}


@pytest.mark.parametrize("correction", [0, 1, 0.5])
def test_a_count_that_depends_on_the_inputs_is_theirs(correction: float) -> None:
    """It is read off an input, which no merge shortens."""

    def model(x: Tensor) -> Tensor:
        return (x * 2).var((0, 1, 2), correction=correction)

    graph = fuse(dynamic(model, DYNAMIC))[0].graph
    assert not named(graph.graph, "var")
    assert {node.args[0].op for node in named(graph.graph, "sym_size")} <= {"placeholder"}  # type: ignore[union-attr]
    for shape in (X.shape, (2, 4, 7, 6)):
        x = number(*shape)
        torch.testing.assert_close(graph(x)[0], model(x))


def test_a_count_that_no_input_tells_is_left_alone() -> None:
    graph = fuse(dynamic(lambda x: torch.cat([x, x]).var(0), DYNAMIC))[0].graph
    assert named(graph.graph, "var")
    assert not named(fuse(dynamic(lambda x: torch.cat([x, x]).var(0, correction=0), DYNAMIC))[0].graph.graph, "var")


def test_a_correction_that_may_leave_nothing_is_left_alone() -> None:
    assert named(fuse(dynamic(lambda x: x.var(0, correction=3), DYNAMIC))[0].graph.graph, "var")


def test_a_pool_of_a_size_that_depends_on_the_inputs() -> None:
    graph = fuse(dynamic(lambda x: F.adaptive_avg_pool2d(x, (1, None)), DYNAMIC))[0].graph
    assert not named(graph.graph, "adaptive_avg_pool2d")
    x = number(2, 4, 7, 6)
    torch.testing.assert_close(graph(x)[0], F.adaptive_avg_pool2d(x, (1, None)))


def test_what_is_said_lies_where_the_operator_lay() -> None:
    found = canonical(lambda x: x.var(1), X)
    (var,) = named(found.graph.graph, "var")
    var.meta["stack_trace"] = "here"
    new = [node for node in fuse(found)[0].graph.graph.nodes if node.op == "call_function"]
    assert {node.meta["stack_trace"] for node in new} == {"here"}
    assert [size(each) for each in new[-1].meta["val"].shape] == [3, 5, 6]
