"""`TokenMerging`: what it takes, how it keeps it, and what it says about everything else."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest

from tldr_compile import OptionError, ScheduleError, TokenMerging
from tldr_compile.config import DEFAULT_SCHEDULE


def test_the_default_is_marked() -> None:
    config = TokenMerging()
    assert config.is_default_schedule
    assert config.entries == DEFAULT_SCHEDULE == (0.25, 0.12, 0.06)
    assert not TokenMerging(schedule=DEFAULT_SCHEDULE).is_default_schedule
    assert replace(config, outputs="merged").is_default_schedule
    assert config != TokenMerging(schedule=DEFAULT_SCHEDULE)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([600, 0.5, 0], (600, 0.5, 0)),
        ((), ()),
        (0.25, 0.25),
        (np.float32(0.5), 0.5),
        (np.array([3, 4]), (3, 4)),
        ([np.int64(3), np.float64(0.5)], (3, 0.5)),
    ],
)
def test_a_schedule_is_kept_as_python_numbers(given: Any, kept: Any) -> None:
    config = TokenMerging(schedule=given)
    assert config.entries == kept
    entries = config.entries if isinstance(config.entries, tuple) else (config.entries,)
    assert {type(entry) for entry in entries} <= {int, float}


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (True, "schedule=True is a bool"),
        ("0.5", "schedule='0.5' is a str"),
        ({3: 4}, "is a dict"),
        ({3, 4}, "is a set"),
        (600, r"one number of tokens belongs to one site; write \[600\]"),
        (-0.5, "schedule=-0.5: a fraction of the tokens cannot be negative"),
        (1.0, "schedule=1.0: a fraction of the tokens is below 1; for a number of tokens write the int 1"),
        (float("nan"), "cannot be NaN"),
        (float("inf"), "below 1"),
        ([4, -1], r"schedule\[1\]=-1: a number of tokens to remove cannot be negative"),
        ([4, 1.5], r"schedule\[1\]=1.5: a fraction of the tokens is below 1$"),
        ([float("nan")], r"schedule\[0\]=nan"),
        ([False], r"schedule\[0\]=False is a bool"),
        (["4"], r"schedule\[0\]='4' is a str"),
        ([None], "is a NoneType"),
    ],
)
def test_what_is_no_schedule_is_refused(schedule: Any, text: str) -> None:
    with pytest.raises(ScheduleError, match=text):
        TokenMerging(schedule=schedule)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"saliency": "atention"}, "saliency is one of 'attention', 'shift', 'uniform', .*; did you mean 'attention'"),
        ({"metric": "key"}, "metric is one of 'tokens', 'keys'; did you mean 'keys'"),
        ({"reduction": None}, "reduction is one of 'merge', 'energy', 'affinity', .*'drop', 'random', 'slice'"),
        ({"margin": 0.5}, "margin=0.5: reduction='merge' reads no margin: use reduction='energy'"),
        ({"margin": 1.5, "reduction": "energy"}, "margin=1.5: margin is None or a cosine, a number above -1"),
        ({"margin": -1, "reduction": "energy"}, "margin=-1: margin is None"),
        ({"margin": True, "reduction": "energy"}, "margin=True: margin is None"),
        ({"margin": "0.5", "reduction": "energy"}, "margin='0.5': margin is None"),
        ({"outputs": "merge"}, "did you mean 'merged'"),
        ({"pooling": 1}, "pooling is one of 'mass', 'plain'"),
        ({"on_nothing": "ignore"}, "on_nothing is one of 'raise', 'warn'"),
        ({"proportional": 1}, "proportional is True or False"),
        ({"verify": "yes"}, "verify is True or False"),
        ({"protect": -1}, "protect is 'auto' or the number of leading tokens"),
        ({"protect": True}, "protect=True"),
        ({"protect": 1.0}, "protect=1.0"),
        ({"clip": ()}, "clip is 'auto' or the names"),
        ({"clip": ["a", 3]}, "clip is 'auto' or the names"),
        ({"inductor": 3}, "inductor is a mapping"),
        ({"inductor": {"maxautotune": True}}, "Inductor has no option 'maxautotune'; did you mean 'max_autotune'"),
        ({"reduction": "drop", "saliency": "uniform"}, "use saliency='attention', or reduction='random'"),
        ({"shedule": 0.1}, "unknown option 'shedule': the options of tldr are schedule, .*; did you mean 'schedule'"),
        ({"max_autotune": True}, r"it is one of Inductor's, write inductor=\{'max_autotune': \.\.\.\}"),
    ],
)
def test_what_is_no_option_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        TokenMerging.from_options(options)


def test_it_is_one_frozen_hashable_value() -> None:
    options: dict[str, Any] = {
        "schedule": [3, 0.5],
        "clip": ["video"],
        "inductor": {"max-autotune": False, "size_asserts": True},
    }
    config = TokenMerging.from_options(options)
    assert TokenMerging(reduction="energy", margin=1) == TokenMerging(reduction="energy", margin=1.0)
    assert config == TokenMerging.from_options(options)
    assert {config: 1}[TokenMerging.from_options(options)] == 1
    assert config.clip == ("video",)
    assert TokenMerging(clip="video").clip == ("video",)
    assert dict(config.inductor)["max_autotune"] is False
    assert replace(config, verify=True).inductor == config.inductor
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(FrozenInstanceError):
        config.verify = True  # type: ignore[misc]


@pytest.mark.parametrize("schedule", [(), [0, 0], 0.0, [0.0]])
def test_a_schedule_of_zeros_is_known(schedule: Any) -> None:
    assert TokenMerging(schedule=schedule).is_zero


@pytest.mark.parametrize("schedule", [None, [0, 1], 0.1])
def test_other_schedules_are_not_zero(schedule: Any) -> None:
    assert not TokenMerging(schedule=schedule).is_zero
