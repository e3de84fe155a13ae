"""What is entered when a graph is traced again, and what a refusal says: node, operator, line, way out."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._higher_order_ops.map import map as mapped
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.compiler import nested_compile_region

import tldr_compile
from tests.passes.capture.test_canonicalize import capture, operators
from tldr_compile.backend import merged_graph
from tldr_compile.passes.capture.canonicalize import from_dynamo, from_export
from tldr_compile.passes.capture.decompositions import DECOMPOSITIONS, decomposition
from tldr_compile.passes.errors import CaptureError

TOKENS, WIDTH = 12, 8
CONFIG = tldr_compile.TokenMerging(schedule=(3, 2, 2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def plain(self, x: Tensor, calls: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (2, WIDTH // 2)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x[..., 0].mul_(2.0)  # a write through a view, inside
        return x + calls * 0

    @nested_compile_region
    def region(self, x: Tensor, calls: Tensor) -> Tensor:
        return self.plain(x, calls)


class Regions(nn.Module):
    """Blocks alike, each a region that is compiled once."""

    def __init__(self, regions: bool = True) -> None:
        super().__init__()
        self.blocks, self.regions = nn.ModuleList(Block() for _ in range(3)), regions
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, clip: Tensor) -> Tensor:
        x = clip
        for block in self.blocks:
            x = block.region(x, self.calls) if self.regions else block.plain(x, self.calls)
        self.calls.add_(1)
        return x.mean(1)


class Calls(nn.Module):
    """A linear layer, and then one function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


def refused(model: nn.Module, *args: Any) -> str:
    with pytest.raises(CaptureError) as caught:
        tldr_compile.apply(model, args)
    return str(caught.value)


def refused_by_backend(model: nn.Module, *args: Any) -> str:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        capture(model, *args)
    assert isinstance(caught.value.inner_exception, CaptureError)
    return str(caught.value.inner_exception)


def is_region(graph: fx.Graph) -> bool:
    return any(node.target is torch.ops.higher_order.invoke_subgraph for node in graph.nodes)


def test_a_region_that_is_compiled_once_is_entered_at_every_call() -> None:
    torch.manual_seed(0)
    model, plain, clip = Regions().eval(), Regions(regions=False).eval(), torch.randn(2, TOKENS, WIDTH)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        captured, tracer, outputs = capture(model, clip)
        assert is_region(tracer.graph)
        assert operators(captured)["aten.scaled_dot_product_attention.default"] == 3
        torch.testing.assert_close(outputs, plain(clip))
        assert int(model.calls) == int(plain.calls) == 1
        program = torch.export.export(model, (clip,), strict=True)
        assert is_region(program.graph)
        assert operators(from_export(program)) == operators(captured)


def test_every_call_of_a_region_is_a_site() -> None:
    torch.manual_seed(0)
    model, plain, clip = Regions().eval(), Regions(regions=False).eval(), torch.randn(2, TOKENS, WIDTH)
    plain.load_state_dict(model.state_dict())

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> fx.GraphModule:
        return merged_graph(gm, inputs, CONFIG)

    with torch.no_grad():
        expected = tldr_compile.apply(plain, (clip,), config=CONFIG)(clip)
        strict = tldr_compile.apply(torch.export.export(model, (clip,), strict=True), config=CONFIG)
        assert [site["tokens_out"] for site in strict.report.sites] == [9, 7, 5]
        torch.testing.assert_close(strict(clip), expected)
        torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(clip), expected)


def test_what_stands_in_a_region_is_spelled_out() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.layer(x) * 2

    model, clip = Inner().eval(), torch.randn(2, TOKENS, WIDTH)
    program = torch.export.export(model, (clip,), strict=True)
    captured = from_export(program)
    assert "aten._transformer_encoder_layer_fwd.default" not in operators(captured)
    assert operators(captured)["aten.scaled_dot_product_attention.default"] == 1


