"""Sums over groups equal the sums over the tokens that they stand for."""

import pytest
import torch
from torch import Tensor

from tldr_compile import ops

TIMES = torch.tensor([3, 1, 2, 5])


@pytest.fixture
def coarse() -> Tensor:
    return torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fine(coarse: Tensor) -> Tensor:
    return coarse.repeat_interleave(TIMES, 1)


WEIGHT = TIMES.float().view(1, 4, 1)


def test_softmax_is_a_density(coarse: Tensor, fine: Tensor) -> None:
    expected = fine.softmax(1)[:, TIMES.cumsum(0) - 1]
    torch.testing.assert_close(ops.softmax(coarse, WEIGHT, dim=1), expected)
    torch.testing.assert_close((expected * WEIGHT).sum(1), torch.ones(2, 6))


@pytest.mark.parametrize("dims", [(1,), (-2,), (1, 2), (0, 1), ()], ids=str)
@pytest.mark.parametrize("keepdim", [False, True])
def test_mean_and_sum(coarse: Tensor, fine: Tensor, dims: tuple[int, ...], keepdim: bool) -> None:
    torch.testing.assert_close(ops.mean(coarse, WEIGHT, dims=dims, keepdim=keepdim), fine.mean(dims, keepdim))
    torch.testing.assert_close(ops.sum(coarse, WEIGHT, dims=dims, keepdim=keepdim), fine.sum(dims, keepdim))


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.float16])
def test_results_have_the_dtype_asked_for_and_are_rounded_once(coarse: Tensor, dtype: torch.dtype | None) -> None:
    half = coarse.bfloat16()
    results = (
        ops.softmax(half, WEIGHT, dim=1, dtype=dtype),
        ops.mean(half, WEIGHT, dims=(1,), dtype=dtype),
        ops.sum(half, WEIGHT, dims=(1,), dtype=dtype),
    )
    exact = (
        ops.softmax(half.double(), WEIGHT, dim=1),
        ops.mean(half.double(), WEIGHT, dims=(1,)),
        ops.sum(half.double(), WEIGHT, dims=(1,)),
    )
    for found, expected in zip(results, exact, strict=True):
        assert found.dtype == (dtype or torch.bfloat16)
        torch.testing.assert_close(found, expected.to(found.dtype))


def test_softmax_of_large_values_is_finite() -> None:
    found = ops.softmax(torch.tensor([[1e4, 1e4, -1e4]]), torch.tensor([[1.0, 3.0, 9.0]]), dim=1)
    torch.testing.assert_close(found, torch.tensor([[0.25, 0.25, 0.0]]))
