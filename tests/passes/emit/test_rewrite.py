"""Emission of plans made by hand on small graphs: which nodes appear, and what they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from tests.tracing import captured, number
from tldr_compile import TokenMerging, ops
from tldr_compile.passes.axes import Atom, TypedGraph, axis, infer
from tldr_compile.passes.axes.algebra import UNIT
from tldr_compile.passes.capture import Attention
from tldr_compile.passes.emit import rewrite
from tldr_compile.passes.emit.resample import Converter, Grouped
from tldr_compile.passes.emit.rewrite import Rewritten
from tldr_compile.passes.emit.views import Laid, Layout
from tldr_compile.passes.plan import Conversion, How, Merge, Plan, Resolution, Step, Weighing, Weight
from tldr_compile.passes.sites import Site
from tldr_compile.passes.sites.find import Stream
from tldr_compile.passes.sites.groupings import Grouping

B, N, C, R = 2, 6, 4, 2
UNIFORM = TokenMerging(saliency="uniform")


@dataclass(frozen=True)
class Toy:
    """`x + branch(x)`, then `tail`: tokens of `x [B, N, C]` merge after the addition."""

    typed: TypedGraph
    nodes: dict[str, fx.Node]
    resolution: Resolution

    @staticmethod
    def of(branch: Callable[[Tensor], Tensor], tail: Callable[[Tensor], Tensor]) -> Toy:
        graph = captured(lambda x: tail(x + branch(x)), number(B, N, C))
        nodes = {node.name: node for node in graph.graph.graph.nodes}
        (clip,) = graph.graph.graph.find_nodes(op="placeholder")
        typed = infer(graph, frozenset({clip.name}))
        batch, run, _ = typed.value(nodes["add"]).axes
        return Toy(typed, nodes, Resolution(1, run, batch, Atom(N - R, "n1", clip=True), Atom(R), None))

    def plan(self, attention: str, **steps: Step) -> Plan:
        add, (clip,) = self.nodes["add"], self.typed.captured.graph.graph.find_nodes(op="placeholder")
        r, node = self.resolution, self.nodes[attention]
        stream = Stream(add, clip, Grouping(r.run, r.batch))
        site = Site(0, Attention(node, clip, clip), r.run, r.batch, UNIT, "b n c", stream)
        merge = Merge(site, stream.finest, add, R, None, r, (), stream=(), rows=(), keys=(), before=())
        known = {self.nodes[name]: step for name, step in steps.items()}
        return Plan(self.typed, (site,), (), (R,), (merge,), {node: Step(), **known})

    @property
    def held(self) -> Step:
        return Step(held=(self.resolution,))

    def restored(self, operand: int = 0) -> Conversion:
        return Conversion(operand, self.resolution.run, self.resolution, None, How.RESTORE)


def calls(new: Rewritten) -> list[str]:
    """What the new graph calls in order, without the fields of groupings."""
    nodes = (node for node in new.graph.graph.nodes if node.op == "call_function")
    names = (getattr(node.target, "__name__", str(node.target)) for node in nodes)
    return [name.removesuffix(".default").removesuffix(".Tensor") for name in names if name != "getitem"]


def grouping(x: Tensor) -> ops.Grouping:
    ones = torch.ones(B, N)
    return ops.group(x, None, ones, ones, R, seed=1)


def test_one_merge_finds_groups_and_merges_the_stream() -> None:
    toy = Toy.of(torch.tanh, torch.relu)
    new = rewrite(toy.plan("tanh", relu=toy.held), ops, UNIFORM)
    assert calls(new) == ["tanh", "add", "new_ones", "group", *["reshape"] * 5, "down", "relu"]
    assert new.groupings[1].target is ops.group
    x = number(B, N, C)
    stream = x + x.tanh()
    fields = [field.unsqueeze(-1) for field in grouping(stream)[:5]]
    (out,) = new.graph(x)
    assert out.shape == (B, N - R, C)
    torch.testing.assert_close(out, ops.down(stream, *fields, dim=1).relu())


def test_the_graph_of_the_plan_is_left_as_it_was() -> None:
    toy = Toy.of(torch.tanh, torch.relu)
    before = str(toy.typed.captured.graph.graph)
    rewrite(toy.plan("tanh", relu=toy.held), ops, UNIFORM)
    assert str(toy.typed.captured.graph.graph) == before


def test_an_output_that_is_restored_gives_every_token_the_value_of_its_group() -> None:
    toy = Toy.of(torch.tanh, torch.relu)
    merged = rewrite(toy.plan("tanh", relu=toy.held), ops, UNIFORM)
    restored = rewrite(toy.plan("tanh", relu=toy.held, output=Step(conversions=(toy.restored(),))), ops, UNIFORM)
    assert calls(restored) == [*calls(merged), "reshape", "up"]
    x = number(B, N, C)
    assign = grouping(x + x.tanh()).assign
    (short,), (full,) = merged.graph(x), restored.graph(x)
    assert torch.equal(full, short.gather(1, assign.unsqueeze(-1).expand(-1, -1, C)))


def test_what_is_restored_twice_is_restored_once() -> None:
    toy = Toy.of(torch.tanh, lambda x: (x.relu() * 2).sin() + x.relu())
    everywhere = {"sin": Step(conversions=(toy.restored(),)), "add_1": Step(conversions=(toy.restored(1),))}
    both = {"relu_1": toy.held, "relu": toy.held, "mul": toy.held}
    new = rewrite(toy.plan("tanh", **both, **everywhere), ops, UNIFORM)
    assert calls(new).count("up") == 2  # of two values
    same = Toy.of(torch.tanh, lambda x: x.sin() + x.cos())
    once = {name: Step(conversions=(same.restored(),)) for name in ("sin", "cos")}
    assert calls(rewrite(same.plan("tanh", **once), ops, UNIFORM)).count("up") == 1


def test_a_mean_over_groups_is_weighed_by_their_mass() -> None:
    toy = Toy.of(torch.tanh, lambda x: x.mean(1))
    (use,) = toy.typed.calls[toy.nodes["mean"]].uses
    weighed = replace(toy.held, weighings=(Weighing(use, Weight(toy.resolution, held=True)),))
    x = number(B, N, C)
    stream = x + x.tanh()
    for pooling, function in (("mass", "mean"), ("plain", "mean.dim")):
        new = rewrite(toy.plan("tanh", mean=weighed), ops, replace(UNIFORM, pooling=pooling))
        assert calls(new)[-1] == function
        (out,) = new.graph(x)
        found = grouping(stream)
        short = ops.down(stream, *(field.unsqueeze(-1) for field in found[:5]), dim=1)
        weight = (found.mass if pooling == "mass" else torch.ones_like(found.mass)).unsqueeze(-1)
        torch.testing.assert_close(out, (weight * short).sum(1) / weight.sum(1))


def attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(each.unsqueeze(1) for each in (x, 2 * x, x))).squeeze(1)


ATTENTION, FOUND = "scaled_dot_product_attention", ["new_ones", "group"]
ASKED: list[tuple[dict[str, str], list[str]]] = [
    ({}, ["attend_and_sharpness", "add", "saliency", *FOUND]),
    ({"saliency": "shift"}, [ATTENTION, "add", "shift", "linalg_vector_norm", "saliency", *FOUND]),
    ({"saliency": "uniform", "metric": "keys"}, ["attend", "add", "mean.dim", *FOUND]),
    ({"saliency": "uniform"}, [ATTENTION, "add", *FOUND]),
    ({"saliency": "received"}, ["attend", "received", "add", "saliency", *FOUND]),
    ({"saliency": "key norm"}, ["attend", "add", "mean.dim", "key_norm", *FOUND]),
]


@pytest.mark.parametrize(("options", "told"), ASKED, ids=str)
def test_an_attention_gives_its_merge_what_is_asked(options: dict[str, Any], told: list[str]) -> None:
    toy = Toy.of(attention, torch.relu)
    new = rewrite(toy.plan(ATTENTION, relu=toy.held), ops, TokenMerging(**options))
    views = ("mul", "unsqueeze", "squeeze.dim", "expand", "reshape")  # and the doubled keys
    assert [name for name in calls(new) if name not in views] == [*told, "down", "relu"]


def test_a_converter_that_knows_more_leaves_the_other_as_it_was() -> None:
    graph = fx.Graph()
    x, *fields = (graph.placeholder(name) for name in ("x", *Grouped.__dataclass_fields__))
    batch, run, channels = (Atom(size) for size in (B, N, C))
    axes = tuple(map(axis, (batch, run, channels)))
    resolution = Resolution(1, axes[1], axes[0], Atom(N - R), Atom(R), None)
    before = Converter(Layout(graph), ops)
    after = before.knowing(resolution, Grouped(*fields))
    assert not before.grouped
    short = after.down(Laid(x, axes), resolution, How.PICK)
    assert short.axes == (axes[0], resolution.axis, axes[2])
    full = after.convert(short, Conversion(0, axes[1], resolution, None, How.RESTORE))
    assert full.axes == axes
    assert after.up(short, resolution) is full  # emitted once