def test_tensors_that_a_graph_inside_holds_are_attributes() -> None:
    body = fx.symbolic_trace(nn.Linear(4, 4))
    graph = fx.Graph()
    x, inside = graph.placeholder("x"), graph.get_attr("body")
    region = graph.call_function(torch.ops.higher_order.invoke_subgraph, (inside, "body", x))
    graph.output((region,))
    weight, bias = body.get_parameter("weight"), body.get_parameter("bias")
    gm = fx.GraphModule({"body": body}, graph)
    value = torch.randn(2, 4)
    captured = from_dynamo(gm, [value])
    assert captured.graph.get_parameter("body.weight") is weight
    torch.testing.assert_close(captured.graph(value)[0], F.linear(value, weight, bias))


LOOPS: dict[str, Callable[[Tensor], Tensor]] = {
    "cond": lambda x: torch.cond(x.sum() > 0, torch.cos, torch.sin, (x,)),
    "map_impl": lambda x: mapped(lambda row: row.sin(), x),
    "scan": lambda x: scan(lambda carry, row: (carry + row, carry * row), x[0], x)[1],
    "while_loop": lambda x: while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y.sin()), (torch.tensor(0), x))[1],
}


@pytest.mark.parametrize("name", list(LOOPS))
@pytest.mark.parametrize("refuse", [refused, refused_by_backend])
def test_a_refused_operator_says_which_where_and_what_else(name: str, refuse: Callable[..., str]) -> None:
    with torch.no_grad():
        said = refuse(Calls(LOOPS[name]).eval(), torch.randn(3, 4))
    assert f"is the higher-order operator {name!r}" in said
    assert "Python" in said
    assert "torch.compiler.disable" in said
    assert "test_retrace.py" in said or (refuse is refused and f"{name} (" in said)  # not every export knows the line


def test_a_node_that_cannot_be_traced_says_which_where_and_what_else() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    view = graph.call_function(torch.ops.aten.view.default, (x, [7, 7]))
    view.meta["stack_trace"] = 'File "model.py", line 7, in forward\n    x.view(7, 7)'
    graph.output((view,))
    with pytest.raises(CaptureError) as caught:
        from_dynamo(fx.GraphModule({}, graph), [torch.randn(2, 4)])
    assert str(caught.value).startswith('view_default ("model.py", line 7, in forward): aten::view cannot be traced: ')
    assert "torch.compiler.disable" in str(caught.value)
    assert "While executing" not in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_value_that_must_be_known_says_that_it_follows_from_data() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    count = graph.call_function(torch.ops.aten.item.default, (x,))
    graph.output((graph.call_function(bool, (count,)),))
    with pytest.raises(CaptureError, match=r"bool cannot be traced: .*a size depends on data there.*torch._check"):
        from_dynamo(fx.GraphModule({}, graph), [torch.tensor(3)])


def test_a_refusal_in_a_body_says_where_once() -> None:
    def failing(x: Tensor) -> Tensor:
        raise CaptureError("no")

    @torch.library.custom_op("tests::refused", mutates_args=())
    def operator(x: Tensor) -> Tensor:
        return x.clone()

    operator.register_fake(torch.empty_like)
    decomposition("tests::refused")(failing)
    try:
        said = refused(Calls(operator), torch.randn(2, 4))
    finally:
        del DECOMPOSITIONS["tests::refused"]
    assert said.count("tests::refused") == 1
    assert "test_retrace.py" in said
    assert said.endswith("tests::refused: no")


def test_a_failure_leaves_no_level_of_vmap_behind() -> None:
    function = torch.vmap(lambda row: row.sin().sum(0))
    said = refused_or_captured(Calls(function), torch.randn(2, 4))
    torch.randn(2)  # refused inside vmap
    assert not torch._C._functorch.get_interpreter_stack(), said


def refused_or_captured(model: nn.Module, *args: Any) -> str:
    try:
        from_export(torch.export.export(model, args))
    except CaptureError as reason:
        return str(reason)
    return "captured"


def test_what_export_cannot_capture_says_where_and_what_else() -> None:
    said = refused(Calls(lambda x: x.sin() if x.sum() > 0 else x.cos()), torch.randn(2, 4))
    assert re.search(r'It stopped at ".*test_retrace\.py", line \d+, in <lambda>\.', said)
    assert 'torch.compile(model, backend="tldr")' in said


def test_arguments_that_do_not_fit_have_no_line() -> None:
    assert "It stopped at the arguments." in refused(Calls(torch.sin), torch.randn(2, 4), torch.randn(2, 4))
