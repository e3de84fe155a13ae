"""Sizes that follow from data are carried through a merge, whatever the data say later."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tldr_compile
from tldr_compile.backend import merged_graph

FRAMES, TOKENS, WIDTH = 5, 12, 8
CONFIG = tldr_compile.TokenMerging(schedule=[0.3])


class Attends(nn.Module):
    """One attention over the tokens of frames; `before` and `after` say which of them there are."""

    def __init__(self, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.after = before, after
        self.embed, self.qkv = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, frames: Tensor) -> Tensor:
        x = self.before(self.embed(frames))
        q, k, v = (each.unsqueeze(1) for each in self.qkv(x).chunk(3, -1))
        return self.after(x + F.scaled_dot_product_attention(q, k, v).squeeze(1))


def mean(x: Tensor) -> Tensor:
    return x.mean(1)


def real(x: Tensor) -> Tensor:
    """Frames that are not blank."""
    return x[x[:, 0, 0] > 0]


def real_by_number(x: Tensor) -> Tensor:
    return x[(x[:, 0, 0] > 0).nonzero().squeeze(1)]


def more_than_few(x: Tensor) -> Tensor:
    """Two counts of one kind of values, of which one is the larger."""
    real, few = (x[:, 0, 0] > 0).nonzero(), (x[:, 0, 1] > 100).nonzero()
    torch._check(real.shape[0] >= few.shape[0] + 1)
    return x[real.squeeze(1)]


def first(x: Tensor) -> Tensor:
    count = (x[:, 0, 0] > 0).sum().clamp(min=1).item()
    torch._check(count >= 1)
    torch._check(count <= FRAMES)
    return x.narrow(0, 0, count)


def first_tokens(x: Tensor) -> Tensor:
    count = (x[0, :, 0] > 0).sum().clamp(min=4).item()
    torch._check(count >= 4)
    torch._check(count <= TOKENS)
    return x[:, :count]


def some_means(x: Tensor) -> Tensor:
    return real(x).mean(1)


def some_tokens(x: Tensor) -> Tensor:
    return x[x[..., 0] > 0]


CASES = {
    "boolean": (real, mean),
    "nonzero": (real_by_number, mean),
    "nonzero, of two": (more_than_few, mean),
    "item": (first, mean),
    "item of tokens": (first_tokens, mean),
    "twice": (lambda x: real_by_number(real(x)), mean),
    "after": (lambda x: x, some_means),
    "tokens after": (lambda x: x, some_tokens),
}


@pytest.fixture(autouse=True)
def whole_graphs() -> Iterator[None]:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        yield


def backend(gm: fx.GraphModule, inputs: list[Any]) -> fx.GraphModule:
    return merged_graph(gm, inputs, CONFIG)


@pytest.mark.parametrize("case", list(CASES))
def test_what_follows_from_data_is_carried(case: str) -> None:
    torch.manual_seed(0)
    model = Attends(*CASES[case]).eval()
    clips = [torch.randn(FRAMES, TOKENS, 4) for _ in range(3)]
    with torch.no_grad():
        merged = tldr_compile.apply(model, (clips[0],), config=CONFIG)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        assert len(merged._merged.plan.merges) == 1
        for clip in clips:
            assert case == "tokens after" or merged(clip).shape == model(clip).shape  # which, merged values say
            torch.testing.assert_close(compiled(clip), merged(clip))


def test_a_frame_that_data_chose_is_merged_as_it_would_be_alone() -> None:
    torch.manual_seed(0)
    model, clip = Attends(real, mean).eval(), torch.randn(FRAMES, TOKENS, 4)
    alone = Attends(lambda x: x, mean).eval()
    alone.load_state_dict(model.state_dict())
    with torch.no_grad():
        chosen = model.embed(clip)[:, 0, 0] > 0
        assert 0 < int(chosen.sum()) < FRAMES
        merged = tldr_compile.apply(model, (clip,), config=CONFIG)
        expected = tldr_compile.apply(alone, (clip[chosen],), config=CONFIG)
        torch.testing.assert_close(merged(clip), expected(clip[chosen]))


def test_the_report_of_sizes_from_data_counts_nothing() -> None:
    model, clip = Attends(real, mean).eval(), torch.randn(FRAMES, TOKENS, 4)
    with torch.no_grad():
        report = tldr_compile.explain(model, (clip,), config=CONFIG)
    assert all(math.isnan(each) for each in report.gflops)
    assert "merge to n1" in str(report)


def test_an_input_whose_size_is_never_known_is_carried() -> None:
    torch.manual_seed(0)
    model, clip = Attends(lambda x: x, mean).eval(), torch.randn(FRAMES, TOKENS, 4)
    reports = []

    def told(gm: fx.GraphModule, inputs: list[Any]) -> fx.GraphModule:
        from tldr_compile import ops  # noqa: PLC0415
        from tldr_compile.passes import analyse, from_dynamo, merge  # noqa: PLC0415
        from tldr_compile.report import Report  # noqa: PLC0415

        reports.append(Report(merge(analyse(from_dynamo(gm, inputs), CONFIG), CONFIG, ops)))
        return backend(gm, inputs)

    with torch.no_grad():
        expected = tldr_compile.apply(model, (clip,), config=CONFIG)(clip)
        torch._dynamo.decorators.mark_unbacked(clip, 0)
        torch.testing.assert_close(torch.compile(model, backend=told, fullgraph=True)(clip), expected)
    assert all(math.isnan(each) for each in reports[0].gflops)


def test_inductor_takes_a_merged_graph_of_such_sizes() -> None:
    torch.manual_seed(0)
    model, clips = Attends(real, mean).eval(), torch.randn(2, FRAMES, TOKENS, 4)
    with torch.no_grad():
        compiled = torch.compile(model, backend="tldr", options={"schedule": [0.3]}, fullgraph=True)
        merged = tldr_compile.apply(model, (clips[0],), config=CONFIG)
        for clip in clips:
            torch.testing.assert_close(compiled(clip), merged(clip))
