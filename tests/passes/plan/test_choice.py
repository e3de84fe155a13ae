"""Which grouping a site gets, and that it is told why; what `grouping=` cannot have says what can be had."""

from __future__ import annotations

from typing import Any

import pytest

import tldr_compile
from tests.laws.grouped import MODELS
from tldr_compile import Report
from tldr_compile.errors import OptionError, ScheduleError
from tldr_compile.passes.plan import cost

pytestmark = pytest.mark.filterwarnings("ignore:tldr. the merged graph costs")  # these models are small


def explained(name: str, **options: Any) -> Report:
    model = MODELS[name]
    return tldr_compile.explain(model.build(), (model.noise(),), **options)


def groupings(report: Report) -> list[str]:
    return [site["grouping"] for site in report.sites if site["status"] == "merged"]


def test_one_grouping_for_all_frames_where_attention_along_time_follows() -> None:
    report = explained("divided: frames in the batch", schedule=0.3)
    assert groupings(report) == ["run h·w; apart b; shared t"] * 2
    ((reason, sites),) = report.groupings.items()
    assert sites == [1, 3]
    assert reason.startswith("one grouping for all t removes a barrier: aten.scaled_dot_product_attention.default")
    assert f"grouping of sites 1, 3: {reason}" in str(report)


def test_what_costs_no_less_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "of", lambda plan: 1.0)
    report = explained("divided: frames in the batch", schedule=[0, 4, 0, 4])
    assert groupings(report) == ["run h·w; apart b·t"] * 2
    assert report.groupings == {}


@pytest.mark.parametrize(
    ("name", "why"),
    [("divided: causal", "it is causal"), ("divided: causal by mask", "hides some of its tokens from others")],
)
def test_frames_that_the_model_keeps_apart_share_none(name: str, why: str) -> None:
    report = explained(name, schedule=0.3)
    assert set(groupings(report)) == {"run h·w; apart b·t"}
    assert any(why in reason for reason in report.groupings)
    with pytest.raises(OptionError, match=f"no site can share one grouping: .*{why.removeprefix('but ')}.*'each'"):
        explained(name, schedule=0.3, grouping="shared")


def test_frames_that_leave_one_by_one_share_none() -> None:
    with pytest.raises(OptionError, match=r"not known to be all of it.* Use grouping='auto' or 'each'"):
        explained("divided: frames leave one by one", schedule=0.3, grouping="shared")


def test_blocks_that_nothing_joins_are_refused() -> None:
    with pytest.raises(OptionError, match=r"joins tokens in blocks.* Use grouping='auto' or 'each'"):
        explained("keys: memory", schedule=0.3, grouping="blocks")


def test_numbers_of_tokens_divide_by_what_is_carried() -> None:
    name = "blocks: pixel shuffle"
    whole = explained(name, schedule=[8, 0])
    assert [site["tokens_in"] - site["tokens_out"] for site in whole.sites] == [8, 0]
    assert groupings(whole) == ["run h1·w1; apart b; carried h2·w2"]
    assert "no more than half" not in str(whole)
    with pytest.raises(ScheduleError, match=r"schedule\[0\] = 6, but site 0 .* in blocks of 4"):
        explained(name, schedule=[6], grouping="blocks")


def test_what_rounds_to_nothing_on_few_blocks_goes_at_the_next_site() -> None:
    """0.06 of 15 blocks is no block, and twice that is one."""
    report = explained("blocks: pixel shuffle", schedule=[0.06, 0.06], grouping="blocks")
    assert [site["tokens_in"] - site["tokens_out"] for site in report.sites] == [0, 4]


def test_a_site_counts_the_protected_tokens_of_all_frames() -> None:
    report = explained("joint: a class token for every frame", schedule=[6])
    assert {site["protected"] for site in report.sites} == {3}
    assert groupings(report) == ["run h·w; apart b·t"]
    assert report.sites[0]["tokens_in"] - report.sites[0]["tokens_out"] == 6  # two of each of three frames


def test_a_number_that_does_not_divide_keeps_the_finest_and_says_so() -> None:
    report = explained("blocks: pixel shuffle", schedule=[6, 0])
    assert groupings(report) == ["run h1·h2·w1·w2; apart b"]
    assert any("not taken: schedule[0] = 6" in reason for reason in report.groupings)


def test_the_finest_is_had_by_asking() -> None:
    report = explained("blocks: in order", schedule=[4, 4], grouping="each")
    assert groupings(report) == ["run h1·w1·h2·w2; apart b"] * 2
    assert report.groupings == {}


def test_all_tokens_may_go_on_as_windows() -> None:
    report = explained("windows: then all", schedule=0.3)
    assert set(groupings(report)) == {"run h2·w2; apart b·h1·w1"}
    assert any("a grouping for each of b·h1·w1" in reason for reason in report.groupings)
    assert [each["operator"] for each in report.restorations if each["operator"] != "output"] == []
