"""The exceptions that users catch; they are born in `passes.errors`."""

from tldr_compile.passes.errors import (
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

__all__ = [
    "CaptureError",
    "GraphBreakError",
    "NothingToMerge",
    "OptionError",
    "RuleError",
    "ScheduleError",
    "ShapeError",
    "TldrError",
    "VerificationError",
    "WriteError",
]
