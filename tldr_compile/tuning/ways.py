"""What there is to choose from: every registered way to merge, and how merging is shared among the sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Final

from tldr_compile import ops
from tldr_compile.config import TokenMerging
from tldr_compile.presets import PRESETS
from tldr_compile.tuning.judge import Way

MARGINS: Final = (0.6, 0.75, 0.9)
"""Of `reduction="energy"`, beside the paper's own."""

CONTROLS: Final = ("partition", "random merge")
"""Ways to merge that are there to compare others with."""

PLAIN: Final = "uniform merging, tokens"
BUILT_IN: Final[Mapping[str, Mapping[str, object]]] = {
    "vid-TLDR": {},
    PLAIN: {"saliency": "uniform"},
    "uniform merging, keys (ToMe)": {"saliency": "uniform", "metric": "keys"},
    "energy, keys (PiToMe)": {"saliency": "uniform", "metric": "keys", "reduction": "energy"},
}
"""What others published, as options: what tuning has to be no worse than."""

SHAPES: Final[Mapping[str, Callable[[int], Sequence[float]]]] = {
    "every site": lambda sites: [1.0] * sites,
    "first half": lambda sites: [float(2 * site < sites) for site in range(sites)],
    "second half": lambda sites: [float(2 * site >= sites) for site in range(sites)],
    "first three sites": lambda sites: [float(site < 3) for site in range(sites)],
    "not the first site": lambda sites: [float(site > 0) for site in range(sites)],
    "less and less": lambda sites: [1 - 0.7 * site / max(1, sites - 1) for site in range(sites)],
    "more and more": lambda sites: [0.3 + 0.7 * site / max(1, sites - 1) for site in range(sites)],
}
"""What a site loses by what the one that loses most does, over the sites that can merge."""


def built_in(base: TokenMerging, able: Sequence[bool]) -> list[Way]:
    """Published ways, with one fraction at every site."""
    return [
        Way(replace(base, **options), shared("every site", able), name)  # type: ignore[arg-type]
        for name, options in BUILT_IN.items()
    ]


def plain(base: TokenMerging, able: Sequence[bool]) -> Way:
    """The published way that computes least beside merging itself."""
    return next(way for way in built_in(base, able) if way.name == PLAIN)


def presets(base: TokenMerging, sites: int) -> dict[str, TokenMerging]:
    """Published schedules for models with so many sites."""
    return {name: replace(base, schedule=each.schedule) for name, each in PRESETS.items() if each.sites == sites}


def all_ways(base: TokenMerging, able: Sequence[bool]) -> list[Way]:
    """Every signal, metric and reduction that is registered, but the controls, with one fraction at every site."""
    merging = [name for name, each in ops.REDUCTIONS.items() if each.gives and name not in CONTROLS]
    dropping = [name for name, each in ops.REDUCTIONS.items() if not each.gives and each.ranks]
    found = [
        replace(base, saliency=saliency, metric=metric, reduction=reduction, margin=margin)
        for reduction, saliency, metric in product(merging, ops.SIGNALS, ops.METRICS)
        for margin in ((None, *MARGINS) if reduction == "energy" else (None,))
    ]
    found += [
        replace(base, saliency=saliency, reduction=reduction)
        for reduction, saliency in product(dropping, ops.SIGNALS)
        if ops.SIGNALS[saliency].reads
    ]
    return [Way(each, shared("every site", able), told(each)) for each in found]


def shaped(way: Way, able: Sequence[bool]) -> list[Way]:
    """The way with merging shared in other shapes."""
    return [replace(way, weights=shared(name, able), name=f"{told(way.options)}, {name}") for name in SHAPES]


def shared(shape: str, able: Sequence[bool]) -> tuple[float, ...]:
    """A weight for every site; those that cannot merge have 0."""
    weights = iter(SHAPES[shape](sum(able)))
    return normal([next(weights) if can else 0.0 for can in able])


def stepped(way: Way, site: int, factor: float) -> Way:
    """The way with more, or less, merged at one site."""
    weights = list(way.weights)
    weights[site] = weights[site] * factor if weights[site] else 0.25
    return replace(way, weights=normal(weights))


def normal(weights: Sequence[float]) -> tuple[float, ...]:
    """The largest is 1."""
    most = max(weights) or 1.0
    return tuple(round(weight / most, 4) for weight in weights)


def told(options: TokenMerging) -> str:
    """A way in words: how tokens are chosen, weighed and compared."""
    margin = "" if options.margin is None else f" ({options.margin:g})"
    return f"{options.reduction}{margin}, {options.saliency}, {options.metric}"
