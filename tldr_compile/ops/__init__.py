"""The operators that a merged graph calls: plain ATen where Inductor can fuse it, one registered operator where not."""

from __future__ import annotations

from typing import Any

from .attention import attend, attend_and_sharpness, received, sharpness
from .attention_operators import ATTEND, ATTEND_AND_SHARPNESS, RECEIVED
from .centrality import AFFINITY, ENERGY, affinity, energy
from .grouping import Grouping, down, group, pick, up
from .matching import MATCH, match
from .providers import Provider, Providers, decomposing
from .reductions import REDUCTIONS, Split, Tokens, reduction
from .reference import received_of, saliency, sharpness_of, shift, unit
from .signals import METRICS, READINGS, SIGNALS, Measure, metric, signal
from .sums import mean, multiply, softmax, sum  # noqa: A004

PROVIDERS: dict[str, Providers[..., Any]] = {
    each.name: each for each in (ATTEND, ATTEND_AND_SHARPNESS, RECEIVED, MATCH, ENERGY, AFFINITY)
}
"""Of every operator that has several, by its name; `PROVIDERS["match"].order` is a list, and the first serves first."""

__all__ = [
    "METRICS",
    "PROVIDERS",
    "READINGS",
    "REDUCTIONS",
    "SIGNALS",
    "Grouping",
    "Measure",
    "Provider",
    "Providers",
    "Split",
    "Tokens",
    "affinity",
    "attend",
    "attend_and_sharpness",
    "decomposing",
    "down",
    "energy",
    "group",
    "match",
    "mean",
    "metric",
    "multiply",
    "pick",
    "received",
    "received_of",
    "reduction",
    "saliency",
    "sharpness",
    "sharpness_of",
    "shift",
    "signal",
    "softmax",
    "sum",
    "unit",
    "up",
]
