"""Law 4: every rule agrees with the operator that it describes.

The operators of `samples` really run on the shortened tokens, in another order and grouped differently in every sample
of the batch, and have to give what their types predict: the shapes, and the values that they give at full length on a
stream whose tokens equal their groups. A rule without a sample fails, so that a new rule brings its own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tests.laws.samples import SAMPLES, Sample
from tests.laws.samples.sample import B, C, N, T, W, merged_stream
from tests.tracing import captured, named, number
from tldr_compile import TokenMerging, ops, passes
from tldr_compile.passes.axes.infer import infer
from tldr_compile.passes.axes.rules import TABLE
from tldr_compile.passes.capture.attention import fuse
from tldr_compile.passes.capture.canonicalize import from_dynamo
from tldr_compile.passes.capture.clip import clip_inputs
from tldr_compile.passes.capture.sums import DECOMPOSITIONS
from tldr_compile.passes.check.verify import record
from tldr_compile.passes.fx_utils import operator_name, tensors
from tldr_compile.passes.plan.plan import Plan
from tldr_compile.passes.sizes import size

OPTIONS = TokenMerging(schedule=(2,))
CLIP = number(B, T, N, W)

SPELLED = {"einsum": ("matmul", "permute")}
NUMBERS = {f"aten::sym_{name}" for name in ("size", "stride", "numel", "storage_offset")}

every_sample = pytest.mark.parametrize("sample", SAMPLES, ids=str)


@cache
def graph(sample: Sample) -> passes.Captured:
    return captured(fx.symbolic_trace(lambda clip: sample.model(clip)), CLIP)


def merged_graph(captured: passes.Captured) -> passes.Merged:
    return passes.merge(passes.analyse(captured, OPTIONS), OPTIONS, ops)


@cache
def merged(sample: Sample) -> passes.Merged:
    return merged_graph(graph(sample))


def called(plan: Plan, sample: Sample) -> list[fx.Node]:
    """The operators under test: the last of their names. (Finding attention spells some in another way.)

    Of one that is said in several others, the first of them.
    """
    graph = plan.typed.captured.graph.graph
    names = ["reshape" if name in ("view", "_unsafe_view") else name for name in sample.names]
    first = [user for user in plan.merges[0].node.users if user.op != "output"][:1]
    said = {name: first for name in names if f"aten::{name}" in DECOMPOSITIONS}
    spelled = {name: [node for each in others for node in named(graph, each)] for name, others in SPELLED.items()}
    return [(named(graph, name) or spelled.get(name) or said[name])[-1] for name in names]


@every_sample
def test_predicts_the_sizes(sample: Sample) -> None:
    captured = graph(sample)
    typed = infer(captured, clip_inputs(captured))
    for node, values in typed.values.items():
        for value, tensor in zip(values, tensors(node), strict=True):
            assert [axis.size for axis in value.axes] == [size(s) for s in tensor.shape], node
    for node, call in typed.calls.items():
        for read, operand in zip(call.reads, typed.operands(node), strict=True):
            for wide, own in zip(read[::-1], typed.value(operand).axes[::-1], strict=False):
                assert own.size in (1, wide.size), node


@every_sample
def test_is_carried_or_says_why_not(sample: Sample) -> None:
    plan = merged(sample).plan
    assert sample.barrier or not any(step.barriers for step in plan.steps.values())
    for node in called(plan, sample):
        step = plan.steps[node]
        if sample.barrier is None:
            assert not step.barriers, node
            assert step.held == (plan.merges[0].target,), node
        else:
            assert not step.held, node
            assert sample.barrier in step.barriers[0].reason


@every_sample
def test_gives_on_groups_what_it_gives_at_full_length(sample: Sample) -> None:
    passes.verify(merged(sample), [CLIP])


@pytest.mark.parametrize("framewise", [False, True])
def test_the_samples_of_a_batch_are_grouped_differently(framewise: bool) -> None:
    sample = next(each for each in SAMPLES if each.framewise == framewise)
    with torch.no_grad():
        _, groupings = record(merged(sample).graph, merged(sample).groupings, [CLIP])
    assign = groupings[1]["assign"]
    assert len(assign) == (B * T if framewise else B)
    assert len(assign.unique(dim=0)) == len(assign)


def test_every_rule_has_a_sample_that_is_carried_or_a_reason() -> None:
    assert {f"aten::{name}" for sample in SAMPLES for name in sample.names} == set(TABLE) - NUMBERS


def test_a_number_is_that_of_the_original() -> None:
    """Sizes follow from the inputs, whatever the operand was merged to."""

    def model(clip: Tensor) -> list[Any]:
        x = F.linear(clip.reshape(clip.shape[0], -1, W), number(C, W))
        stream = x + F.scaled_dot_product_attention(x, x, x)
        late = stream.neg()[1:]
        return [stream, late.size(1), late.stride(0), late.numel(), late.storage_offset()]

    graph = captured(model, CLIP, mode="symbolic")
    assert {operator_name(node) for node in graph.graph.graph.nodes} >= NUMBERS
    assert merged_graph(graph).graph(CLIP)[1:] == tuple(model(CLIP)[1:])


@cache
def dialect() -> frozenset[str]:
    """Every operator that captures of all samples hold, before attention is found and after."""

    def model(clip: Any) -> Any:
        streams = [merged_stream(clip, framewise) for framewise in (False, True)]
        return [sample.build(streams[sample.framewise]) for sample in SAMPLES]

    found = from_dynamo(fx.symbolic_trace(model), [CLIP])
    return frozenset(operator_name(node) for graph in (found, fuse(found)[0]) for node in graph.graph.graph.nodes)


@pytest.mark.parametrize("name", sorted(TABLE))
def test_every_rule_is_of_an_operator_that_a_capture_can_hold(name: str) -> None:
    assert name in dialect() | NUMBERS
