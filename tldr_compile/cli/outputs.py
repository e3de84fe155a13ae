"""Files that a command will write: looked at before the work, not after it."""

from __future__ import annotations

from pathlib import Path

from tldr_compile.errors import OptionError


def check_picture(option: str, path: Path) -> None:
    """Raises OptionError for a path that no PNG can be written to."""
    if path.suffix.lower() != ".png":
        raise OptionError(f"{option} {path}: pictures are PNG files, so its name has to end in .png")
    check_file(option, path)


def check_file(option: str, path: Path) -> None:
    """Raises OptionError for a path that cannot be written; what it already holds is left as it is."""
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
    """Make the folder if it is missing. Raises OptionError where nothing can be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"{option} {path}: it cannot be made ({error.strerror})") from error
    check_file(option, path / ".probe")
