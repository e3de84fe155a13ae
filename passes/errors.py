"""The one exception family. Every message names the node and the operator it is about, and what the user can do."""

from __future__ import annotations


class TldrError(Exception):
    """Base of everything that tldr-compile raises on purpose."""


class OptionError(TldrError):
    """An option that does not exist, or a value that its option does not take."""


class ScheduleError(TldrError):
    """A schedule that cannot be bound to the attention sites of the captured graph, or a budget out of their reach."""


class NothingToMerge(TldrError):
    """The captured graph has no attention site at which tokens could be merged."""


class CaptureError(TldrError):
    """The model could not be traced into one graph; the tracer's own reason is the cause."""


class GraphBreakError(TldrError):
    """A sequence schedule, or a budget, met a graph that is only a piece of the model."""


class ShapeError(TldrError):
    """An input does not have the shape that the graph was captured for."""


class WriteError(TldrError):
    """A program cannot be written in the format that was asked for."""


class VerificationError(TldrError):
    """The rewritten graph does not equal the meaning that the plan gives it."""


class RuleError(TldrError):
    """A typing rule contradicts itself or the operator it describes."""
