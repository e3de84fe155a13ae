"""Options in a file: JSON, with what wrote it.

{
  "format": 1,
  "tldr-compile": "0.1.0",
  "for": {"sites": 12},
  "options": {
    "schedule": [600, 200, 100],
    ...
  }
}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from tldr_compile.errors import OptionError

FORMAT: Final = 1


class Read(NamedTuple):
    """What a file says, and the version of this package that wrote it."""

    options: Mapping[str, Any]
    made_for: Mapping[str, Any]
    version: str


def write(path: str | os.PathLike[str], options: Mapping[str, Any], made_for: Mapping[str, Any]) -> None:
    """One option in a line. Raises `OptionError` for a value that JSON does not take."""
    lines = ",\n".join(f"    {json.dumps(name)}: {_text(name, value)}" for name, value in options.items())
    head = {"format": FORMAT, "tldr-compile": this_version(), "for": dict(made_for)}
    told = "".join(f"  {json.dumps(name)}: {_text(name, value)},\n" for name, value in head.items())
    Path(path).write_text(f'{{\n{told}  "options": {{\n{lines}\n  }}\n}}\n', encoding="utf-8")


def read(path: str | os.PathLike[str]) -> Read:
    """Raises `OptionError` for what is no such file, or one of a later format; of its options it knows nothing."""
    try:
        name = os.fspath(path)
    except TypeError as error:
        raise OptionError(f"config={path!r}: config is the path of a file that TokenMerging.save wrote") from error
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"config={name!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or brackets without end
        raise OptionError(f"config={name!r} is no JSON: {error}. TokenMerging.save writes such files") from error
    written = found.get("format") if isinstance(found, dict) else None
    if type(written) is not int or written < 1:
        raise OptionError(f'config={name!r} is no file of options: its "format" is missing or no number')
    version = str(found.get("tldr-compile", "of no known version"))
    if written > FORMAT:
        raise OptionError(
            f"config={name!r} was written by tldr-compile {version} in format {written}, and tldr-compile "
            f"{this_version()} reads formats up to {FORMAT}: update it, or save the options anew with this version"
        )
    parts = found.get("options"), found.get("for", {})
    unknown = sorted({*found} - {"format", "tldr-compile", "for", "options"})
    if unknown or not all(isinstance(part, dict) for part in parts):
        what = f"unknown entry {unknown[0]!r}" if unknown else '"options" and "for" have to be objects'
        raise OptionError(f"config={name!r}, written by tldr-compile {version}: {what}")
    options, made_for = parts
    return Read(options, made_for, version)


def _text(name: str, value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{name}={value!r} has no place in a file of options, which is JSON: {error}") from error


def this_version() -> str:
    """Of this package."""
    from tldr_compile import __version__  # noqa: PLC0415 - the package imports this module first

    return __version__
