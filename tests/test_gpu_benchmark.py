"""The one command for GPUs, as far as it goes without one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from benchmarks.gpu import driver, merging, models, tiles
from benchmarks.gpu.__main__ import PARTS, main, options
from benchmarks.gpu.correct import FORWARD, relative
from benchmarks.gpu.driver import Jobs, Row, Setup
from benchmarks.gpu.load import SPECS, TINY, Load, attention_shape
from benchmarks.gpu.page import NOT_MEASURED, page
from benchmarks.gpu.workers import WorkerError
from benchmarks.speed import DENSE, OURS
from benchmarks.timing import RESULTS

CPU = torch.device("cpu")


def setup(seconds: float = 60) -> Setup:
    return Setup(CPU, dry=True, deadline=time.monotonic() + seconds)


def kept(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu-cpu.json").read_text())


def test_all_of_it_runs_dry(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    record = kept(tmp_path)
    assert record["machine"]["date"]
    assert record["machine"]["device"]
    assert record["versions"]["torch"] == torch.__version__
    assert [row for row in record["rows"] if driver.failed(row)] == []
    with_rows = {row["part"] for row in record["rows"]}
    assert with_rows == PARTS.keys() - {"batches", "tiles"}  # there is one batch, and no CPU runs tiles
    named = {row["name"]: row for row in record["rows"]}
    assert all(f"{TINY} b2, {row}" in named["batch 2: first calls"]["first_call_seconds"] for row in Load(TINY, 2).rows)
    timed = named[f"{TINY} b2"]["rows"]
    assert [row["row"] for row in timed] == list(Load(TINY, 2).rows)
    assert all(0 < row["latency"][0] <= row["latency"][2] for row in timed)
    assert timed[1]["difference_to_first_row"] > 0 == timed[0]["difference_to_first_row"]
    assert named[f"{TINY} b2: ours"]["groups"]["sharpness"] > 0
    assert "sharpness" not in named[f"{TINY} b2: floor by hand"]["groups"]


def part(jobs: dict[str, Any]) -> driver.Part:
    return lambda setup: iter(jobs.items())


def test_a_row_that_raises_costs_no_other(tmp_path: Path) -> None:
    def broken() -> Row:
        raise ValueError("x" * 1000)

    jobs = {"before": lambda: {"value": 1}, "broken": broken, "after": lambda: {"value": 2}}
    rows = driver.run({"a": part(jobs)}, setup(), tmp_path)
    assert [row["name"] for row in rows] == ["before", "broken", "after"]
    assert rows[1]["error"] == "ValueError: " + "x" * (driver.TEXT - len("ValueError: "))
    assert [driver.failed(row) for row in rows] == [False, True, False]
    assert kept(tmp_path)["rows"] == rows


def test_a_part_that_raises_ends_with_a_row_and_the_next_one_runs(tmp_path: Path) -> None:
    def broken(setup: Setup) -> Jobs:
        yield "first", dict
        raise RuntimeError("no more")

    rows = driver.run({"a": broken, "b": part({"second": dict})}, setup(), tmp_path)
    assert [(row["part"], row["name"]) for row in rows] == [("a", "first"), ("a", "the part itself"), ("b", "second")]
    assert rows[1]["error"] == "RuntimeError: no more"


def test_the_deadline_stops_it_and_what_was_done_is_kept(tmp_path: Path) -> None:
    def slow() -> Row:
        time.sleep(0.2)
        return {"found": len(kept(tmp_path)["rows"])}

    jobs = {"first": dict, "slow": slow, "late": pytest.fail, "later": pytest.fail}
    rows = driver.run({"a": part(jobs)}, setup(0.15), tmp_path)
    assert [row["name"] for row in rows] == ["first", "slow", "late"]
    assert rows[1]["found"] == 1  # on disk before the next one began
    assert "no time" in rows[2][driver.LEFT_OUT]
    assert not driver.failed(rows[2])
    assert kept(tmp_path)["rows"] == rows


def test_a_part_makes_room_for_the_next(tmp_path: Path) -> None:
    left: list[float] = []

    def noting(setup: Setup) -> Jobs:
        left.append(setup.left())
        yield from ()

    driver.run({"a": noting, "b": noting}, setup(100), tmp_path, {"a": 0.25, "b": 0.5})
    assert left == pytest.approx([25, 100], abs=1)


@pytest.mark.parametrize(("row", "status"), [({"ok": True}, 0), ({"ok": False}, 1), ({"error": "E"}, 1)])
def test_the_exit_status_tells_of_failures(
    row: Row, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.gpu.__main__.PARTS", {"correct": part({"it": lambda: row})})
    assert main(["--dry", "--parts", "correct", "--out", str(tmp_path)]) == status
    assert f"1 rows, {status} failed" in capsys.readouterr().out


def test_a_dry_run_does_not_overwrite_measurements(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options(["--dry"])
    assert "name another folder" in capsys.readouterr().err


def test_attention_of_full_size_models() -> None:
    assert attention_shape(SPECS["umt-b"]) == (12, 2352, 64)
    assert attention_shape(SPECS["videomae-l"]) == (16, 1568, 64)


def test_what_is_no_number_is_no_small_error() -> None:
    case = FORWARD[0]
    (q, _, _), _, log_mass = case.inputs(CPU)
    assert q.shape == (2, 3, case.tokens, case.channels)
    assert log_mass is not None
    assert not relative(q * torch.nan, q) <= 1


class Waiting:
    """A row's process that is ready after some seconds, or never can be."""

    def __init__(self, seconds: float, error: str = "") -> None:
        self.ready, self.error, self.stopped = time.monotonic() + seconds, error, False

    def compiled(self, load: Load, wait: float) -> dict[str, Any]:
        if self.error:
            raise WorkerError(self.error)
        if time.monotonic() < self.ready:
            raise TimeoutError
        return {"first_call": 1.0}

    def stop(self) -> None:
        self.stopped = True


