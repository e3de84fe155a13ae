"""What the report says of what is not merged: the operator, the line of the model, the reason; more if it is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tldr_compile

T, H, W, C = 2, 4, 4, 16
CLIP = torch.randn(2, 3, T, H, W)


class Limited(nn.Module):
    """A module in another: its line is the one to name."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.renorm(x, 2, 0, 1.0)


class Model(nn.Module):
    """A block over all tokens, an operator without a rule, attention of one query, a softmax that is no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Conv3d(3, C, 1), nn.Linear(C, C)
        self.limited = Limited()
        self.query = nn.Parameter(torch.randn(1, 1, C))

    def forward(self, clip: Tensor) -> Tensor:
        x = self.embed(clip).flatten(2).mT
        x = x + F.scaled_dot_product_attention(x, x, x)
        x = self.limited(self.out(x))
        pooled = F.scaled_dot_product_attention(self.query.expand(len(x), -1, -1), x, x)
        return pooled.softmax(1)


@pytest.fixture(scope="module")
def report() -> tldr_compile.Report:
    return tldr_compile.explain(Model().eval(), (CLIP,), schedule=[8], verbose=True)


def line(text: str) -> str:
    number = next(
        k for k, each in enumerate(Path(__file__).read_text().splitlines(), 1) if each.strip().startswith(text)
    )
    return f'"{__file__}", line {number}, in forward'


def test_a_restoration_names_its_line(report: tldr_compile.Report) -> None:
    (restored,) = (each for each in report.restorations if each["operator"] == "aten.renorm.default")
    place = line("return torch.renorm")
    assert restored["line"] == place
    assert restored["reason"] == "it has no typing rule"
    assert f"aten.renorm.default renorm ({place}): it has no typing rule" in str(report)


def test_what_is_no_site_and_no_attention_names_its_line(report: tldr_compile.Report) -> None:
    facts = report.to_dict()
    assert [each["line"] for each in facts["not_sites"]] == [line("pooled =")]
    assert [each["line"] for each in facts["not_attention"]] == [line("return pooled.softmax")]
    assert facts["not_attention"][0]["operator"] == "aten.softmax.int"


def test_verbose_shows_the_typed_graph_around(report: tldr_compile.Report) -> None:
    after = str(report).split("it has no typing rule\n")[1]
    assert after.splitlines()[0].split() == ["linear", "aten::linear", "[b", "x", "t·H·W", "x", "16]"]
    assert after.splitlines()[1].startswith("    > renorm")


def test_a_refused_site_names_its_line() -> None:
    class Causal(nn.Module):
        def forward(self, clip: Tensor) -> Tensor:
            x = clip.flatten(2).mT
            return x + F.scaled_dot_product_attention(x, x, x, is_causal=True)

    with pytest.raises(tldr_compile.NothingToMerge) as refused:
        tldr_compile.apply(Causal(), (CLIP,), schedule=[8])
    place = line("return x + F.scaled_dot_product_attention(x, x, x, is_causal=True)")
    assert f"it is causal: the order of its tokens carries meaning ({place})" in str(refused.value)
