"""Tuning as a whole, on a model of the smallest size."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tldr_compile
from tests.tiny import Tiny, clip
from tldr_compile import NothingToMerge, OptionError, ScheduleError, TldrError, TokenMerging, ops
from tldr_compile.passes.plan import meeting
from tldr_compile.presets import Preset
from tldr_compile.records.charts import draw
from tldr_compile.tuning import Tuned, judge, page, search, tune, tuner, ways
from tldr_compile.tuning.store import FILE, _key
from tldr_compile.tuning.tuner import TUNED

BUDGET, CLIPS = 0.8, 12


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few ways and shapes to choose from, and one round of steps."""
    monkeypatch.setattr(ways, "SHAPES", {name: ways.SHAPES[name] for name in ("every site", "less and less")})
    monkeypatch.setattr(ways, "MARGINS", (0.5,))
    for name in set(ops.SIGNALS) - {"attention", "uniform"}:
        monkeypatch.delitem(ops.SIGNALS, name)
    monkeypatch.setattr(search, "ROUNDS", 1)
    monkeypatch.setattr(search, "FIRST_CLIPS", 2)


def tuned(folder: Path | None = None, **options: Any) -> Tuned:
    torch.manual_seed(0)
    return tune(Tiny(2).eval(), clip(CLIPS), **{"budget": BUDGET, "batch": 2, "folder": folder, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tuned")


def test_it_is_the_best_of_all_that_saw_the_choosing_clips_and_meets_the_budget(folder: Path) -> None:
    found = tuned(folder)
    assert found.rows[0].name == TUNED
    assert 0.9 * BUDGET < found.rows[0].part <= BUDGET
    calls = CLIPS // 2
    choosing = random.Random(0).sample(range(calls), calls)[: calls // 2]
    distances: dict[str, dict[int, float]] = defaultdict(dict)
    for line in map(json.loads, (folder / FILE).read_text().splitlines()[1:]):
        if "solved" in line:
            continue
        distances[line["config"]][line["call"]] = sum(line["distance"])
    means = {key: sum(by[call] for call in choosing) for key, by in distances.items() if {*choosing} <= {*by}}
    ours = means[_key(replace(found.config, made_for={}))]
    assert len(means) >= len(ways.BUILT_IN)
    assert ours == min(means.values()) < max(means.values())
    assert (found.choosing, found.reporting) == (CLIPS // 2, CLIPS // 2)


def test_an_interrupted_run_goes_on_and_finds_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned(folder)
    before = (folder / FILE).read_text().splitlines()
    (folder / FILE).write_text("".join(f"{line}\n" for line in before[: 4 * len(before) // 5]))
    again = tuned(folder)
    assert {*(folder / FILE).read_text().splitlines()} == {*before}

    def meeting_once(budget: float, planned: Any) -> Any:
        meeting(budget, planned)  # raises, where a way cannot meet it
        pytest.fail("a budget that was met is solved again")

    monkeypatch.setattr(judge, "meeting", meeting_once)
    assert again == tuned(folder)


def test_apply_takes_the_file_for_models_with_as_many_sites(folder: Path, tmp_path: Path) -> None:
    found = tuned(folder)
    found.config.save(tmp_path / "config.json")
    assert TokenMerging.load(tmp_path / "config.json") == found.config
    torch.manual_seed(0)
    model, video = Tiny(2).eval(), clip()
    merged = tldr_compile.apply(model, (video,), config=tmp_path / "config.json")
    assert merged.report.gflops[1] / merged.report.gflops[0] == pytest.approx(found.rows[0].part, rel=1e-6)
    with pytest.raises(TldrError, match="for a model with 2 attention sites"):
        tldr_compile.apply(Tiny(3).eval(), (video,), config=tmp_path / "config.json")


def test_table_and_picture(folder: Path, tmp_path: Path) -> None:
    found = tuned(folder)
    text = page.table(found)
    assert f"| {TUNED} | " in text
    assert all(f"| {name} | " in text for name in ways.BUILT_IN)
    assert "6 clips; the table is of 6 others" in text
    assert draw([page.chart(found)], tmp_path / "tune.png").stat().st_size > 1000
    assert json.loads(json.dumps(page.record(found)))["budget"] == BUDGET


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": 0.05}, ScheduleError, r"budget=0.05: .* still costs 0\.\d+ .* give 0"),
        ({"budget": 1.5}, OptionError, "between 0 and 1"),
        ({"config": TokenMerging(schedule=0.2)}, OptionError, "says a schedule or a budget"),
        ({"config": TokenMerging(outputs="merged")}, OptionError, "compared at full length"),
        ({"objective": "accuracy"}, OptionError, "objective is 'auto', 'logits'"),
        ({"budget": None, "latency": "0.5"}, OptionError, "latency='0.5': latency is a part"),
        ({"batch": 0}, OptionError, "batch=0: batch is a number of clips"),
        ({"config": {"protect": 1}}, OptionError, "tuning takes a TokenMerging"),
    ],
)
def test_what_cannot_be_tuned(options: dict[str, Any], error: type[TldrError], message: str) -> None:
    with pytest.raises(error, match=message):
        tuned(**options)


def test_models_that_cannot_be_tuned() -> None:
    with pytest.raises(OptionError, match=r"training mode.*model\.eval\(\)"):
        tune(Tiny(1).train(), clip(4), budget=0.8)
    with pytest.raises(NothingToMerge, match="no attention of Sequential can merge tokens"):
        tune(nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 12 * 12, 3)).eval(), clip(4), budget=0.8, batch=2)

    with pytest.raises(OptionError, match="the model is ExportedProgram"):
        tune(torch.export.export(Tiny(1).eval(), (clip(2),)), clip(4), budget=0.8)  # type: ignore[arg-type]


class Random(Tiny):
    def forward(self, video: Tensor, tokens: bool = False) -> Any:
        return super().forward(F.dropout(video, training=True), tokens)


def test_a_model_that_answers_as_it_likes_is_refused() -> None:
    with pytest.raises(OptionError, match="answers the same clips differently"):
        tune(Random(2).eval(), clip(4), budget=BUDGET, batch=2)


@pytest.mark.parametrize("clips", [[0], [7]], ids=["first", "last"])
def test_clips_whose_answer_is_no_number_are_refused(clips: list[int]) -> None:
    video = clip(8)
    video[clips] = torch.nan
    with pytest.raises(OptionError, match="holds what is no number"):
        tune(Tiny(2).eval(), video, budget=BUDGET, batch=2)


@pytest.fixture
def registered() -> None:
    """Ways of which none can be used: they raise, answer with no number, or raise where their cost is counted."""

    @ops.signal("raises", reads="tokens")
    def raises(tokens: Tensor) -> Tensor:
        raise RuntimeError("as told to")

    @ops.signal("no number", reads="tokens")
    def no_number(tokens: Tensor) -> Tensor:
        return tokens.float().sum(-1) * torch.nan

    @ops.reduction("no pairs", gives=True, pairs=lambda tokens, gone: 1 // 0)
    def no_pairs(*given: Any, **more: Any) -> Any:
        raise AssertionError("its cost is counted first")


def test_what_was_registered_and_is_of_no_use_is_told_and_left_out(registered: None) -> None:
    found = tuned()
    assert {found.config.saliency, found.config.reduction}.isdisjoint({"raises", "no number", "no pairs"})
    assert "RuntimeError: as told to" in found.refused["merge, raises, tokens"]
    assert found.refused["merge, no number, tokens"] == "its answers hold what is no number"
    assert "ZeroDivisionError" in found.refused["no pairs, uniform, tokens"]


def test_what_is_searched_is_not_taken_from_the_configuration() -> None:
    given = TokenMerging(saliency="uniform", metric="keys", reduction="energy", margin=0.5)
    published = [row.config for row in tuned(config=given).rows[1:]]
    for name, told in ways.BUILT_IN.items():
        assert any(TokenMerging.from_options({"schedule": each.schedule, **told}) == each for each in published), name


def test_other_weights_are_another_run(folder: Path) -> None:
    tuned(folder)
    torch.manual_seed(5)
    with pytest.raises(OptionError, match="was made with weights"):
        tune(Tiny(2).eval(), clip(CLIPS), budget=BUDGET, batch=2, folder=folder)


def test_another_version_of_the_package_is_another_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned(folder)
    monkeypatch.setattr(tuner, "this_version", lambda: "0.0.1")
    with pytest.raises(OptionError, match=r"was made with tldr-compile '.*', and this run has '0\.0\.1'"):
        tuned(folder)


def test_a_published_schedule_for_as_many_sites_is_one_of_those_to_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "PRESETS", {"ours": Preset((9, 4), 2, "here"), "deeper": Preset((4,), 3, "here")})
    found = tuned(objective="embedding")
    (ours,) = (row for row in found.rows if row.name == "ours")
    assert "tokens by site 9, 4." in page.about(replace(found, config=ours.config))
    assert ours.config.schedule == (9, 4)
    assert ours.part <= BUDGET
    assert "deeper" not in {row.name for row in found.rows}
