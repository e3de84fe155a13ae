"""Merge the tokens of video transformers that do not matter, as a compiler pass.

fast   = torch.compile(model, backend="tldr")
merged = tldr_compile.apply(model, (clip,), schedule=[600, 200, 100])
report = tldr_compile.explain(model, (clip,), schedule=[600, 200, 100])
"""

from importlib import metadata as _metadata

from tldr_compile.api import apply, explain, portable
from tldr_compile.backend import register as _register
from tldr_compile.config import TokenMerging
from tldr_compile.errors import (
    CaptureError,
    GraphBreakError,
    NothingToMerge,
    OptionError,
    RuleError,
    ScheduleError,
    ShapeError,
    TldrError,
    VerificationError,
    WriteError,
)
from tldr_compile.inspection import Decision, inspect
from tldr_compile.module import Kept, MergedModule
from tldr_compile.report import Report
from tldr_compile.tuning import Tuned, tune
from tldr_compile.writing import write_library

__all__ = [
    "CaptureError",
    "Decision",
    "GraphBreakError",
    "Kept",
    "MergedModule",
    "NothingToMerge",
    "OptionError",
    "Report",
    "RuleError",
    "ScheduleError",
    "ShapeError",
    "TldrError",
    "TokenMerging",
    "Tuned",
    "VerificationError",
    "WriteError",
    "apply",
    "explain",
    "inspect",
    "portable",
    "tune",
    "write_library",
]

try:
    __version__ = _metadata.version("tldr-compile")  # pyproject.toml says it, the installation carries it
except _metadata.PackageNotFoundError:
    __version__ = "0+unknown"  # a checkout that nobody installed

_register()
