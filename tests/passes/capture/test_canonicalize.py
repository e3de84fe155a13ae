"""Both roads into the one dialect: the same operators, functional, with the identity of the tracer's graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from tests.tiny import TOKENS, WIDTH, Tiny, attention, clip
from tldr_compile.passes.capture.canonicalize import Captured, from_dynamo, from_export, inherit, with_writes
from tldr_compile.passes.errors import CaptureError

aten = torch.ops.aten


class Awkward(nn.Module):
    """Writes in place, through views, to buffers; nested arguments; constants of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))
        self.table = torch.arange(4.0)
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, batch: dict[str, Any], *, extra: Tensor | None = None) -> dict[str, Any]:
        z = x.clone()
        z[:, 1] += 1
        z.mul_(2).view(-1).add_(1)
        with torch.no_grad():
            self.calls.add_(1)
        h = F.dropout(z.clone(), 0.5, self.training)
        h += self.norm(batch["video"][0]) * self.weight + self.table + torch.tensor([1.0, 2.0, 3.0, 4.0])
        probabilities = torch.einsum("bij,bkj->bik", h, h).to(torch.float64).softmax(-1)
        return {"h": h if extra is None else h + extra, "p": (probabilities, z.reshape(-1))}


class Switch(nn.Module):
    """One line of user code that is special to a tracer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(4, 4), kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "checkpoint":
            return checkpoint(self.layer, x, use_reentrant=False)
        if self.kind == "cond":
            return torch.cond(x.sum() > 0, torch.cos, torch.sin, (self.layer(x),))
        if self.kind == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.layer(x)
        with torch.no_grad():
            y = self.layer(x)
        return self.layer(y)


def capture(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Captured, fx.GraphModule, Any]:
    """Dynamo's road: what was captured, Dynamo's own graph, and what the captured graph returns when it is run."""
    seen: list[tuple[Captured, fx.GraphModule]] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        captured = from_dynamo(gm, inputs)
        seen.append((captured, gm))
        return with_writes(captured.graph, captured.mutated)

    outputs = torch.compile(model, backend=backend, fullgraph=True)(*args, **kwargs)
    return *seen[0], outputs


def operators(captured: Captured) -> Counter[str]:
    """The operators; the two spellings of a tensor constant count as one."""
    spelled = {"aten.lift_fresh_copy.default": "aten.clone.default"}
    names = (str(node.target) for node in calls(captured.graph))
    return Counter(spelled.get(name, name) for name in names)


def calls(graph: fx.GraphModule) -> Iterator[fx.Node]:
    return (node for node in graph.graph.nodes if node.op == "call_function")


def batch() -> tuple[Tensor, dict[str, Any]]:
    return torch.randn(2, 3, 4), {"video": [torch.randn(2, 3, 4)]}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_both_roads_speak_one_dialect(mode: Callable[[], Any], training: bool) -> None:
    model = Awkward().train(training)
    args = batch()
    with mode():
        dynamo, _, _ = capture(model, *args)
        export = from_export(torch.export.export(model, args))
    assert operators(dynamo) == operators(export)
    names = set(operators(dynamo))
    assert {"aten.einsum.default", "aten.softmax.int", "aten.view.default"} <= names
    assert not {name for name in names if name.startswith("aten.") and name.split(".")[1].endswith("_")}
    assert ("aten.native_dropout.default" in names) == training


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_what_the_passes_look_for_stays_whole(attn: str) -> None:
    config = T.VideoMAEConfig(
        image_size=24, patch_size=8, num_frames=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, attn_implementation=attn,
    )  # fmt: skip
    model = T.VideoMAEModel(config).eval()
    pixels = torch.randn(2, 4, 3, 24, 24)
    dynamo, _, _ = capture(model, pixels)
    export = from_export(torch.export.export(model, (pixels,)))
    count = operators(dynamo)
    assert count == operators(export)
    assert count["aten.linear.default"] == 12
    assert count["aten.conv3d.default"] == 1
    attention_counts = {"sdpa": (2, 0, 0), "eager": (0, 2, 4)}[attn]
    whole = ("aten.scaled_dot_product_attention.default", "aten.softmax.int", "aten.matmul.default")
    assert tuple(count[name] for name in whole) == attention_counts
    assert export.names == {"pixel_values": "pixel_values"}


@pytest.mark.parametrize("training", [True, False])
def test_the_captured_graph_computes_what_the_model_does(training: bool) -> None:
    args = batch()
    ours, theirs = Awkward().train(training), Awkward().train(training)
    ours.load_state_dict(theirs.state_dict())
    torch.manual_seed(3)
    expected = theirs(*args)
    torch.manual_seed(3)
    captured, _, outputs = capture(ours, *args)
    torch.testing.assert_close(outputs, expected)
    assert len(captured.mutated) == (4 if training else 1)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_constants_are_what_a_module_holds_and_inputs_have_the_users_names() -> None:
    args = batch()
    dynamo, _, _ = capture(Awkward(), *args, extra=torch.ones(4))
    export = from_export(torch.export.export(Awkward(), args, {"extra": torch.ones(4)}))
    assert set(dynamo.names.values()) == set(export.names.values()) == {"x", "video[0]", "extra"}
    for captured in (dynamo, export):
        placeholders = {node.name for node in captured.graph.graph.find_nodes(op="placeholder")}
        assert captured.constants | set(captured.names) == placeholders
        assert not captured.constants & set(captured.names)
    assert len(dynamo.constants) == 8  # three of the norm's buffers, its two parameters, the weight, the table, calls


def test_a_name_is_as_long_as_it_takes() -> None:
    class Pair(nn.Module):
        def forward(self, left: dict[str, Tensor], right: dict[str, Tensor], rest: list[Tensor]) -> Tensor:
            return left["video"] + right["video"] + left["audio"] + rest[0]

    one = torch.ones(2)
    captured = from_export(torch.export.export(Pair(), ({"video": one, "audio": one}, {"video": one}, [one])))
    assert list(captured.names.values()) == ["left['video']", "audio", "right['video']", "rest[0]"]


def test_the_new_graph_has_the_identity_of_dynamos() -> None:
    captured, gm, _ = capture(Awkward(), *batch())
    new = with_writes(captured.graph, captured.mutated)
    for graph in (captured.graph, new):
        ours, theirs = graph.graph.find_nodes(op="placeholder"), gm.graph.find_nodes(op="placeholder")
        for our, their in zip(ours, theirs, strict=True):
            assert (our.name, our.target) == (their.name, their.target)
            assert our._dynamo_source is their._dynamo_source
            assert our.meta["tensor_dict"] is their.meta["tensor_dict"]
        assert graph.meta == gm.meta
        assert graph._param_name_to_source is gm._param_name_to_source
        assert not list(graph.buffers())  # AOTAutograd knows no source for the tensor constants
        assert len(graph.graph.find_nodes(op="get_attr")) == 1


def test_every_tensor_has_a_value_and_the_users_line() -> None:
    captured, _, _ = capture(Awkward(), *batch())
    modes = {torch._C._set_grad_enabled}
    for node in calls(captured.graph):
        assert "val" in node.meta or node.target in modes
    einsum = captured.graph.graph.find_nodes(op="call_function", target=aten.einsum.default)[0]
    assert "torch.einsum" in einsum.meta["stack_trace"]


def test_writes_go_last_and_leave_the_outputs() -> None:
    captured, _, _ = capture(Awkward().eval(), *batch())
    assert captured.mutated == ("l_self_buffers_calls_",)
    assert len(captured.graph.graph.output_node().args[0]) == 4
    written = with_writes(captured.graph, captured.mutated)
    copies = written.graph.find_nodes(op="call_function", target=aten.copy_.default)
    assert [copy.args[0].name for copy in copies] == ["l_self_buffers_calls_"]
    assert len(written.graph.output_node().args[0]) == 3
    assert not captured.graph.graph.find_nodes(op="call_function", target=aten.copy_.default)


def test_a_parameter_that_the_model_writes_to_is_written_to() -> None:
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((4,), 3.0))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.clamp_(max=1.0)
            return x * self.weight

    model = Clamped()
    captured, _, outputs = capture(model, torch.ones(4))
    assert captured.mutated == ("l_self_parameters_weight_",)
    torch.testing.assert_close(outputs, torch.ones(4))
    torch.testing.assert_close(model.weight.detach(), torch.ones(4))


def test_a_functional_program_names_what_it_writes_to() -> None:
    program = torch.export.export(Awkward().eval(), batch()).run_decompositions({})
    assert from_export(program).mutated == ("b_calls",)


def test_a_dynamic_batch_stays_symbolic() -> None:
    video = clip(4)
    torch._dynamo.mark_dynamic(video, 0)
    dynamo, _, _ = capture(Tiny(), video)
    shapes = ({0: torch.export.Dim("batch")},)
    export = from_export(torch.export.export(Tiny(), (clip(4),), dynamic_shapes=shapes))
    for captured in (dynamo, export):
        (norm, *_) = captured.graph.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
        batch_size, *rest = norm.meta["val"].shape
        assert isinstance(batch_size, torch.SymInt)
        assert rest == [TOKENS, WIDTH]
    assert list(dynamo.names.values()) == ["video"]  # and the symbol's placeholder is no input of the user's


def test_a_checkpoint_is_entered_and_still_recomputed() -> None:
    model, x = Switch("checkpoint"), torch.randn(2, 4)
    captured, _, outputs = capture(model, x)
    (linear,) = calls(captured.graph)
    assert linear.target is aten.linear.default
    assert linear.meta["recompute"].name == "PREFER_RECOMPUTE"
    torch.testing.assert_close(outputs, model(x))


def test_modes_are_entered() -> None:
    x = torch.randn(2, 4)
    for road in (
        lambda kind: capture(Switch(kind), x)[0],
        lambda kind: from_export(torch.export.export(Switch(kind), (x,))),
    ):
        (linear,) = (node for node in calls(road("autocast").graph) if node.target is aten.linear.default)
        assert linear.meta["val"].dtype is torch.bfloat16
        switches = [node.args[0] for node in calls(road("no_grad").graph) if node.target is torch._C._set_grad_enabled]
        assert switches == [False, True]


def test_other_higher_order_operators_are_refused_by_name_and_line() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(CaptureError, match=r"cond .* is the higher-order operator 'cond', which tldr-compile does not"):
        from_export(torch.export.export(Switch("cond"), (x,)))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"test_canonicalize\.py.*'cond'") as caught:
        capture(Switch("cond"), x)
    assert isinstance(caught.value.inner_exception, CaptureError)


def test_the_attributes_of_a_graph_by_hand_stay_attributes() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3 * WIDTH, 3 * WIDTH)

    root = Held()
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("layer.weight")
    graph.output((graph.call_function(attention, (graph.call_function(F.linear, (x, weight)),)),))
    gm = fx.GraphModule(root, graph)
    x_value = torch.randn(2, TOKENS, 3 * WIDTH)
    captured = from_dynamo(gm, [x_value])
    assert captured.graph.get_parameter("layer.weight") is root.layer.weight
    assert captured.names == {"x": "x"}
    torch.testing.assert_close(captured.graph(x_value), gm(x_value))


def test_inherit_wants_the_same_placeholders() -> None:
    one = from_export(torch.export.export(Tiny(), (clip(),))).graph
    other = fx.symbolic_trace(lambda x: x + 1)
    with pytest.raises(ValueError, match="zip"):
        inherit(other, one)
