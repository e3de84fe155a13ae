"""Who computes an operator: of its providers the first that serves the arguments.

Some providers a compiler should see into, so that it makes their kernels a part of its code. A graph calls these
themselves. The others it calls through one registered operator, which chooses when it runs. Within `decomposing()` it
calls neither, but torch's own operators, which run where this package is not, or those that are to stay.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

log = logging.getLogger("tldr_compile")

_DECOMPOSING: ContextVar[Mapping[str, Callable[..., Any]] | None] = ContextVar("_DECOMPOSING", default=None)

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Provider(Generic[P, R]):
    """One way to compute an operator; `serves` and `forward` take the arguments of the registered operator."""

    name: str
    serves: Callable[P, str | None]
    """Why it cannot compute these arguments, in words ("its head dimension 256 is above 128"); None where it can."""
    forward: Callable[P, R]
    """The results, in the shapes and dtypes of the reference."""
    laid: bool = False
    """Whether results lie in memory as `Providers.empty` says; otherwise they are looked at, and copied where not."""
    visible: bool = False
    """Whether graphs call `forward` itself: it then holds nothing but operators, and has gradients where any are
    asked for. Otherwise the registered operator calls it, on tensors that are there, and has gradients of its own."""


@dataclass
class Providers(Generic[P, R]):
    """The providers of one operator. The first in `order` that serves computes it, so the last serves all."""

    name: str
    operator: Callable[P, R]
    """The registered operator, whose body is `run`."""
    empty: Callable[P, R]
    """The reference's results, not computed: their shapes, dtypes and strides. The operator's fake kernel."""
    order: list[Provider[P, R]]
    decomposition: Callable[P, R]
    """The same in torch's own operators, without a matrix of all pairs where that can be."""
    _told: set[str] = field(default_factory=set, repr=False)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Compute the operator, or add it to the graph that is being made."""
        operator = self.in_graph(*args, **kwargs)
        return self.operator(*args, **kwargs) if operator is None else operator(*args, **kwargs)

    def in_graph(self, *args: P.args, **kwargs: P.kwargs) -> Callable[P, R] | None:
        """What is called for these arguments; None if no visible provider serves them, and none before those.

        Nobody behind the last visible provider is asked, since the registered operator asks them when it runs.
        """
        if not torch.compiler.is_dynamo_compiling() and (stay := _DECOMPOSING.get()) is not None:
            return stay.get(self.name, self.decomposition)
        asked = list(self.order)
        while asked and not asked[-1].visible:
            asked.pop()
        provider, _ = self._first(asked, *args, **kwargs)
        if provider is None:
            return None
        return provider.forward if provider.visible else self.operator

    def run(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Compute the operator by the first provider that serves, with results laid in memory as `empty` says.

        Raises:
            NotImplementedError: no provider serves.
            RuntimeError: a provider's results have other shapes or dtypes than the reference's.
        """
        provider, passed = self._first(self.order, *args, **kwargs)
        if provider is None:
            reasons = "".join(f"; {name}: {reason}" for name, reason in passed)
            raise NotImplementedError(f"no provider of {self._call(args)} serves it{reasons}")
        found = provider.forward(*args, **kwargs)
        if provider.laid:
            return found
        promised = self.empty(*map(_on_meta, args), **kwargs)  # type: ignore[arg-type]
        try:
            laid: R = _laid(found, promised)
        except ValueError as error:
            raise RuntimeError(f"the provider {provider.name!r} of {self._call(args)} {error}") from None
        return laid

    def _first(
        self, providers: Sequence[Provider[P, R]], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[Provider[P, R] | None, list[tuple[str, str]]]:
        """The first that serves, and the name and reason of each before it."""
        passed: list[tuple[str, str]] = []
        for provider in providers:
            reason = provider.serves(*args, **kwargs)
            if reason is None:
                # Dynamo, which can trace no logger, must not come to one.
                if not torch.compiler.is_dynamo_compiling() and log.isEnabledFor(logging.DEBUG):
                    self._tell(provider.name, passed, args)
                return provider, passed
            passed.append((provider.name, reason))
        return None, passed

    def _tell(self, chosen: str, passed: Sequence[tuple[str, str]], args: Sequence[object]) -> None:
        """Log a choice, once for all arguments of the same shapes, dtypes and devices."""
        reasons = "".join(f"; not {name}: {reason}" for name, reason in passed)
        told = f"{self._call(args)}: {chosen}{reasons}"
        if told not in self._told:
            self._told.add(told)
            log.debug(told)

    def _call(self, args: Sequence[object]) -> str:
        named = zip(inspect.signature(self.empty).parameters, args, strict=False)
        tensors = (f"{name} {_described(each)} {each.device}" for name, each in named if isinstance(each, Tensor))
        return f"{self.name}({', '.join(tensors)})"


@contextmanager
def decomposing(stay: Mapping[str, Callable[..., Any]] | None = None) -> Iterator[None]:
    """Graphs made within hold torch's own operators alone, and what is in `stay` in place of ours of that name."""
    token = _DECOMPOSING.set(stay or {})
    try:
        yield
    finally:
        _DECOMPOSING.reset(token)


def everything(*args: Any) -> None:
    """Why it does not serve: it serves everything."""


def _on_meta(argument: object) -> object:
    return argument.to("meta") if isinstance(argument, Tensor) else argument


def _laid(found: Any, promised: Any) -> Any:
    """The same numbers, with the promised strides. Raises ValueError for other shapes or dtypes."""
    if isinstance(promised, tuple):
        return tuple(_laid(one, other) for one, other in zip(found, promised, strict=True))
    if (found.shape, found.dtype) != (promised.shape, promised.dtype):
        raise ValueError(f"gives {_described(found)}, not {_described(promised)} as the reference does")
    if found.stride() == promised.stride():
        return found
    return found.new_empty_strided(promised.shape, promised.stride()).copy_(found)


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
