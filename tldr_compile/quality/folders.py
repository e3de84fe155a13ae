"""Folders of labelled videos, laid out as Kinetics or Something-Something is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tldr_compile.errors import TldrError

SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov")
LAYOUTS = "FOLDER/class name/clip.mp4, or FOLDER/videos/id.webm with FOLDER/validation.json and FOLDER/labels.json"
NAMED = 10  # in a message


class DataError(TldrError):
    """Videos that cannot be found or labelled."""


class Clip(NamedTuple):
    """A video and the model's number for its class."""

    path: Path
    label: int


def videos(folder: Path) -> list[Path]:
    """All videos in a folder and the folders in it, in order, whatever they are called.

    Raises DataError where the folder is missing, or there are none.
    """
    if not folder.is_dir():
        raise DataError(f"--data {folder}: there is no such folder")
    found = sorted(each for each in folder.rglob("*") if each.suffix.lower() in SUFFIXES)
    if not found:
        raise DataError(f"--data {folder}: no videos in it, of {', '.join(SUFFIXES)}")
    return found


def listed(folder: Path, classes: Mapping[str, int]) -> list[Clip]:
    """All clips of a folder, in order; `classes` are those of the model.

    Raises DataError where the folder is missing, is empty, is laid out in another way, holds a class that the model
    does not know, or a class without clips.
    """
    if not folder.is_dir():
        raise DataError(f"--data {folder}: there is no such folder")
    found = _something(folder, classes) if (folder / "validation.json").is_file() else _kinetics(folder, classes)
    if not found:
        raise DataError(f"--data {folder}: no clips in it; the layout is {LAYOUTS}")
    return found


def _kinetics(folder: Path, classes: Mapping[str, int]) -> list[Clip]:
    videos = {
        path.name: sorted(each for each in path.iterdir() if each.suffix.lower() in SUFFIXES)
        for path in sorted(folder.iterdir())
        if path.is_dir()
    }
    labels = _labels(folder, videos, classes)
    if empty := [name for name, inside in videos.items() if not inside]:
        raise DataError(f"--data {folder}: class folders without clips: {_few(empty)}")
    return [Clip(path, labels[name]) for name, inside in videos.items() for path in inside]


def _something(folder: Path, classes: Mapping[str, int]) -> list[Clip]:
    """A model that does not name its classes is taken to number them as labels.json does."""
    entries, numbers = _json(folder / "validation.json"), _json(folder / "labels.json")
    try:
        named = [(str(entry["id"]), re.sub(r"[\[\]]", "", entry["template"])) for entry in entries]
        known = {name: int(number) for name, number in numbers.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"--data {folder}: validation.json is a list of objects with id and template, and labels.json an object of "
            f"template to number; these are not ({type(error).__name__}: {error})"
        ) from error
    anonymous = all(re.fullmatch(r"LABEL_\d+", name) for name in classes)
    if anonymous and (outside := [name for name, number in known.items() if number not in classes.values()]):
        raise DataError(
            f"--data {folder}: not numbers of the model's {len(classes)} classes: {_few(outside)}"
        )
    labels = _labels(folder, dict.fromkeys(name for _, name in named), known if anonymous else classes)
    return [Clip(_video(folder / "videos", each), labels[name]) for each, name in named]


def _video(folder: Path, name: str) -> Path:
    """The file of an id; where there is none, the one that is then reported as missing."""
    paths = [folder / f"{name}{suffix}" for suffix in (".webm", ".mp4")]
    return next((path for path in paths if path.is_file()), paths[0])


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _labels(folder: Path, names: Iterable[str], classes: Mapping[str, int]) -> dict[str, int]:
    """The number of every name; spaces, underscores and case do not matter."""
    known = {_plain(name): number for name, number in classes.items()}
    if unmatched := [name for name in names if _plain(name) not in known]:
        raise DataError(
            f"--data {folder}: not classes of the model: {_few(unmatched)}; it has {len(known)}, such as "
            f"{_few(list(classes)[:3])}"
        )
    return {name: known[_plain(name)] for name in names}


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()


def _few(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(repr, names[:NAMED])) + more
