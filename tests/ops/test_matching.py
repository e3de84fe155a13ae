"""Matching, block by block, against the specification."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from tldr_compile import ops
from tldr_compile.ops import blocked, reference


@given(st.integers(0, 4), st.integers(2, 30), st.integers(1, 2000), st.sampled_from([torch.float32, torch.bfloat16]))
def test_equals_the_specification_for_any_block(batch: int, tokens: int, budget: int, dtype: torch.dtype) -> None:
    metric = torch.randn(batch, tokens, 6, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(blocked.BLOCK_BYTES, "cpu", budget)
        similarity, destination = ops.match(metric)
    expected = reference.match(metric)
    torch.testing.assert_close(similarity, expected[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(destination, expected[1])


def test_between_equals_the_first_wins() -> None:
    assert ops.match(torch.ones(1, 6, 3))[1].tolist() == [[0, 0, 0]]


def test_operator_is_registered_soundly() -> None:
    tokens = torch.randn(2, 7, 4)
    torch.library.opcheck(
        torch.ops.tldr.best, (tokens[:, ::2], tokens[:, 1::2]), test_utils=("test_schema", "test_faketensor")
    )


def test_no_matrix_of_all_pairs_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocked.BLOCK_BYTES, "cpu", 16 * 1024 * 4)
    metric = torch.randn(1, 2048, 4)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        ops.match(metric)
    assert max(event.self_cpu_memory_usage for event in watched.events()) < 1024 * 1024 * 4 / 4
