"""What decides is where a dimension came from, what is attended, and what is known: not sizes, names or hints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tldr_compile
from tests.laws.independence import Apart
from tests.laws.support import assert_same, distance
from tests.tiny import TOKENS, WIDTH, Tiny, clip
from tldr_compile import NothingToMerge

SIDE = 8


class Plain(nn.Module):
    """A picture's 8 x 8 patches, whatever `forward` makes of them; attention `[B, N, C]` by hand."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.qkv = nn.Conv2d(3, WIDTH, 4, 4), nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.table = nn.Parameter(torch.randn(SIDE, WIDTH))
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, self.stem(x).flatten(2).mT)

    def attend(self, x: Tensor, number: int = 0, mask: Tensor | None = None) -> Tensor:
        q, k, v = (each.unsqueeze(1) for each in self.qkv[number](x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).squeeze(1)


def picture(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 4 * SIDE, 4 * SIDE, generator=torch.Generator().manual_seed(1))


def applied(forward: Callable[[Any, Tensor], Any], **options: Any) -> tldr_compile.MergedModule:
    with torch.no_grad():
        return tldr_compile.apply(Plain(forward).eval(), (picture(),), **{"verify": True, **options})


def test_one_table_for_rows_and_columns_says_nothing_about_either() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        x = x + (s.table[:, None] + s.table[None]).flatten(0, 1)
        return (x + s.attend(x)).mean(1)

    (site,) = applied(forward, schedule=[20]).report.sites
    assert (site["tokens"], site["tokens_in"], site["tokens_out"]) == ("h·w", 64, 44)


def test_two_attentions_on_one_residual_both_merge() -> None:
    sites = applied(lambda s, x: (x + s.attend(x) + s.attend(x, 1)).mean(1), schedule=[0.25, 0.12]).report.sites
    assert [(site["tokens_in"], site["tokens_out"]) for site in sites] == [(64, 48), (48, 43)]


@pytest.mark.parametrize("saliency", ["attention", "uniform"])
def test_nearly_uniform_attention_does_not_make_weights_of_rounding(saliency: str) -> None:
    model = Tiny().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1 and "positions" not in name:
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(2)) * 0.02)
        wide = copy.deepcopy(model).double()
        single = tldr_compile.apply(model, (clip(),), schedule=[0.3], saliency=saliency)(clip())
        double = tldr_compile.apply(wide, (clip().double(),), schedule=[0.3], saliency=saliency)(clip().double())
    assert distance(single.double(), double) < 1e-5


@pytest.mark.parametrize("lead", [1, 3])
def test_protect_says_how_many_tokens_of_a_piece_lead(lead: int) -> None:
    block = Tiny().blocks[0].eval()
    (site,) = tldr_compile.explain(block, (torch.randn(2, TOKENS, WIDTH),), schedule=[5], protect=lead).sites
    assert (site["protected"], site["tokens_in"], site["tokens_out"]) == (lead, TOKENS, TOKENS - 5)


UNNAMED: dict[str, Callable[[Tensor], Tensor]] = {
    "joined one by one": lambda x: torch.cat(x.split(1)),
    "stacked": lambda x: torch.stack(list(x.unbind(0))),
    "picked": lambda x: x[[1, 0, 3, 2]],
    "selected": lambda x: x.index_select(0, torch.tensor([0, 2, 1, 3])),
    "rolled": lambda x: torch.cat([x[1:], x[:1]]).roll(1, 0),
    "of two views": lambda x: torch.stack([x, x * 2], 1).flatten(0, 1),
}
"""Samples that an operator gives no name: a dimension is kept apart because the attention keeps it apart."""


@pytest.mark.parametrize("how", UNNAMED)
def test_samples_without_a_name_stay_apart(how: str) -> None:
    model, x = twice(UNNAMED[how]), picture(4)
    apart = Apart.of(model, (x,), dims=(0,))
    assert apart.compared or how == "selected"
    assert apart.raised(tldr_compile.apply(model, (x,), schedule=[20], verify=True)) == []




