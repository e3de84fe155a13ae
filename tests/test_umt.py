"""The test model and the hand-written baselines are the authors' own mathematics."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from benchmarks.golden import ENCODERS, assert_golden, golden_encoder
from benchmarks.handwritten import Handwritten
from benchmarks.umt import UMT, UMTConfig, sinusoid
from tests.randomize import randomize


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ENCODERS)
def test_dense_encoder_is_golden(name: str, attn: Literal["sdpa", "eager"]) -> None:
    golden = golden_encoder(name, attn)
    with torch.no_grad():
        outputs = golden.model(golden.video)
    for actual, expected in zip(outputs, golden.base, strict=True):
        assert_golden(actual, expected)


@pytest.mark.parametrize("name", ENCODERS)
def test_handwritten_vid_tldr_is_golden(name: str) -> None:
    golden = golden_encoder(name)
    with torch.no_grad():
        encoded = Handwritten(golden.model, golden.schedule, "vid-tldr").encode(golden.video)
    assert encoded.mass is not None
    assert_golden(encoded.mass, golden.mass)
    for actual, expected in zip((encoded.tokens, *encoded.hidden), golden.merged, strict=True):
        assert_golden(actual, expected)


@pytest.mark.parametrize("method", ["vid-tldr", "tome", "slice"])
def test_handwritten_with_an_empty_schedule_is_dense(method: Literal["vid-tldr", "tome", "slice"]) -> None:
    golden = golden_encoder("encoder1")
    with torch.no_grad():
        outputs = Handwritten(golden.model, (), method)(golden.video)
    for actual, expected in zip(outputs, golden.base, strict=True):
        assert_golden(actual, expected)


def test_tome_keeps_the_number_of_tokens_as_mass() -> None:
    golden = golden_encoder("encoder0")
    with torch.no_grad():
        encoded = Handwritten(golden.model, golden.schedule, "tome").encode(golden.video)
    assert encoded.mass is not None
    assert [x.shape[1] for x in encoded.hidden] == list(golden.tokens[1:])
    torch.testing.assert_close(encoded.mass.sum((1, 2)), torch.full((2,), 64.0), rtol=0, atol=0)


def test_slice_is_the_model_when_dropping_after_its_last_attention() -> None:
    model = UMT(UMTConfig(image=16, frames=2, patch=8, dim=12, depth=2, heads=2))
    randomize(model.eval(), seed=0)
    video = torch.randn(2, 3, 2, 16, 16)
    with torch.no_grad():
        floor = Handwritten(model, (0, 3), "slice")(video)
        torch.testing.assert_close(floor, model(video)[:, :-3])


def test_logits_are_those_of_the_mass_weighted_mean() -> None:
    model = UMT(UMTConfig(image=16, frames=2, patch=8, dim=12, depth=2, heads=2, classes=4))
    randomize(model.eval(), seed=0)
    video = torch.randn(2, 3, 2, 16, 16)
    merged = Handwritten(model, (3, 1), "vid-tldr")
    with torch.no_grad():
        encoded = merged.encode(video)
        assert encoded.mass is not None
        pooled = (encoded.mass * encoded.tokens).sum(1) / encoded.mass.sum(1)
        torch.testing.assert_close(merged(video), model.head(pooled))


def test_sinusoid_tells_every_position_apart() -> None:
    table = sinusoid(27, 9)
    assert table.shape == (1, 27, 9)
    assert torch.cdist(table, table)[0].fill_diagonal_(1).min() > 0.1
