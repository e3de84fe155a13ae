"""Operators that hide an attention: their plain spelling computes the same, and what they hide is found and merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import tldr_compile
from tests.passes.capture.test_canonicalize import capture, operators
from tldr_compile.backend import merged_graph
from tldr_compile.passes.capture.canonicalize import from_export
from tldr_compile.passes.capture.composites import encoder_layer, multi_head_attention
from tldr_compile.passes.errors import CaptureError

B, N, C, H, HIDDEN = 2, 6, 8, 2, 12
COMPOSITES = {"aten._transformer_encoder_layer_fwd.default", "aten._native_multi_head_attention.default"}


class Encoded(nn.Module):
    """Patches of a clip through `nn.TransformerEncoder`, and through an `nn.MultiheadAttention` with its weights."""

    def __init__(self, norm_first: bool = False, activation: str = "relu", attention: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv3d(3, 16, (2, 8, 8), (2, 8, 8))
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first, activation=activation)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True) if attention else None

    def forward(self, clip: Tensor) -> Tensor:
        x = self.patches(clip).flatten(2).transpose(1, 2)
        with torch.no_grad():
            x = self.encoder(x)
        if self.attention is not None:
            x = x + self.attention(x, x, x)[0]
        return x.mean(1)


def drawn(*size: int, dtype: torch.dtype) -> Tensor:
    """A weight `[to, from]` or a bias that keeps what it is given near 1, as trained ones do."""
    return torch.randn(size, dtype=dtype) * size[-1] ** -0.5


def weights(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [drawn(*size, dtype=dtype) for size in ((3 * C, C), (3 * C,), (C, C), (C,))]


def masks() -> dict[str, tuple[Tensor | None, int | None]]:
    by_pair, by_key = torch.rand(N, N) < 0.4, torch.rand(B, N) < 0.4
    by_pair[:, 0], by_key[:, 0] = False, False  # no query without a key
    return {
        "none": (None, None),
        "pairs": (by_pair, 0),
        "keys": (by_key, 1),
        "all": ((by_pair | by_key[:, None, None]).expand(B, H, N, N), 2),
        "all, not told": (by_pair.expand(B, H, N, N), None),
        "float": (torch.zeros(B, N).masked_fill(by_key, -torch.inf), 1),
        "bias": (by_pair.double() * 0.5, 0),
    }


@pytest.mark.parametrize("kind", list(masks()))
@pytest.mark.parametrize("needed", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("shared", [1, 2, 3])
def test_an_attention_is_what_the_operator_computes(kind: str, needed: tuple[bool, bool], shared: int) -> None:
    torch.manual_seed(0)
    x, y, z = (torch.randn(B, N, C, dtype=torch.float64) for _ in range(3))
    operands = {1: (x, x, x), 2: (x, y, y), 3: (x, y, z)}[shared]
    mask, mask_type = masks()[kind]
    arguments = (*operands, C, H, *weights(), mask, *needed, mask_type)
    out, attended = multi_head_attention(*arguments)
    expected, expected_attended = torch._native_multi_head_attention(*arguments)
    torch.testing.assert_close(out, expected)
    if needed[0]:
        torch.testing.assert_close(attended, expected_attended)
    else:
        assert attended.numel() == 0


@pytest.mark.parametrize("kind", list(masks()))
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_layer_is_what_the_operator_computes(kind: str, gelu: bool, norm_first: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(B, N, C, dtype=dtype)
    norms = [torch.randn(C, dtype=dtype) for _ in range(4)]
    ffn = [drawn(*size, dtype=dtype) for size in ((HIDDEN, C), (HIDDEN,), (C, HIDDEN), (C,))]
    arguments = (x, C, H, *weights(dtype), gelu, norm_first, 1e-3, *norms, *ffn, *masks()[kind])
    torch.testing.assert_close(encoder_layer(*arguments), torch._transformer_encoder_layer_fwd(*arguments))


def test_a_kind_of_mask_that_does_not_exist_is_refused() -> None:
    x, mask = torch.randn(B, N, C), torch.zeros(N, N, dtype=torch.bool)
    with pytest.raises(CaptureError, match="mask_type=3 is no kind of mask"):
        multi_head_attention(x, x, x, C, H, *weights(torch.float32), mask, False, True, 3)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("attention", [False, True])
def test_every_road_spells_it_out(norm_first: bool, activation: str, attention: bool) -> None:
    model, clip = Encoded(norm_first, activation, attention).eval(), torch.randn(2, 3, 4, 24, 24)
    with torch.no_grad():
        dynamo, tracer, outputs = capture(model, clip)
        program = torch.export.export(model, (clip,), strict=True)
        expected = model(clip)
    assert any("_transformer_encoder_layer_fwd" in str(node.target) for node in tracer.graph.nodes)  # it was there
    for captured in (dynamo, from_export(program)):
        assert not COMPOSITES & set(operators(captured))
        assert operators(captured)["aten.scaled_dot_product_attention.default"] == 2
    torch.testing.assert_close(outputs, expected)


def test_every_road_merges_with_the_same_numbers() -> None:
    torch.manual_seed(0)
    model, clip = Encoded(attention=True).eval(), torch.randn(2, 3, 4, 24, 24)
    config = tldr_compile.TokenMerging(schedule=(4, 3, 2))

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> fx.GraphModule:
        return merged_graph(gm, inputs, config)

    with torch.no_grad():
        plain = tldr_compile.apply(model, (clip,), config=config)
        strict = tldr_compile.apply(torch.export.export(model, (clip,), strict=True), config=config)
        compiled = torch.compile(model, backend=backend, fullgraph=True)(clip)
        assert [site["tokens_out"] for site in plain.report.sites] == [14, 11, 9]
        torch.testing.assert_close(strict(clip), plain(clip))
        torch.testing.assert_close(compiled, plain(clip))
        assert not torch.allclose(plain(clip), model(clip), atol=1e-6)  # something was merged


def test_a_nested_tensor_is_refused_by_name() -> None:
    x = torch.nested.nested_tensor([torch.randn(3, C), torch.randn(N, C)])
    with pytest.raises(CaptureError, match=r"an operand is a nested tensor.*enable_nested_tensor=False"):
        multi_head_attention(x, x, x, C, H, *weights(torch.float32))


def test_an_input_that_is_nested_is_refused_by_name() -> None:
    class Sums(nn.Module):
        def forward(self, samples: Tensor) -> Tensor:
            return samples.sum(-1)

    x = torch.nested.nested_tensor([torch.randn(3, C), torch.randn(N, C)], layout=torch.jagged)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"samples.* is a nested tensor"):
        capture(Sums(), x)