def twice(lay: Callable[[Tensor], Tensor]) -> Plain:
    """Two attentions over what `lay` makes of the tokens."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = lay(x)
        x = x + s.attend(x)
        return (x + s.attend(x, 1)).mean(1)

    return Plain(forward).eval()


def test_pairs_of_tokens_weigh_as_both() -> None:
    def scores(s: Any, x: Tensor) -> Tensor:
        x = x + s.attend(x)
        return x @ x.mT

    whole = applied(lambda s, x: scores(s, x).mean((1, 2)), schedule=[20])(picture())
    by_turns = applied(lambda s, x: scores(s, x).mean(1).mean(1), schedule=[20])(picture())
    assert_same(whole, by_turns)
    applied(lambda s, x: scores(s, x).flatten(1).mean(1), schedule=[20])


def test_a_count_in_a_product_is_exact() -> None:
    def forward(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + s.attend(x)
        return torch.einsum("bnc->bc", (x > 0).long()), x

    count, tokens = applied(forward, schedule=[20])(picture())
    assert torch.equal(count, (tokens > 0).sum(1))


def test_attentions_that_are_no_sites_are_told() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        q, k, v = (each.unsqueeze(1) for each in s.qkv[0](x).chunk(3, -1))
        pooled = [F.avg_pool1d(each.squeeze(1).mT, 3, 1).mT.unsqueeze(1) for each in (k, v)]
        x = x + F.scaled_dot_product_attention(q, *pooled).squeeze(1)
        return (x + s.attend(x, 1)).mean(1)

    report = applied(forward, schedule=[20]).report
    assert len(report.sites) == 1
    assert "not a site" in str(report)
    assert "its keys are not its queries' tokens" in report.to_dict()["not_sites"][0]["reason"]


class Masked(nn.Module):
    """Attention under a mask made of `h`'s sizes; the number of tokens is that of an input `[B, N, C]`."""

    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mask, self.qkv = mask, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (each.unsqueeze(1) for each in self.qkv(h).chunk(3, -1))
        return h + F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(h)).squeeze(1)


def everything(h: Tensor) -> Tensor:
    return torch.ones(h.shape[1], h.shape[1], dtype=torch.bool)[None, None].expand(h.shape[0], 1, -1, -1)


def near(h: Tensor) -> Tensor:
    """Hides nothing among 18 tokens, and much among 40."""
    place = torch.arange(h.shape[1])
    return (place[:, None] - place[None]).abs() < 20


def from_places(h: Tensor) -> Tensor:
    """Hides nothing, made of places whose number is fixed; only how many samples there are may change."""
    return (torch.arange(h.shape[1])[:, None] >= torch.zeros(h.shape[1])).expand(h.shape[0], 1, -1, -1)


def part(h: Tensor) -> Tensor:
    """Hides nothing for 2 samples, and something for 4."""
    return (torch.arange(TOKENS) < 3)[: h.shape[0]].all().expand(h.shape[1], h.shape[1])


def test_a_mask_of_fixed_places_may_be_repeated_for_any_number_of_samples() -> None:
    h, shapes = torch.randn(2, TOKENS, WIDTH), ({0: torch.export.Dim("samples", min=1, max=8)},)
    model, other = Masked(from_places), torch.randn(5, TOKENS, WIDTH)
    merged = tldr_compile.apply(model, (h,), schedule=[4], dynamic_shapes=shapes)
    merged.verify((other,))
    with pytest.raises(NothingToMerge, match="is computed from sizes that may change"):
        tldr_compile.apply(Masked(part), (h,), schedule=[4], dynamic_shapes=shapes)


def test_a_mask_of_sizes_that_may_change_is_not_judged_at_the_traced_ones() -> None:
    h, shapes = torch.randn(2, TOKENS, WIDTH), ({1: torch.export.Dim("tokens", min=4, max=64)},)
    tldr_compile.apply(Masked(near), (h,), schedule=[4])
    merged = tldr_compile.apply(Masked(everything), (h,), schedule=[4], dynamic_shapes=shapes)
    assert merged(torch.randn(2, 40, WIDTH)).shape == (2, 40, WIDTH)
    with pytest.raises(NothingToMerge, match="is computed from sizes that may change"):
        tldr_compile.apply(Masked(near), (h,), schedule=[4], dynamic_shapes=shapes)


class MaskedMean(nn.Module):
    """A mean over the tokens that an input mask keeps, in two spellings, and their number."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = Tiny().eval()

    def forward(self, video: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        h = self.tokens(video, tokens=True)["tokens"]
        wide = keep.unsqueeze(-1).expand(h.shape).to(h.dtype)
        short = (h * keep.unsqueeze(-1)).sum(1) / keep.sum(1, keepdim=True)
        return short, (h * wide).sum(1) / wide.sum(1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32], ids=str)
def test_a_masked_mean_divides_by_what_it_sums(dtype: torch.dtype) -> None:
    keep = torch.ones(2, TOKENS)
    keep[1, 12:] = 0
    model, inputs = MaskedMean().eval(), (clip(), keep.to(dtype))
    with torch.no_grad():
        merged = tldr_compile.apply(model, inputs, schedule=[6, 4], verify=True)
        short, wide = merged(*inputs)
        assert_same(short, wide)


def test_an_integer_count_is_exact() -> None:
    def forward(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + s.attend(x)
        return (x > 0).sum(1), x

    count, tokens = applied(forward, schedule=[20])(picture())
    assert torch.equal(count, (tokens > 0).sum(1))
