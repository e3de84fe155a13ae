"""A call that is traced once gives the graph that tracing all of them gives; what is entangled is traced as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tests.emitted import text
from tests.passes.capture.test_canonicalize import capture
from tests.tiny import Tiny, clip
from tldr_compile.passes.capture import canonicalize
from tldr_compile.passes.capture.retrace import Retracer

Trace = Callable[..., fx.GraphModule]


class Layers(nn.Module):
    """Layers alike, with operands of one kind that are told apart, an order that matters and a write that none sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            place = torch.arange(4, dtype=x.dtype)
            place /= 4
            y = layer(x)
            first, second = y.flatten(1).unflatten(1, (-1, 4)).chunk(2, 1)
            y, _ = torch.ops.aten.native_dropout(y, 0.5, False)  # returns what it reads
            x = x - torch.cat([second, first], 1) * self.scale + y.contiguous().sin() / (x + x).exp() + place
        return x


class SeenWrite(nn.Module):
    """What is written is seen through a view."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        view = x[..., 0]
        x.mul_(2)
        return view + x.sum(-1)


class Counting(nn.Module):
    """A buffer is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(x))


class Numbers(nn.Module):
    """Two constants of one kind, of which the numbers matter."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor(2.0) + torch.tensor(3.0)


class Modes(nn.Module):
    """One call in two modes."""

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.ones(4, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = F.linear(x, weight)
        return F.linear(x, weight) + y


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a graph is traced as a whole, and every operator is traced."""
    counted: Counter[str] = Counter()
    whole: Trace = canonicalize._traced_as_a_whole
    run_node = Retracer.run_node

    def counting(*args: Any) -> fx.GraphModule:
        counted["whole"] += 1
        return whole(*args)

    def counting_node(self: Retracer, n: fx.Node) -> Any:
        counted[str(getattr(n.target, "__name__", n.target))] += 1
        return run_node(self, n)

    monkeypatch.setattr(canonicalize, "_traced_as_a_whole", counting)
    monkeypatch.setattr(Retracer, "run_node", counting_node)
    return counted


def inputs(model: nn.Module) -> tuple[Any, ...]:
    if isinstance(model, Tiny):
        return (clip(1),)
    return (torch.rand(2, 3, 4) if isinstance(model, Counting) else torch.rand(2, 6, 4),)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("make", [Layers, Tiny])
def test_the_graph_is_that_of_a_whole_trace(
    make: Callable[[], nn.Module], grad: bool, traces: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make().eval()
    with torch.set_grad_enabled(grad):
        once, _, _ = capture(model, *inputs(model))
        assert "whole" not in traces
        monkeypatch.setattr(canonicalize, "separable", lambda *_: False)
        torch._dynamo.reset()
        whole, _, _ = capture(model, *inputs(model))
    assert traces["whole"] == 1
    assert text(once.graph.graph) == text(whole.graph.graph)
    for one, other in zip(once.graph.graph.nodes, whole.graph.graph.nodes, strict=True):
        assert one.meta.get("stack_trace") == other.meta.get("stack_trace")
        assert one.meta.get("nn_module_stack") == other.meta.get("nn_module_stack")
        if isinstance(one.meta.get("val"), Tensor):
            assert one.meta["val"].stride() == other.meta["val"].stride()


@torch.no_grad()
def test_layers_alike_are_traced_once_and_compute_what_they_do(traces: Counter[str]) -> None:
    model, x = Layers(), torch.rand(2, 6, 4)
    captured, _, output = capture(model, x)
    assert traces["linear"] == traces["cat"] == 1
    assert len(captured.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)) == 3
    torch.testing.assert_close(output, model(x))


@pytest.mark.parametrize("make", [SeenWrite, Counting, Numbers, Modes])
def test_what_is_entangled_is_traced_as_a_whole(make: Callable[[], nn.Module], traces: Counter[str]) -> None:
    model, twin = make(), make()
    (x,) = inputs(model)
    _, _, output = capture(model, x)
    assert traces["whole"] == 1
    torch.testing.assert_close(output, twin(x))
    for one, other in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(one, other)
