"""`TokenMerging`: what it takes, how it keeps it, and what it says about everything else."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tldr_compile import OptionError, ScheduleError, TokenMerging, __version__
from tldr_compile.config import DEFAULT_SCHEDULE
from tldr_compile.presets import PRESETS


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
        ({"portable": "onnx"}, "portable is True, False or 'native'"),
        ({"portable": 1}, "portable is True, False or 'native'"),
        ({"verify": "yes"}, "verify is True or False"),
        ({"protect": -1}, "protect is 'auto' or the number of leading tokens"),
        ({"protect": True}, "protect=True"),
        ({"protect": 1.0}, "protect=1.0"),
        ({"clip": ()}, "clip is 'auto' or the names"),
        ({"clip": ["a", 3]}, "clip is 'auto' or the names"),
        ({"inductor": 3}, "inductor is a mapping"),
        ({"inductor": {"maxautotune": True}}, "Inductor has no option 'maxautotune'; did you mean 'max_autotune'"),
        ({"reduction": "drop", "saliency": "uniform"}, "use saliency='attention', or reduction='random'"),
        ({"budget": 1.0}, "budget=1.0: budget is the part of the dense operations that is left, between 0 and 1"),
        ({"budget": 0}, "budget=0"),
        ({"budget": True}, "budget=True"),
        ({"budget": float("nan")}, "budget=nan"),
        ({"budget": "0.5"}, "budget='0.5'"),
        ({"budget": 0.5, "schedule": ()}, "budget=0.5 is given together with a schedule"),
        ({"made_for": {"sites": 0}}, "sites is the number of attention sites of a model"),
        ({"made_for": {"sites": "12"}}, "'sites': '12'"),
        ({"made_for": 12}, "made_for=12: made_for is a mapping"),
        ({"made_for": {"model": int}}, "to what JSON takes: .*not JSON serializable"),
        ({"preset": "vid-tldr-umt"}, "preset is one of .*; did you mean 'vid-tldr-umt-"),
        ({"preset": "vid-tldr-umt-b", "schedule": 0.1}, "is a schedule, and schedule= is given beside it"),
        ({"preset": "vid-tldr-umt-b", "budget": 0.5}, "is a schedule, and budget= is given beside it"),
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


def test_a_budget_stands_for_a_schedule_that_is_not_known_yet() -> None:
    config = TokenMerging(budget=np.float64(0.5))
    assert type(config.budget) is float
    assert not config.is_default_schedule
    assert not config.is_zero
    assert config.is_of_one_graph
    assert config != TokenMerging(budget=0.6)
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_preset_is_a_schedule_for_a_depth_and_other_options_win() -> None:
    config = TokenMerging.preset("vid-tldr-umt-l", saliency="uniform")
    assert config == TokenMerging.from_options({"preset": "vid-tldr-umt-l", "saliency": "uniform"})
    assert (config.entries, config.saliency) == ((550, 400), "uniform")
    assert dict(config.made_for)["sites"] == 24
    assert dict(TokenMerging.preset("vid-tldr-umt-b", made_for={}).made_for) == {}
    assert TokenMerging.preset("vid-tldr-umt-b").entries == (600, 200, 100)


def test_every_preset_has_a_source_and_no_more_entries_than_sites() -> None:
    for name, preset in PRESETS.items():
        assert "arXiv:" in preset.source
        assert len(TokenMerging.preset(name).entries) <= preset.sites  # type: ignore[arg-type]


OTHERS: dict[str, Any] = {
    "schedule": [600, 0.5],
    "saliency": "shift",
    "metric": "keys",
    "reduction": "energy",
    "margin": 0.5,
    "outputs": "merged",
    "return_places": True,
    "pooling": "plain",
    "proportional": False,
    "protect": 1,
    "clip": ["video"],
    "grouping": "each",
    "on_nothing": "warn",
    "verify": True,
    "portable": True,
    "inductor": {"max_autotune": False},
    "made_for": {"sites": 12, "model": ["UMT", "B"]},
}


def test_what_is_saved_is_loaded_and_told_for_people(tmp_path: Path) -> None:
    path = tmp_path / "options.json"
    assert {*OTHERS, "budget"} >= {each.name for each in fields(TokenMerging)}
    for config in (TokenMerging(**OTHERS), TokenMerging(budget=0.5), TokenMerging()):
        config.save(path)
        assert TokenMerging.load(path) == config == TokenMerging.from_options({"config": str(path)})
    TokenMerging(**OTHERS).save(path)
    text = path.read_text(encoding="utf-8")
    assert '    "schedule": [600, 0.5],\n' in text
    written = json.loads(text)
    assert (written["format"], written["tldr-compile"]) == (1, __version__)
    assert written["for"] == OTHERS["made_for"]


def test_options_beside_a_file_win(tmp_path: Path) -> None:
    path = tmp_path / "options.json"
    TokenMerging(budget=0.5, verify=True, made_for={"sites": 12}).save(path)
    assert TokenMerging.load(path, verify=False) == TokenMerging(budget=0.5, made_for={"sites": 12})
    assert TokenMerging.load(path, schedule=0.1, made_for={}) == TokenMerging(schedule=0.1, verify=True)
    preset = TokenMerging.load(path, preset="vid-tldr-umt-l", verify=False)
    assert preset == TokenMerging.preset("vid-tldr-umt-l")


def changed(**entries: Any) -> Callable[[dict[str, Any]], object]:
    return lambda written: {**written, **entries}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (changed(options={"shedule": 0.1}), "written by tldr-compile 9.8: unknown option 'shedule'.* 'schedule'"),
        (changed(options={"made_for": {}}), "written by tldr-compile 9.8: unknown option 'made_for'"),
        (changed(options={"pooling": "max"}), "written by tldr-compile 9.8: pooling='max'"),
        (changed(options={"schedule": [-1]}), r"written by tldr-compile 9.8: schedule\[0\]=-1"),
        (changed(options=[]), "written by tldr-compile 9.8: .* have to be objects"),
        (changed(**{"for": {"sites": "12"}}), "written by tldr-compile 9.8: made_for="),
        (changed(fro={}), "written by tldr-compile 9.8: unknown entry 'fro'"),
        (changed(format=2), "written by tldr-compile 9.8 in format 2, and tldr-compile .* reads formats up to 1"),
        (changed(format=None), "is no file of options"),
        (lambda written: [written], "is no file of options"),
    ],
)
def test_a_file_that_says_something_else_is_refused_in_words(tmp_path: Path, change: Any, text: str) -> None:
    path = tmp_path / "options.json"
    TokenMerging().save(path)
    path.write_text(json.dumps(change({**json.loads(path.read_text()), "tldr-compile": "9.8"})))
    with pytest.raises((OptionError, ScheduleError), match=f"options.json.*{text}"):
        TokenMerging.load(path)


def test_what_is_no_file_of_options_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"config='.*none.json' cannot be read: No such file"):
        TokenMerging.load(tmp_path / "none.json")
    with pytest.raises(OptionError, match="config=3: config is the path of a file"):
        TokenMerging.from_options({"config": 3})
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(OptionError, match=r"deep\.json' is no JSON"):
        TokenMerging.load(tmp_path / "deep.json")
    (tmp_path / "half.json").write_text('{"format": 1')
    with pytest.raises(OptionError, match=r"half.json' is no JSON: .*TokenMerging.save writes such files"):
        TokenMerging.load(tmp_path / "half.json")
    with pytest.raises(OptionError, match=r"inductor=.* has no place in a file of options"):
        TokenMerging(inductor={"max_autotune": object()}).save(tmp_path / "object.json")
