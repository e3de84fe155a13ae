"""The table of families says what the reports say, and what cannot be traced has a row all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from benchmarks import families, timing
from benchmarks.families import FAMILIES, HEAD, MARKER, facts, line, table
from benchmarks.models import Packed, Spec
from tests.tiny import Tiny


class Branching(nn.Module):
    def forward(self, video: Tensor) -> Tensor:
        return video.mean() if video.sum() > 0 else video.amax()


def missing() -> nn.Module:
    raise ModuleNotFoundError("No module named 'nobody'", name="nobody")


TINY = Spec("Tiny", lambda: Tiny(4), (3, 4, 12, 12))
SPECS = {
    "tiny": TINY,
    "branching": Spec("Branching", Branching, (3, 4, 12, 12)),
    "absent": Spec("Absent", missing, (3, 4, 12, 12)),
}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(families, "FAMILIES", SPECS)
    monkeypatch.setattr("sys.argv", ["families", *arguments])
    families.main()


def test_rows_of_tiny_models(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch)
    head, _, tiny, branching, absent = capsys.readouterr().out.strip().splitlines()
    assert head == f"| {' | '.join(HEAD)} |"
    report = facts(TINY)
    merged = [site for site in report["sites"] if site["status"] == "merged"]
    assert 0 < len(merged) <= 4
    assert f"| Tiny | {report['gflops_before']:.1f} |" in tiny
    assert f"| {len(merged)} of 4 |" in tiny
    assert branching.startswith("| Branching | - | - | - | - | not traced: ")
    assert absent == "| Absent | - | - | - | - | not installed: nobody |"


def test_only_those_that_are_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "--only", "absent")
    assert len(capsys.readouterr().out.strip().splitlines()) == 3


def test_a_wrong_name_is_an_error_that_lists_the_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "--only", "tny")
    told = capsys.readouterr().err
    assert "'tny'" in told
    assert all(name in told for name in SPECS)


def test_the_page_and_the_record_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"a\n{MARKER}\nold\n{MARKER}\nb")
    write = timing.write
    with mock.patch.object(timing, "write", lambda name, record: write(name, record, tmp_path)):
        run(monkeypatch, "--write", str(page))
    kept = json.loads((tmp_path / "families.json").read_text())
    assert page.read_text() == f"a\n{MARKER}\n{table(kept['reports'])}\n{MARKER}\nb"
    assert {"date", "device", "torch", "transformers"} <= set(kept["machine"])
    assert {"torchvision", "timm", "fraction"} <= set(kept)


def report(after: float = 70.0, **site: Any) -> dict[str, Any]:
    def one(status: str, node: str, reason: str = "", **more: Any) -> dict[str, Any]:
        return {"status": status, "node": node, "reason": reason, "tokens": "h·w", "batch": "b·t", **more}

    refused = [one("refused", f"product_{number}", "too far; it stands elsewhere") for number in range(2)]
    others = [{"node": "product_9", "operator": "aten.product.default", "reason": "its keys are others"}]
    left = one("left", "product_8", "merging here costs more than it saves")
    sites = [one("merged", "product", **site), one("merged", "product_3", **site), left, *refused]
    return {
        "sites": sites,
        "not_sites": others,
        "not_attention": [],
        "gflops_before": 100.0,
        "gflops_after": after,
    }


def test_a_line_says_what_is_grouped_and_why_the_rest_is_not() -> None:
    assert line("M", report(grouping="run h·w; apart b; shared t")) == (
        *("M", "100.0", "70.0 (70%)", "`run h·w; apart b; shared t` x 2", "2 of 6"),
        "`product`: too far (2 of 4)",
    )


def test_an_attention_that_is_no_site_is_named_by_its_operator() -> None:
    told = report()
    told["not_sites"] = told["not_sites"] * 3
    assert line("M", told)[-2:] == ("2 of 8", "`aten.product.default`: its keys are others (3 of 6)")


def test_a_report_without_groupings_tells_tokens_and_batch() -> None:
    assert line("M", report())[3] == "`h·w per b·t` x 2"


def test_what_costs_more_than_dense_is_flagged() -> None:
    assert line("M", report(after=101.0))[2] == "**101.0 (101%): more than dense**"
    assert line("M", report(after=100.0))[2] == "100.0 (100%)"


def test_a_packed_input_has_a_grid_for_each_clip() -> None:
    patches, grids = Packed("P", nn.Identity, (5,), clip_batch=12, grid=(1, 3, 4)).inputs(2)
    assert patches.shape == (24, 5)
    assert grids.tolist() == [[1, 3, 4]] * 2


@pytest.mark.parametrize("name", [name for name, spec in FAMILIES.items() if isinstance(spec, Packed)])
def test_packed_grids_hold_all_patches(name: str) -> None:
    patches, grids = FAMILIES[name].inputs(2)
    assert len(patches) == int(torch.prod(grids, 1).sum())
