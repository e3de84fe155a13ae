"""Finding attention changes nothing: the graph in which all of it is one operator equals the captured one."""

from __future__ import annotations

import torch
from torch import fx

from tests.laws.support import assert_same, captured, every_case, flat_inputs
from tests.zoo import Case
from tldr_compile.passes.capture.attention import SDPA, fuse

SOFTMAX = (torch.ops.aten.softmax.int, torch.ops.aten._softmax.default)


def count(graph: fx.GraphModule, *targets: object) -> int:
    return sum(node.target in targets for node in graph.graph.nodes)


@every_case
def test_the_fused_graph_computes_what_the_captured_one_does(case: Case) -> None:
    before = captured(case, 2)
    after, attentions, misses = fuse(before)
    with torch.no_grad():
        expected = before.graph(*flat_inputs(case))
        assert_same(after.graph(*flat_inputs(case)), expected)
    assert count(after.graph, *SOFTMAX) == 0
    assert [attention.node.target for attention in attentions] == [SDPA] * count(after.graph, SDPA)
    assert len(attentions) == count(before.graph, SDPA, *SOFTMAX) >= 3
    assert not misses


@every_case
def test_the_captured_graph_stays_as_it_was(case: Case) -> None:
    before = captured(case, 2).graph.code
    fuse(captured(case, 2))
    assert captured(case, 2).graph.code == before
