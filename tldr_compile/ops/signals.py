"""What a merge is told of its tokens: how much each says (a saliency signal), and by what they are alike (a metric).

Both are functions of readings that a site gives, registered under the name that `saliency=` or `metric=` gives them.
Whoever has one of their own registers it from outside:

    @signal("norm", reads="tokens")   # long tokens say much
    def norm(tokens: Tensor) -> Tensor:
        return saliency(tokens.float().norm(dim=-1))
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from .reference import saliency, wide
from .registries import put

READINGS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "tokens": "[B, N, C], the residual stream after the attention, in its dtype",
        "before": "[B, N, C], the stream that the attention is added to, as the attention read it",
        "previous": "[B, N, C], the stream at the same place of the frame before; zeros in the first frame of a run",
        "shift": "[B, N] float32, how far the attention moved each token of the stream",
        "mlp shift": "[B, N] float32, how far the MLP of the layer before moved each token; zeros where there is none",
        "sharpness": "[B, N] float32, the negative entropy of each token's row of attention, mean over the heads",
        "received": "[B, N] float32, the attention each token receives, mean over the heads and all queries",
        "keys": "[B, N, d], the attention's keys, mean over the heads",
    }
)
"""What a site can be asked about its `N` clip tokens: name, shape, meaning. A token merged before has its group's.

Where several tokens are grouped as one (a block, the same place of all frames), `N` counts those: a signal reads the
mean of their numbers and their rows one behind the other; a metric reads each by itself, and cosines are averaged.

`sharpness` and `received` are of attention without masses: a group counts as one query and as one key. Queries are all
that attend, class tokens too, so that what the clip's tokens receive need not add up to 1. `previous` can be read where
tokens of several frames are grouped together; of a group it is what holds the place, one frame before, of the token
that the group is named by.

A merge stands before the MLP of its own layer, so `mlp shift` is of the one above: of the last stretch of the stream
between two attentions in which something is added to it. There is none above the first attention of a graph, and none
where attention and MLP read the same: zeros, of which `ops.saliency` makes equal weights (and dropping by equal weights
loses the first tokens). The report says where.
"""

Function: TypeAlias = Callable[..., Tensor]


@dataclass(frozen=True)
class Measure:
    """`function(*readings)`; without a function what is read itself, or, where nothing is read, nothing."""

    reads: tuple[str, ...]
    function: Function | None = None


def key_norm(keys: Tensor) -> Tensor:
    """Long keys say much: `keys [B, N, d]` to saliency `[B, N]`."""
    return saliency(keys.to(wide(keys.dtype)).norm(dim=-1))


def change(tokens: Tensor, previous: Tensor) -> Tensor:
    """What changed since the frame before says much: `[B, N, C]` both, to saliency `[B, N]`.

    As EVS prunes (arXiv 2510.14624, "Token Selection in RGB Space"): by the L1 norm of the difference, there of pixels,
    here of tokens. The first frame, where `previous` is zeros, is all new: as much as what changed most, or more than
    nothing where nothing did.
    """
    dtype = wide(tokens.dtype)
    changed, is_new = (tokens.to(dtype) - previous.to(dtype)).abs().sum(-1), (previous == 0).all(-1)
    most = changed.masked_fill(is_new, 0).amax(-1, keepdim=True).clamp_min(torch.finfo(dtype).eps)
    return saliency(torch.where(is_new, most, changed))


SIGNALS: dict[str, Measure] = {
    "attention": Measure(("sharpness",), saliency),  # vid-TLDR
    "shift": Measure(("shift",), saliency),  # across attention
    "uniform": Measure(()),  # all tokens alike: ToMe
    "received": Measure(("received",), saliency),  # attended to by many, says much
    "key norm": Measure(("keys",), key_norm),
    "change": Measure(("tokens", "previous"), change),
    "mlp shift": Measure(("mlp shift",), saliency),  # Representation Shift (arXiv 2508.00367); of the layer before
}
METRICS: dict[str, Measure] = {"tokens": Measure(("tokens",)), "keys": Measure(("keys",))}


def signal(name: str, *, reads: str | Sequence[str]) -> Callable[[Function], Function]:
    """Register as `saliency=name` a function of the readings `reads`, in that order, to saliency, float `[B, N]`.

    Saliency is at least 0: what a token gives to its group counts so often. `ops.saliency` makes it of numbers of any
    scale. Gradients pass through it.

    Raises ValueError for what is no reading, and, when a model is merged, for a result that is not `[B, N]`.
    """
    return _register(SIGNALS, f"saliency={name!r}", name, reads, "[B, N]")


def metric(name: str, *, reads: str | Sequence[str]) -> Callable[[Function], Function]:
    """Register as `metric=name` a function of the readings `reads`, in that order, to floats `[B, N, C]`.

    Tokens are compared by the cosine between their rows. No gradient passes through it.

    Raises ValueError for what is no reading, and, when a model is merged, for a result that is not `[B, N, C]`.
    """
    return _register(METRICS, f"metric={name!r}", name, reads, "[B, N, C]")


def _register(
    registry: dict[str, Measure], option: str, name: str, reads: str | Sequence[str], shape: str
) -> Callable[[Function], Function]:
    names = (reads,) if isinstance(reads, str) else tuple(reads)
    if not names or any(each not in READINGS for each in names):
        known = "; ".join(f"{each!r}: {meaning}" for each, meaning in READINGS.items())
        raise ValueError(f"{option} reads {names}, and what can be read is {known}")

    def register(function: Function) -> Function:
        put(registry, name, Measure(names, _checked(function, option, shape)))
        return function

    return register


def _checked(function: Function, option: str, shape: str) -> Function:
    """The function, which names itself where what it returns is of no use.

    A graph calls it by a name that can be written down, whatever the function is: a lambda, a module, one of torch's.
    """
    dims = shape.count(",") + 1

    def checked(*readings: Any) -> Tensor:
        result, rows = function(*readings), readings[0].shape[:2]
        if not isinstance(result, Tensor):
            raise TypeError(f"{option} returned {type(result).__name__}; it has to be floats {shape}")
        if result.dim() != dims or result.shape[:2] != rows or not result.is_floating_point() or not result.numel():
            given = f"{result.dtype} {list(result.shape)}"
            raise ValueError(f"{option} returned {given}; it has to be floats {shape}, and [B, N] is {list(rows)} here")
        return result

    checked.__name__ = checked.__qualname__ = re.sub(r"\W+", "_", option).strip("_")
    return checked