@pytest.mark.parametrize(
    ("following", "left", "waited"), [(0, 60, True), (1, 60, True), (9, 6, False), (0, 5.3, False)]
)
def test_the_slowest_rows_are_waited_for_while_what_follows_has_its_time(
    following: int, left: float, waited: bool
) -> None:
    load = Load("umt-b", 8)
    processes = [Waiting(0.2), Waiting(0.2), Waiting(0, "E"), Waiting(0.2), Waiting(0.9)]
    workers = dict(zip(load.rows, processes, strict=True))
    setting = setup(left)
    setting.workers.of = lambda load, row: workers[row]  # type: ignore[method-assign, assignment, return-value]
    told = list(models.first_calls([load], setting, following)["first_call_seconds"].values())
    assert told == [1.0, 1.0, "E", 1.0, 1.0 if waited else models.STOPPED]
    assert [worker.stopped for worker in workers.values()] == [False] * 4 + [not waited]
    again = list(models.first_calls([load], setting, 0)["first_call_seconds"].values())
    assert again == told  # a process that was stopped is not waited for


def test_a_load_of_which_no_row_was_compiled_says_so() -> None:
    setting = setup()
    setting.workers.of = lambda load, row: Waiting(60)  # type: ignore[method-assign, assignment, return-value]
    assert models.timed(Load("umt-b", 8), setting, 1) == {"error": "no row was compiled in the time"}


