from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.quality.support import CLASS_NAMES, kinetics
from tldr_compile.quality.folders import DataError, listed

CLASSES = {name: label for label, name in enumerate(CLASS_NAMES)}
TEMPLATES = {"Pushing something": 1, "Lifting something up": 0}


def something(path: Path, labels: object = TEMPLATES, template: str = "Pushing [something]") -> Path:
    (path / "videos").mkdir(parents=True)
    (path / "videos" / "7.webm").touch()
    (path / "videos" / "8.mp4").touch()
    entries = [{"id": "7", "template": template}, {"id": 8, "template": "Lifting [something] up"}]
    (path / "validation.json").write_text(json.dumps(entries))
    (path / "labels.json").write_text(json.dumps(labels))
    return path


def test_kinetics_classes_match_whatever_their_case_and_underscores(tmp_path: Path) -> None:
    found = listed(kinetics(tmp_path, ("riding_a_bike", "Cooking Eggs"), 2), CLASSES)
    assert [(clip.path.parent.name, clip.path.name, clip.label) for clip in found] == [
        ("Cooking Eggs", "0.mp4", 1),
        ("Cooking Eggs", "1.mp4", 1),
        ("riding_a_bike", "0.mp4", 0),
        ("riding_a_bike", "1.mp4", 0),
    ]


def test_something_something_goes_by_the_names_of_the_model(tmp_path: Path) -> None:
    found = listed(something(tmp_path), {"lifting something up": 4, "pushing something": 5})
    assert [(clip.path.name, clip.label) for clip in found] == [("7.webm", 5), ("8.mp4", 4)]


def test_something_something_goes_by_its_own_numbers_where_the_model_has_no_names(tmp_path: Path) -> None:
    found = listed(something(tmp_path), {"LABEL_0": 0, "LABEL_1": 1})
    assert [clip.label for clip in found] == [1, 0]


def test_a_clip_that_was_not_downloaded_is_left_to_be_reported(tmp_path: Path) -> None:
    (something(tmp_path) / "videos" / "7.webm").unlink()
    assert listed(tmp_path, TEMPLATES)[0].path == tmp_path / "videos" / "7.webm"


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone: there is no such folder"):
        listed(tmp_path / "gone", CLASSES)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no clips in it; the layout is FOLDER/class name/clip\.mp4, or"):
        listed(tmp_path, CLASSES)


def test_a_class_without_clips(tmp_path: Path) -> None:
    (kinetics(tmp_path, ("Riding a bike",), 1) / "cooking eggs").mkdir()
    with pytest.raises(DataError, match="class folders without clips: 'cooking eggs'"):
        listed(tmp_path, CLASSES)


def test_unknown_classes_are_named(tmp_path: Path) -> None:
    for index in range(12):
        (tmp_path / f"odd {index:02}").mkdir()
    with pytest.raises(
        DataError, match=r"not classes of the model: 'odd 00', .*'odd 09' and 2 more; it has 2, such as"
    ):
        listed(tmp_path, CLASSES)


def test_unknown_templates_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not classes of the model: 'Eating something'"):
        listed(something(tmp_path, template="Eating [something]"), TEMPLATES)


@pytest.mark.parametrize("labels", [[], {"Pushing something": "one"}])
def test_labels_of_another_form(tmp_path: Path, labels: object) -> None:
    with pytest.raises(DataError, match=r"labels\.json an object of template to number; these are not"):
        listed(something(tmp_path, labels), TEMPLATES)


def test_labels_past_the_model_s_classes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not numbers of the model's 2 classes: 'Pushing something'"):
        listed(something(tmp_path, {"Pushing something": 7}), {"LABEL_0": 0, "LABEL_1": 1})


@pytest.mark.parametrize("content", [None, "{"])
def test_labels_that_cannot_be_read(tmp_path: Path, content: str | None) -> None:
    path = something(tmp_path) / "labels.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(DataError, match=r"labels\.json cannot be read"):
        listed(tmp_path, TEMPLATES)
