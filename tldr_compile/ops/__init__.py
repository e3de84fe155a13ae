"""The operators that a merged graph calls: plain ATen where Inductor can fuse it, one registered operator where not."""

from __future__ import annotations

from typing import Any

from .attention import ATTEND, ATTEND_AND_SHARPNESS, attend, attend_and_sharpness, sharpness
from .centrality import AFFINITY, ENERGY, affinity, energy
from .grouping import Grouping, down, group, pick, up
from .matching import MATCH, match
from .providers import Provider, Providers, decomposing
from .reductions import REDUCTIONS, Split, Tokens, reduction
from .reference import saliency, sharpness_of, shift, unit
from .signals import METRICS, READINGS, SIGNALS, Measure, metric, signal
from .sums import mean, multiply, softmax, sum  # noqa: A004

PROVIDERS: dict[str, Providers[..., Any]] = {
    each.name: each for each in (ATTEND, ATTEND_AND_SHARPNESS, MATCH, ENERGY, AFFINITY)
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
