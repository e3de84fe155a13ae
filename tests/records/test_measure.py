"""Measurements that can be known beforehand."""

from __future__ import annotations

import pytest
import torch

from tldr_compile.records import measure

CPU = torch.device("cpu")


def test_every_other_round_runs_backwards() -> None:
    order: list[str] = []
    ticks: list[int] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    taken = measure.alternate(calls, CPU, rounds=3, tick=lambda: ticks.append(1))
    assert "".join(order) == "abbaab"
    assert [len(seconds) for seconds in taken.values()] == [3, 3]
    assert len(ticks) == 6


def test_ratios_are_those_of_pairs() -> None:
    assert measure.ratio([4.0, 9.0, 1.0], [2.0, 3.0, 1.0]) == measure.Spread(1.0, 2.0, 3.0)


def test_peak_is_what_tensors_hold_at_once() -> None:
    weight = torch.zeros(1000)

    def call() -> torch.Tensor:
        first = weight + 1  # 4000 bytes
        second = torch.cat([first, first])  # 8000 more
        del first
        return second[:1000].clone()  # 4000 more, after 4000 went

    assert measure.peak_bytes(call, CPU) == 12_000


def test_distance() -> None:
    far = measure.distance(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]]))
    assert far == pytest.approx((1.0, 2**0.5 / 5, 0.96, False))
    assert measure.distance(torch.ones(1, 3), torch.ones(1, 3)) == pytest.approx((0.0, 0.0, 1.0, True))
