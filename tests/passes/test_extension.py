"""A rule from outside: what CONTRIBUTING promises to whoever has an operator of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import tldr_compile
from tests.generated.attention import WIDTH
from tests.generated.model import build
from tests.generated.recipe import Recipe
from tldr_compile import ops
from tldr_compile.passes.axes.rules import TABLE, Call, Kind, Typed, rule
from tldr_compile.passes.capture.decompositions import DECOMPOSITIONS, decomposition


@torch.library.custom_op("tldr_tests::smooth", mutates_args=())
def smooth(x: Tensor) -> Tensor:
    return x.softmax(-1)


@smooth.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Smoothed(nn.Module):
    """An operator that nobody here knows, in the middle of a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build(Recipe(tail="tokens"))

    def forward(self, x: Tensor) -> Tensor:
        x = self.model.positioned(self.model.embedded(x), None)
        for block in self.model.blocks:
            x, _ = block(x, None)
            x = x + smooth(x)
        return x.mean(1)


@pytest.fixture
def table() -> Iterator[None]:
    before = dict(TABLE)
    yield
    TABLE.clear()
    TABLE.update(before)


def forced() -> list[str]:
    merged = tldr_compile.apply(Smoothed().eval(), Recipe().inputs(), schedule=[3, 1], verify=True)
    return [restoration["operator"] for restoration in merged.report.restorations]


def test_an_unknown_operator_is_a_barrier_that_the_report_names() -> None:
    assert set(forced()) == {"tldr_tests.smooth.default"}


def test_a_rule_from_outside_carries_it(table: None) -> None:
    @rule("tldr_tests::smooth")
    def channels_meet(call: Call) -> Typed:
        (x,) = call.operands
        call.use(Kind.MIX, x, -1)
        return call.typed(call.axes(x))

    assert not forced()


def test_a_wrong_rule_breaks_the_law(table: None) -> None:
    """Claiming that a sum over the tokens maps them is found out on the first run."""

    @rule("sum")
    def maps(call: Call) -> Typed:
        (x,) = call.operands
        return call.typed(tuple(axis for d, axis in enumerate(call.axes(x)) if d not in {1}))

    class Summed(Smoothed):
        def forward(self, x: Tensor) -> Tensor:
            return self.model.blocks[0](self.model.embedded(x), None)[0].sum(1)

    with pytest.raises(tldr_compile.VerificationError, match=r"differs from its meaning|would become"):
        tldr_compile.apply(Summed().eval(), Recipe().inputs(), schedule=[3], verify=True)


@torch.library.custom_op("tldr_tests::attention", mutates_args=())
def attention(x: Tensor, weight: Tensor) -> Tensor:
    """Attention as a kernel of its own: `x [B, N, C]`, one head."""
    q, k, v = torch.nn.functional.linear(x, weight).chunk(3, -1)
    return ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v


@attention.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


class Kernel(nn.Module):
    """A block around a kernel that nobody here knows."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build(Recipe())
        self.weight = nn.Parameter(torch.randn(3 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.model.positioned(self.model.embedded(x), None)
        x = x + attention(x, self.weight)
        return (x + x.relu()).mean(1)


@pytest.fixture
def decompositions() -> Iterator[None]:
    before = dict(DECOMPOSITIONS)
    yield
    DECOMPOSITIONS.clear()
    DECOMPOSITIONS.update(before)


def test_attention_inside_an_unknown_kernel_is_not_seen() -> None:
    with pytest.raises(tldr_compile.NothingToMerge, match="no attention site"):
        tldr_compile.apply(Kernel().eval(), Recipe().inputs(), schedule=[3])


@torch.no_grad()
def test_a_decomposition_from_outside_makes_it_a_site(decompositions: None) -> None:
    @decomposition("tldr_tests::attention")
    def plain(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = torch.nn.functional.linear(x, weight).chunk(3, -1)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    model = Kernel().eval()
    merged = tldr_compile.apply(model, Recipe().inputs(), schedule=[3], verify=True)
    assert [site["status"] for site in merged.report.to_dict()["sites"]] == ["merged"]
    (clip,) = Recipe().inputs()
    torch.testing.assert_close(tldr_compile.apply(model, (clip,), schedule=[0])(clip), model(clip))


@torch.no_grad()
def test_a_way_to_merge_from_outside_is_an_option_like_the_others() -> None:
    with pytest.raises(tldr_compile.OptionError, match="reduction='pairs'"):
        tldr_compile.TokenMerging(reduction="pairs")

    @ops.reduction("pairs", gives=True)
    def neighbours(tokens: ops.Tokens) -> ops.Split:
        """The first pairs of neighbours become one."""
        batch, count = tokens.metric.shape[:2]
        place = torch.arange(count).expand(batch, -1)
        source = 2 * torch.arange(tokens.r).expand(batch, -1)
        stays = (place % 2 == 1) | (place >= 2 * tokens.r)
        kept = place[stays].reshape(batch, count - tokens.r)
        return ops.Split(kept, source, source // 2)

    (clip,) = Recipe().inputs()
    merged = tldr_compile.apply(build(Recipe()), (clip,), schedule=[4], reduction="pairs", verify=True)
    (decision,) = tldr_compile.inspect(merged, clip)
    assert decision.assign[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, *range(4, 14)]
