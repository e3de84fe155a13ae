"""The coverage walk finds, builds and judges encoders, and says what it found."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from benchmarks.timing import RESULTS
from tests.conformance import coverage
from tests.conformance import verdict as judging
from tests.conformance.coverage import (
    MARKER,
    TOWERS_MARKER,
    exported,
    leaving,
    line,
    part,
    shard,
    summary,
    table,
    tables,
    towers,
    write,
)
from tests.conformance.encoders import CLIPS, IMAGES, TOWERS, VIDEO, Built, Encoder, build, discover
from tests.conformance.inputs import KINDS, STRIPS, apart
from tests.conformance.shrink import Recipe, shrink
from tests.conformance.verdict import (
    CRASHED,
    EXPORTER,
    LITTLE,
    MERGED,
    NO_RULE,
    NOT_BUILT,
    PARTLY,
    REFUSED,
    TORCH,
    WRONG,
    Record,
    Traced,
    attends,
    judge,
    reported,
    verdict,
)
from tests.conformance.walk import walk
from tests.laws.independence import Apart
from tldr_compile import ops
from tldr_compile.api import capture

VIT = Encoder("transformers.models.vit.modeling_vit", "ViTModel")
TIMESFORMER = Encoder("transformers.models.timesformer.modeling_timesformer", "TimesformerModel")
QWEN = Encoder("transformers.models.qwen3_vl.modeling_qwen3_vl", "Qwen3VLVisionModel", TOWERS)
CONVOLUTIONS = Encoder("transformers.models.resnet.modeling_resnet", "ResNetModel")
KEPT = {"Zero": "kept", "Restore": "kept", "Projection": "kept", "Samples": "kept"}


def record(**facts: Any) -> Record:
    return {
        "name": "M",
        "module": "m",
        "sites": [],
        "restorations": [],
        "misses": [],
        "nothing": None,
        "softmax": False,
        "laws": KEPT,
        "attends": True,
        "verdict": MERGED,
        "reason": "",
        "seconds": 1.0,
    } | facts


def site(status: str = "merged", reason: str = "", **facts: str) -> dict[str, str]:
    return {"tokens": "h·w", "batch": "b", "status": status, "reason": reason} | facts


def saving(part: float | None, nothing: str | None = None) -> dict[str, Any]:
    return {"part": part, "nothing": nothing}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_partition_the_list(count: int) -> None:
    items = [str(number) for number in range(17)]
    parts = [shard(items, number, count) for number in range(1, count + 1)]
    assert sorted(chain(*parts)) == sorted(items)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "-1/2", "1/0"])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"is not I/N with 1 <= I <= N"):
        part(text)


def test_a_shard_is_read() -> None:
    assert part("2/4") == (2, 4)


def test_one_encoder_of_every_configuration_is_found() -> None:
    encoders, _ = discover()
    configs = [encoder.load().config_class for encoder in encoders]
    assert VIT in encoders
    assert CONVOLUTIONS in encoders
    assert len(set(configs)) == len(configs) > 150


def test_encoders_are_sorted_by_what_they_are_for() -> None:
    """Facts of the library: a configuration that is part of one of pixels and text, or that is one itself."""
    sections = {encoder.name: encoder.section for encoder in discover()[0]}
    towers = ("CLIPVisionModel", "CLIPForImageClassification", "Qwen2VisionTransformerPretrainedModel")
    assert {sections[name] for name in towers} == {TOWERS}
    assert sections["PixtralVisionModel"] == TOWERS  # the part that a family has unless it is given another
    assert sections["UnlimitedOcrSamVisionEncoder"] == TOWERS  # a part of a part
    assert sections["ViTModel"] == IMAGES  # such a part too, but it has heads of its own
    assert sections["SamModel"] == IMAGES  # it has a vision part, and reads no text
    assert sections["PeVideoEncoder"] == VIDEO  # its pixels are called those of videos


def test_inputs_with_time_are_made_here() -> None:
    assert set(CLIPS) <= KINDS.keys()


def test_a_transformer_is_merged_and_keeps_the_laws() -> None:
    stages: list[str] = []
    found = judge(VIT, stages.append)
    assert (found["verdict"], found["reason"]) == (MERGED, "")
    assert [each["status"] for each in found["sites"]] == ["merged"] * 3
    assert found["laws"] == KEPT
    assert found["attends"]
    assert found["captured"] == TORCH
    assert found["leaving"]["tokens"][1] == "49"
    assert stages[0] == "building it"
    assert json.loads(json.dumps(found)) == found


def test_what_a_video_model_saves_is_judged() -> None:
    stages: list[str] = []
    found = judge(TIMESFORMER, stages.append)
    assert found["section"] == VIDEO
    assert found["saving"]["nothing"] is None
    assert 0.1 < found["saving"]["part"] < 0.9
    assert "counting what schedule=0.3 saves" in stages
    assert json.loads(json.dumps(found)) == found


@pytest.fixture(scope="module")
def packed() -> Built:
    """A tiny tower of two clips of two frames in one row, which `torch.export` does not capture."""
    config = transformers.models.qwen3_vl.configuration_qwen3_vl.Qwen3VLVisionConfig(
        hidden_size=32, intermediate_size=64, depth=2, num_heads=2, out_hidden_size=32, patch_size=4,
        num_position_embeddings=16, deepstack_visual_indexes=[0],
    )  # fmt: skip
    torch.manual_seed(0)
    model = QWEN.load()(config).eval()
    inputs = {"hidden_states": torch.randn(256, 96), "grid_thw": torch.tensor([[2, 8, 8]] * 2)}
    return Built(model, inputs, "tiny", "packed patches of clips")


def test_a_tower_of_packed_frames_is_captured_by_the_exporter(packed: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "build", lambda encoder: packed)
    found = judge(QWEN, lambda _: None)
    assert (found["verdict"], found["reason"]) == (MERGED, "")
    assert (found["captured"], found["section"]) == (EXPORTER, TOWERS)
    assert [each["status"] for each in found["sites"]] == ["merged"] * 2
    assert found["laws"] == KEPT
    assert found["trace"] == "kept"
    assert found["attends"]
    assert 0.1 < found["saving"]["part"] < 0.9
    left, full = map(int, found["leaving"]["tokens"])
    assert 16 <= left < full == 64
    assert json.loads(json.dumps(found)) == found


def test_a_frame_that_sees_another_of_its_row_is_found(packed: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = Traced(*capture(packed.model, (), packed.inputs))
    compared = Apart.of(traced.dense(), (), packed.inputs, apart(packed.kind, packed.inputs)).compared
    assert [text.partition(": ")[2] for text in compared] == [
        "128 of 256 slices of output 0", "32 of 64 slices of output 1", "32 of 64 slices of output 2",
    ]  # fmt: skip
    assert judging._samples(traced.merged(schedule=0.3), traced, packed) == {"Samples": "kept"}
    # Frames are the batch of what is compared: each is told of all.
    leak = ops.Measure(("tokens",), lambda tokens: tokens * tokens.mean((0, 1)))
    monkeypatch.setitem(ops.METRICS, "row", leak)
    seen = judging._samples(traced.merged(schedule=0.3, metric="row"), traced, packed)["Samples"]
    assert seen.startswith("input 0, second half of dimension 0: output 0 at [")


def test_the_pictures_of_a_strip_lie_along_its_last_dimension() -> None:
    assert apart(STRIPS, {"pixel_values": torch.zeros(1, 3, 4, 64)}) == (3,)
    assert apart("clips", {"pixel_values": torch.zeros(2, 4, 3, 8, 8)}) == (0, 1)
    assert apart("pictures", {"pixel_values": torch.zeros(2, 3, 8, 8)}) == (0,)


class Unequal(transformers.PreTrainedModel):
    """What neither tracer captures."""

    config_class = transformers.PreTrainedConfig

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


def test_what_nothing_captures_has_the_reason_of_the_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Unequal(transformers.PreTrainedConfig())
    monkeypatch.setattr(judging, "build", lambda encoder: Built(model, {"x": torch.ones(2, 3)}, "tiny", "patches"))
    monkeypatch.setattr(
        "tldr_compile.exporters.capture", lambda *call: (_ for _ in ()).throw(ValueError("told\n\nand paths"))
    )
    found = judge(QWEN, lambda _: None)
    assert (found["verdict"], found["reason"]) == (REFUSED, "does not trace: ValueError: told")
    assert "captured" not in found


def test_the_grouping_of_a_site_is_kept() -> None:
    told = {"index": 0, "line": "", **site(grouping="run h·w; apart b")}
    report = {"sites": [told], "restorations": [], "not_attention": [], "gflops_before": 2.0, "gflops_after": 1.0}
    assert reported(report)["sites"] == [site(grouping="run h·w; apart b")]


def test_convolutions_have_no_attention() -> None:
    found = judge(CONVOLUTIONS, lambda _: None)
    assert (found["verdict"], found["reason"], found["attends"]) == (REFUSED, "no attention", False)


class Attention(nn.Module):
    def __init__(self, spelled: bool, queries: int) -> None:
        super().__init__()
        self.spelled, self.queries = spelled, queries

    def forward(self, x: Tensor) -> Tensor:
        q = x[:, :, : self.queries]
        if self.spelled:
            return (q @ x.transpose(-1, -2)).softmax(-1) @ x
        return nn.functional.scaled_dot_product_attention(q, x, x)


@pytest.mark.parametrize("spelled", [False, True])
@pytest.mark.parametrize("queries", [5, 3])
def test_attention_is_seen_without_the_pass(spelled: bool, queries: int) -> None:
    program = torch.export.export(Attention(spelled, queries), (torch.randn(2, 3, 5, 4),))
    assert attends(program) == (queries == 5)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"sites": [site()]}, (MERGED, "")),
        ({"sites": [site(), site("left", "its fraction rounds down to 0")]}, (MERGED, "")),
        (
            {"sites": [site()], "restorations": [["a", "x", 1], ["b", "y", 3], ["a", "z", 1]]},
            (PARTLY, "b: y"),
        ),
        ({"sites": [site(), site("refused", "it is temporal")]}, (PARTLY, "it is temporal")),
        ({"sites": [site(), site("refused", "x")], "saving": saving(None)}, (PARTLY, "x")),
        ({"sites": [site(), site("refused", "x")], "saving": saving(0.05)}, (PARTLY, "x")),
        ({"sites": [site(), site("refused", "x")], "saving": saving(0.049)}, (LITTLE, "x")),
        ({"sites": [site(), site("refused", "x")], "saving": saving(0.0, "no merge pays: y")}, (LITTLE, "x")),
        ({"sites": [site()], "saving": saving(0.01)}, (MERGED, "")),
        (
            {"sites": [site("refused", "it is causal")] * 2 + [site("refused", "it is temporal")]},
            (REFUSED, "it is causal"),
        ),
        ({"misses": [["softmax", "no product"]]}, (REFUSED, "no attention site; nearest: softmax: no product")),
        ({"sites": [site("left")], "nothing": "removes no token"}, (REFUSED, "removes no token")),
        ({}, (REFUSED, "no attention")),
        ({"softmax": True}, (REFUSED, "its attentions have other keys than queries, or no run of tokens")),
        (
            {"sites": [site()], "laws": KEPT | {"Projection": "output 0 differs"}},
            (WRONG, "Projection: output 0 differs"),
        ),
    ],
)
def test_verdicts(facts: Record, expected: tuple[str, str]) -> None:
    assert verdict(record(**facts)) == expected


def misbehave(encoder: Encoder, say: Callable[[str], None]) -> Record:
    """A judge that does what the encoder is called."""
    if encoder.name == "hangs":
        say("merging it")
        time.sleep(60)
    if encoder.name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if encoder.name == "raises":
        raise ValueError("two\nlines")
    return {"name": encoder.name, "module": encoder.module, "verdict": REFUSED, "reason": "no attention"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("works", (REFUSED, "no attention")),
        ("raises", (CRASHED, "building it: ValueError: two lines")),
        ("dies", (CRASHED, "building it: killed by signal 9")),
    ],
)
def test_every_process_ends_with_a_verdict(name: str, expected: tuple[str, str]) -> None:
    (found,) = walk([Encoder("m", name)], misbehave, jobs=1, limit=60)
    assert (found["name"], found["module"], found["verdict"], found["reason"]) == (name, "m", *expected)


def test_a_process_that_hangs_is_stopped_and_holds_up_no_other() -> None:
    started = time.monotonic()
    names = ("hangs", "works", "raises")
    found = {each["name"]: each for each in walk([Encoder("m", name) for name in names], misbehave, jobs=2, limit=3)}
    assert found.keys() == set(names)
    assert (found["hangs"]["verdict"], found["hangs"]["reason"]) == (CRASHED, "merging it: not done in 3 seconds")
    assert found["works"]["verdict"] == REFUSED
    assert time.monotonic() - started < 30


def test_widths_are_divided_alike_and_depths_are_cut() -> None:
    small = shrink(transformers.ViTConfig(), Recipe(factor=8, layers=3, grid=7, frames=4))
    assert (small.hidden_size, small.intermediate_size, small.num_hidden_layers) == (96, 384, 3)
    assert (small.image_size, small.patch_size, small.num_channels, small.num_attention_heads) == (112, 16, 3, 12)


def test_what_a_configuration_says_of_its_parts_is_kept() -> None:
    parts = transformers.DepthAnythingConfig(
        backbone_config=transformers.Dinov2Config(hidden_size=384, patch_size=14, out_indices=[9, 10, 11, 12])
    )
    small = shrink(parts, Recipe(factor=8, layers=None, grid=7, frames=4)).backbone_config
    assert (small.hidden_size, small.image_size, small.out_indices) == (48, 98, [9, 10, 11, 12])


def test_a_backbone_of_another_library_becomes_one_of_this_one() -> None:
    small = shrink(transformers.DetrConfig(), Recipe(factor=8, layers=3, grid=7, frames=4))
    assert isinstance(small.backbone_config, transformers.ResNetConfig)


def test_what_cannot_be_built_says_why() -> None:
    found = judge(Encoder("transformers.models.dinat.modeling_dinat", "DinatModel"), lambda _: None)
    assert found["verdict"] == NOT_BUILT
    assert "natten" in found["reason"]


def test_the_same_encoder_is_built_the_same() -> None:
    first, second = build(VIT), build(VIT)
    with torch.no_grad():
        outputs = [each.model(**each.inputs).last_hidden_state for each in (first, second)]
    assert torch.equal(*outputs)


RECORDS = [  # of an older walk: without sections, groupings and savings
    record(name="A", sites=[site()]),
    record(
        name="B",
        verdict=PARTLY,
        reason="aten.roll.default: it has no typing rule",
        sites=[site(), site("left")],
        restorations=[["aten.roll.default", NO_RULE, 2], ["aten.reshape.default", "it needs the tokens", 1]],
    ),
    record(name="C", verdict=REFUSED, reason="no | attention", attends=False, trace="output 0 differs"),
    {"name": "D", "module": "m", "verdict": REFUSED, "reason": "does not trace: x", "seconds": 2.0},
    record(name="E", verdict=REFUSED, reason="it is causal", sites=[site("refused", "it is causal")]),
]


def test_sums() -> None:
    text = summary(RECORDS)
    assert "| partly merged | 1 |" in text
    assert "| refused | 3 |" in text
    assert "2 of 3 (67%) are merged or partly merged; 2 of 3 (67%) without those known to save under 5%. " in text
    assert "What 2 of them save is not known. 1 encoders do not trace" in text
    assert "`aten.roll.default` (2)" in text
    assert "aten.reshape.default" not in text


def test_both_numbers_are_told() -> None:
    measured = [
        record(name="A", sites=[site()], saving=saving(0.3)),
        record(name="B", sites=[site()], saving=saving(0.02), verdict=LITTLE),
        record(name="C", sites=[site()], saving=saving(None), verdict=PARTLY),
        record(name="D", verdict=REFUSED, reason="it is causal"),
    ]
    text = summary(measured)
    assert "| partly merged, saves under 5% | 1 |" in text
    assert "3 of 4 (75%) are merged or partly merged; 2 of 4 (50%) without those known to save under 5%. " in text
    assert "What 1 of them save is not known. 0 encoders do not trace" in text
    assert "is not known" not in summary(measured[:2])


def test_sections_hold_what_merges_best_first() -> None:
    facts: list[tuple[str, str, str, float | None]] = [
        ("Refused", IMAGES, REFUSED, None),
        ("Less", IMAGES, MERGED, 0.1),
        ("Unknown", IMAGES, MERGED, None),
        ("More", IMAGES, MERGED, 0.2),
        ("Little", IMAGES, LITTLE, 0.04),
        ("Partly", IMAGES, PARTLY, 0.4),
        ("Tower", TOWERS, MERGED, 0.1),
        ("Clip", VIDEO, REFUSED, None),
    ]
    given = [
        record(name=name, section=section, verdict=verdict, saving=saving(part))
        for name, section, verdict, part in facts
    ]
    shown = [text.strip("# |").split(" |")[0] for text in tables(given).splitlines() if text.startswith(("## ", "| "))]
    kept = [text for text in shown if text not in ("model", "---")]
    images = ["More", "Less", "Unknown", "Partly", "Little", "Refused"]
    assert kept == ["Video", "Clip", "Towers", "Tower", "Images", *images]


def test_records_of_an_older_walk_have_a_section_of_their_own() -> None:
    given = [*RECORDS, record(name="New", section=VIDEO)]
    assert tables(given).index("## Video") < tables(given).index("## Not told")
    assert "## Not told" not in tables(given[-1:])
    assert tables(RECORDS).endswith(table(RECORDS))


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, ("-", "-")),
        ({"sites": [site()], "saving": saving(0.2345)}, ("-", "23.4%")),
        ({"sites": [site()], "saving": saving(None)}, ("-", "not known")),
        ({"sites": [site()], "saving": saving(0.0, "no merge pays: at the sites 0, 1")}, ("-", "0%: no merge pays")),
        (
            {
                "sites": [
                    site(grouping="run h·w; apart b; shared t"),
                    *[site(grouping="run h·w; apart b·t")] * 2,
                    site("refused", "x", grouping="run t"),
                ]
            },
            ("`run h·w; apart b·t` x 2, `run h·w; apart b; shared t` x 1", "-"),
        ),
    ],
)
def test_groupings_and_savings_are_told(facts: Record, expected: tuple[str, str]) -> None:
    assert line(record(**facts))[3:5] == expected


EXPORTED = [
    record(name="Q", section=TOWERS, captured=EXPORTER, module="transformers.models.qwen.modeling_qwen"),
    record(name="P", section=TOWERS, captured=EXPORTER, module="transformers.models.abc.modeling_abc", verdict=PARTLY),
]
SCATTERED = record(name="I", section=TOWERS, captured=EXPORTER, verdict=REFUSED, reason="no run | of tokens")


def test_what_the_exporter_captures_has_a_sum_and_a_mark() -> None:
    sentence = "Of the towers that the exporter captures, 2 of 3 (67%) are merged or partly merged; the others: "
    assert sentence + r"I (refused: no run \| of tokens). " in summary([*EXPORTED, SCATTERED, *RECORDS])
    assert exported(EXPORTED).endswith(", 2 of 2 (100%) are merged or partly merged. ")
    assert exported(RECORDS) == ""
    assert line(EXPORTED[0])[0] == "Q †"
    assert line(RECORDS[0])[0] == "A"


def test_towers_stand_by_the_names_of_their_families() -> None:
    facts = {"sites": [site(grouping="run n")], "leaving": {"tokens": ["90", "128"]}}
    shown = towers([EXPORTED[0] | facts, EXPORTED[1], *RECORDS]).splitlines()[2:]
    assert [text.split(" | ")[:3] for text in shown] == [["| `abc`", "`P`", PARTLY], ["| `qwen`", "`Q`", MERGED]]
    laws = "Zero, Restore, Projection, Samples"
    assert shown[1].endswith(f"| 1 (1) | `run n` x 1 | - | 90 of 128 | {EXPORTER} | {laws} | - |")
    assert leaving(record(leaving={"reason": "aten.x: it | mixes"})) == r"aten.x: it \| mixes"
    assert leaving(RECORDS[0]) == "-"


def test_lines() -> None:
    laws = "Zero, Restore, Projection, Samples"
    assert line(RECORDS[0]) == ("A", "merged", "1 (1)", "-", "-", "-", laws, "1", "-")
    assert line(RECORDS[1])[2:6] == ("2 (1)", "-", "-", "`aten.roll.default` x 2, `aten.reshape.default` x 1")
    assert line(RECORDS[2])[-1].startswith(r"no \| attention; its trace is not the eager model, bit for bit: output 0")
    assert line(RECORDS[3]) == ("D", "refused", "-", "-", "-", "-", "-", "2", "does not trace: x")


def test_files_are_brought_up_to_date(tmp_path: Path) -> None:
    readme, page, other = tmp_path / "README.md", tmp_path / "docs" / "coverage.md", tmp_path / "other.md"
    readme.write_text(f"before\n{MARKER}\nold\n{MARKER}\nafter\n")
    other.write_text("mine\n")
    families = tmp_path / "towers.md"
    families.write_text(f"before\n{TOWERS_MARKER}\n{TOWERS_MARKER}\n")
    for _ in range(2):
        write(readme, RECORDS, {})
        write(families, EXPORTED, {})
        write(page, RECORDS, {"modeling_x": "No module named 'y'"})
    assert readme.read_text() == f"before\n{MARKER}\n{summary(RECORDS)}\n{MARKER}\nafter\n"
    assert families.read_text() == f"before\n{TOWERS_MARKER}\n{towers(EXPORTED)}\n{TOWERS_MARKER}\n"
    assert tables(RECORDS) in page.read_text()
    assert "`modeling_x` does not import here: No module named 'y'" in page.read_text()
    with pytest.raises(ValueError, match="expected two lines"):
        write(other, RECORDS, {})
    assert other.read_text() == "mine\n"


def test_shards_are_joined_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in ((0, "whole"), (2, "part")):
        (tmp_path / name).mkdir()
        facts = {"absent": {}, "encoders": RECORDS[number:] if number else RECORDS[:2]}
        (tmp_path / name / "coverage.json").write_text(json.dumps(facts))
    files = [str(tmp_path / name / "coverage.json") for name in ("part", "whole")]
    monkeypatch.setattr(sys, "argv", ["coverage", "--join", *files, "--out", str(tmp_path)])
    assert coverage.main() == 0
    assert capsys.readouterr().out == f"{tables(RECORDS)}\n\n{summary(RECORDS)}\n"
    assert json.loads((tmp_path / "coverage.json").read_text())["encoders"] == RECORDS


def test_the_pages_show_what_was_judged() -> None:
    kept = json.loads((RESULTS / "coverage.json").read_text())
    docs = RESULTS.parents[1] / "docs"
    assert coverage.page(kept["encoders"], kept["absent"]) == (docs / "coverage.md").read_text()
    assert f"{TOWERS_MARKER}\n{towers(kept['encoders'])}\n{TOWERS_MARKER}" in (docs / "towers.md").read_text()


@pytest.mark.parametrize("fault", coverage.FAULTS)
def test_a_fault_is_the_exit_status(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"absent": {}, "encoders": [record(verdict=fault)]}))
    monkeypatch.setattr(sys, "argv", ["coverage", "--join", str(path), "--out", str(tmp_path)])
    assert coverage.main() == 1
