"""Files that a command will write: looked at before the work, not after it."""

from __future__ import annotations

from pathlib import Path

from tldr_compile.errors import OptionError


def check_png(option: str, path: Path) -> None:
    """Raises OptionError for a folder, and for a name that is not that of a PNG."""
    _check_no_folder(option, path)
    if path.suffix.lower() != ".png":
        raise OptionError(f"{option} {path}: pictures are PNG files, so its name has to end in .png")


def check_file(option: str, path: Path) -> None:
    """Raises OptionError for a path that cannot be written; what it already holds is left as it is."""
    _check_no_folder(option, path)
    if not path.parent.is_dir():
        raise OptionError(f"{option} {path}: there is no folder {path.parent} to write it to")
    new = not path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise OptionError(f"{option} {path}: it cannot be written ({error.strerror})") from error
    if new:
        path.unlink()


def check_folder(option: str, path: Path) -> None:
    """Raises OptionError for a folder that neither takes files nor can be made; nothing is made yet."""
    there = next(each for each in (path, *path.parents) if each.exists())
    if not there.is_dir():
        raise OptionError(f"{option} {path}: {there} is no folder")
    check_file(option, there / ".probe")


def _check_no_folder(option: str, path: Path) -> None:
    if path.is_dir():
        raise OptionError(f"{option} {path}: that is a folder; name a file in it")
