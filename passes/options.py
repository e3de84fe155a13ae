"""What the passes read of the options of whoever uses them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from tldr_compile.passes.plan.schedule import Entry


class Measure(Protocol):
    """What a merge is told: `function(*reads)` of what a site gives; without a function what is read, if anything."""

    @property
    def reads(self) -> Sequence[str]: ...
    @property
    def function(self) -> Callable[..., Any] | None: ...


class Policy(Protocol):
    """The options that change what is inserted; `tldr_compile.TokenMerging` is one."""

    @property
    def saliency(self) -> str: ...
    @property
    def signal(self) -> Measure: ...
    @property
    def metric(self) -> str: ...
    @property
    def comparison(self) -> Measure: ...
    @property
    def reduction(self) -> str: ...
    @property
    def pooling(self) -> str: ...
    @property
    def proportional(self) -> bool: ...
    @property
    def asks(self) -> Collection[str]: ...
    @property
    def return_places(self) -> bool: ...


class Options(Policy, Protocol):
    """What `merge` reads of a configuration."""

    @property
    def entries(self) -> Entry | Sequence[Entry]: ...
    @property
    def is_default_schedule(self) -> bool: ...

    @property
    def protect(self) -> str | int: ...
    @property
    def clip(self) -> str | Sequence[str]: ...
    @property
    def outputs(self) -> str: ...
    @property
    def grouping(self) -> str: ...
