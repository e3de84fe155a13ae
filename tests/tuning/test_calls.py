"""Clips as calls."""

from __future__ import annotations

import pytest
import torch

from tldr_compile.errors import OptionError
from tldr_compile.tuning.calls import calls_of, digest


def test_the_last_call_is_filled_up() -> None:
    clips = torch.arange(10.0).reshape(5, 2)
    calls = calls_of(clips, 2)
    assert [call.clips for call in calls] == [2, 2, 1]
    assert calls[-1].args[0].tolist() == [[8, 9], [8, 9]]
    assert torch.cat([call.args[0][: call.clips] for call in calls]).equal(clips)


def test_few_clips_are_two_calls() -> None:
    assert [call.clips for call in calls_of(torch.zeros(3, 2), 16)] == [1, 1, 1]


def test_entries_of_a_sequence_are_calls() -> None:
    calls = calls_of([(torch.zeros(2, 3), None), (torch.ones(2, 3), None)], 16)
    assert [len(call.args) for call in calls] == [2, 2]
    assert [call.clips for call in calls] == [2, 2]


def test_arguments_are_structures_too() -> None:
    clips = torch.zeros(2, 3)
    calls = calls_of([([each], {"sizes": [1, 2]}) for each in (clips, clips + 1)], 16)
    assert [call.clips for call in calls] == [2, 2]


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        (torch.zeros(0, 2), "holds no clip: at least two"),
        (torch.zeros(1, 2), "holds one clip: at least two"),
        ([torch.zeros(1, 2), torch.zeros(1, 3)], "calls of several shapes"),
        ([3.5, 4.5], "float without a tensor"),
        ([([torch.zeros(1, 2)], {}), ([torch.zeros(1, 3)], {})], "calls of several shapes"),
        (3, "clips= is int"),
    ],
)
def test_clips_of_no_use(clips: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        calls_of(clips, 16)  # type: ignore[arg-type]


def test_other_clips_have_another_digest() -> None:
    clips = torch.randn(4, 2)
    assert digest([clips]) == digest([clips.clone()]) != digest([clips.flip(0)])
    assert len({digest([value]) for value in (torch.tensor(1), torch.tensor(2), torch.tensor(1.0), 1, "1")}) == 5
