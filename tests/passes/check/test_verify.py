"""How close is equal, and what a rewritten graph has to be before anything runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from tests.tracing import canonical
from tldr_compile.passes.check.verify import _compare, agreement, check_shapes
from tldr_compile.passes.errors import VerificationError

INF, NAN = torch.inf, torch.nan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_coarsest_dtype_on_the_way_says_how_close(dtype: torch.dtype) -> None:
    graph = canonical(lambda x: x.to(dtype).exp().double(), torch.randn(3, 4)).graph.graph
    coarsest = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32  # saliency is float32 at best
    assert agreement(graph) == 128 * torch.finfo(coarsest).eps


SAME = [
    ([1.0, 2.0], [1.0, 2.0 + 1e-5]),
    ([0.0, 1e-30], [0.0, 0.0]),
    ([INF, NAN, 1.0], [INF, NAN, 1.0]),
]
DIFFERENT = [
    ([1.0, 2.0], [1.0, 2.1]),
    ([INF, 1.0], [-INF, 1.0]),
    ([NAN, 1.0], [0.0, 1.0]),
    ([1.0, 1.0], [NAN, 1.0]),
    ([INF, 1.0], [2.0, 1.0]),
]


@pytest.mark.parametrize(("actual", "expected"), SAME)
def test_rounding_is_no_difference(actual: list[float], expected: list[float]) -> None:
    _compare("output 0", torch.tensor(actual), torch.tensor(expected), 1e-4)


@pytest.mark.parametrize(("actual", "expected"), DIFFERENT)
def test_what_differs_is_named(actual: list[float], expected: list[float]) -> None:
    with pytest.raises(VerificationError, match="output 0 differs from its meaning by"):
        _compare("output 0", torch.tensor(actual), torch.tensor(expected), 1e-4)


def test_whole_numbers_are_equal_or_counted() -> None:
    with pytest.raises(VerificationError, match="differs from its meaning in 2 entries"):
        _compare("output 0", torch.tensor([1, 2, 3]), torch.tensor([1, 3, 4]), 1.0)


def test_a_dtype_is_part_of_the_meaning() -> None:
    with pytest.raises(VerificationError, match=r"is torch\.float32 \(2,\), but its meaning torch\.float64 \(2,\)"):
        _compare("output 0", torch.ones(2), torch.ones(2).double(), 1.0)


def graph(function: object) -> fx.GraphModule:
    return canonical(function, torch.randn(3, 4)).graph  # type: ignore[arg-type]


def test_shapes_may_change_only_where_they_are_not_restored() -> None:
    before, after = graph(lambda x: x.exp()), graph(lambda x: x[:2].exp())
    check_shapes(before, before, restored=True)
    check_shapes(before, after, restored=False)
    with pytest.raises(VerificationError, match=r"was .*\(3, 4\) and would become .*\(2, 4\)"):
        check_shapes(before, after, restored=True)


def test_dtypes_never_change() -> None:
    def half(x: Tensor) -> Tensor:
        return x.exp().half()

    with pytest.raises(VerificationError, match=r"would become torch\.float16"):
        check_shapes(graph(lambda x: x.exp()), graph(half), restored=False)
