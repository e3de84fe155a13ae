"""What was measured, found again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tldr_compile import TokenMerging
from tldr_compile.errors import OptionError
from tldr_compile.tuning.answers import Far
from tldr_compile.tuning.store import FILE, Store

ABOUT = {"model": "Tiny", "clips": "0f"}
CONFIG, FAR = TokenMerging(schedule=(0.2, 0.1)), Far(torch.tensor([0.25, 0.5]), torch.tensor([1.0, 0.0]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store = Store(tmp_path, ABOUT)
    store.put(CONFIG, 3, FAR)
    store.put(CONFIG, 4, FAR)
    store.close()
    return tmp_path


def test_a_run_goes_on_where_it_was(folder: Path) -> None:
    store = Store(folder, ABOUT)
    assert store.has(CONFIG, 3)
    assert store.has(CONFIG, 4)
    assert not store.has(TokenMerging(schedule=(0.2, 0.2)), 3)
    assert all(ours.equal(theirs) for ours, theirs in zip(store.get(CONFIG, 3), FAR, strict=True))
    store.close()


def test_how_a_budget_is_met_is_found_again(tmp_path: Path) -> None:
    store, asked = Store(tmp_path, ABOUT), (CONFIG, (1.0, 0.5), 0.4)
    store.put_solved(*asked, (0.123, 0.399))
    store.close()
    store = Store(tmp_path, ABOUT)
    assert store.solved(*asked) == (0.123, 0.399)
    assert store.solved(CONFIG, (1.0, 0.5), 0.5) is None
    store.close()


def test_a_line_that_was_cut_is_measured_again(folder: Path) -> None:
    text = (folder / FILE).read_text()
    (folder / FILE).write_text(text[:-9])
    store = Store(folder, ABOUT)
    assert (store.has(CONFIG, 3), store.has(CONFIG, 4)) == (True, False)
    store.put(CONFIG, 4, FAR)
    store.close()
    assert (folder / FILE).read_text() == text


def test_a_line_that_was_cut_before_its_end_of_line_is_measured_again(folder: Path) -> None:
    text = (folder / FILE).read_text()
    (folder / FILE).write_text(text[:-1])
    for _ in range(2):  # what is written next is a line of its own
        store = Store(folder, ABOUT)
        store.put(CONFIG, 4, FAR)
        store.close()
    assert (folder / FILE).read_text().splitlines() == [*text.splitlines(), text.splitlines()[-1]]


@pytest.mark.parametrize("damaged", [b'{"config": "{', b"3", b"{}", b'{"solved": 3}', b"\xff\xfe\x00"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_damaged_line_is_refused(folder: Path, damaged: bytes, number: int) -> None:
    lines = (folder / FILE).read_bytes().splitlines()
    lines[number - 1] = damaged
    (folder / FILE).write_bytes(b"\n".join([*lines, b""]))
    with pytest.raises(OptionError, match=r"damaged in line \d|was made with" if number == 1 else f"in line {number}"):
        Store(folder, ABOUT)


def test_a_folder_that_takes_no_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OptionError, match="is no folder"):
            Store(path, ABOUT)


def test_two_runs_in_one_folder(folder: Path) -> None:
    first = Store(folder, ABOUT)
    with pytest.raises(OptionError, match="in use by another run"):
        Store(folder, ABOUT)
    first.close()
    Store(folder, ABOUT).close()


def test_a_folder_of_other_clips(folder: Path) -> None:
    with pytest.raises(OptionError, match="was made with clips '0f', and this run has '1e'") as refused:
        Store(folder, {**ABOUT, "clips": "1e"})
    Store(folder, ABOUT).close()  # nothing holds the folder, as long as the error is held
    assert refused.value is not None


def test_without_a_folder_nothing_is_kept() -> None:
    store = Store(None, ABOUT)
    store.put(CONFIG, 0, FAR)
    assert store.has(CONFIG, 0)
    store.close()