def test_a_second_run_fills_what_the_first_one_left() -> None:
    machine, versions = {"date": "1"}, {"torch": "2"}
    first = [{"name": "a", "x": 1}, {"name": "b", "error": ""}, {"name": "c", "x": 1}]
    second = [{"name": "b", "x": 2}, {"name": "c", driver.LEFT_OUT: "no time"}, {"name": "d", "x": 2}]
    found = driver.joined({"rows": first}, {"machine": machine, "versions": versions, "rows": second})
    assert found["rows"] == [first[0], second[0], first[2], second[2]]
    assert found["joined"] == [{"with": {"date": "1", "torch": "2"}, "rows": ["b", "d"]}]


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "gpu-h100"),
        ("NVIDIA A100-SXM4-80GB", "gpu-a100"),
        ("NVIDIA GeForce RTX 4090", "gpu-4090"),
        ("a card", "gpu-cuda"),
    ],
)
def test_every_card_has_a_record(card: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    assert driver.record_name(torch.device("cuda")) == name


def test_a_tile_that_does_not_fit_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large() -> None:
        raise OutOfResources(241664, 232448, "shared memory")

    monkeypatch.setattr(tiles, "operators", lambda *args: {"large": too_large, "small": lambda: None})
    monkeypatch.setattr(tiles, "graphed", lambda call, device: call() or call)
    row = tiles.measure((1, 1, 16, 8), (128, 128, 8, 3), setup())
    assert list(row["seconds"]) == ["small"]
    assert row["refused"]["large"].startswith("does not fit: out of resource: shared memory")
    assert not driver.failed(row)


def test_the_page_shows_what_is_kept_and_names_what_is_not() -> None:
    machine = {"device": "a card", "date": "2026-01-02T03:04:05", "python": "3.12"}
    check = {"part": "correct", "name": "c", "off": 1e-6, "bound": 1e-5, "ok": True}
    way = {"way": "w", "latency": [0.001, 0.002, 0.003], "over_best_dense": [1.0, 1.5, 2.0]}
    tile = {"part": "tiles", "name": "t", "shape": [1, 2], "seconds": {"o": 0.001}}
    dense = {
        "row": DENSE,
        "latency": [0.001, 0.002, 0.003],
        "clips_per_second": 4.0,
        "this_over_ours": [1.0, 1.5, 2.0],
        "ours_over_this": [0.5, 0.6, 1.0],
        "peak_bytes": 5e6,
        "attention": {"aten::_scaled_dot_product_cudnn_attention": 12},
        "first_call": 9.0,
    }
    ours = {**dense, "row": OURS, "this_over_ours": [1, 1, 1], "attention": {}}
    floor = {**dense, "row": "floor by hand", "ours_over_this": [1, 1.25, 2]}
    load = {"part": "models", "name": "umt-b b8", "batch": 8, "graphs": False, "rows": [dense, ours, floor]}
    graphs = {**load, "name": "umt-b b1 graphs", "batch": 1, "graphs": True, "rows": [dense]}
    rows = [
        *(check, {**check, "off": float("nan")}, {"part": "kernels", "name": "8 tokens", "ways": [way]}, load, graphs),
        *({**tile, "tile": [64, 64]}, {**tile, "tile": [32, 32], "seconds": {"o": 0.0005}}),
    ]
    record = {"machine": machine, "versions": {"torch": "2.11"}, "rows": rows}
    text = page([{**record, "joined": [{"with": machine, "rows": ["x"]}]}, {**record, "rows": []}])
    assert "## a card\n\n2026-01-02; torch 2.11; Python 3.12. 1 rows are of another run, 2026-01-02T03:04." in text
    assert f"### Whole models\n\n{NOT_MEASURED}" in text
    assert "| UMT-B | 8 | 2 | 2 | 2 | 1.500 | 1.250 | - | - |" in text
    assert "| UMT-B | 1, CUDA graphs | 2 | - | - | 1.500 | - | - | - |" in text
    assert "| UMT-B | 8 | dense compiled | 1.00 / 2.00 / 3.00 | 4.0 | 5 | cudnn 12 | 9 |" in text
    assert "| UMT-B | 1, CUDA graphs | dense compiled | 1.00 / 2.00 / 3.00 | 4.0 | - | cudnn 12 | 9 |" in text
    assert "| (1, 2) | 0.500: (32, 32) |" in text
    assert "| w | 2 (1.50) |" in text
    assert [line.split("|")[-2].strip() for line in text.splitlines() if line.startswith("| c ")] == [
        "within",
        "beyond it",
    ]


def test_tables_show_every_row() -> None:
    spread = [0.001, 0.002, 0.003]
    timed = {"row": "ours", "latency": spread, "clips_per_second": 4.0, "this_over_ours": [1, 1, 1], "peak_bytes": 5e6}
    load = {"name": "m b8", "rows": [timed], "fused_attention_alone": {"FLASH_ATTENTION": 0.1}}
    assert "m b8" in models.table([{"name": "compiling ahead"}, load])
    assert "1.00 / 2.00 / 3.00" in models.table([load])
    profile = {
        "name": "m b8: ours",
        "groups": {"sharpness": 2e-6},
        "top": [{"kernel": "k", "per_call": 3, "seconds": 1e-6}],
    }
    assert "sharpness 2 us" in merging.table([profile])
    assert "3.0 x k" in merging.table([profile])
