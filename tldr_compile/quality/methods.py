"""What is compared: ways to have fewer tokens, and the shapes of their schedules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import torch

from tldr_compile import TokenMerging, ops
from tldr_compile.ops.reductions import Split, Tokens, losing, scrambled

SEEDS: Final = tuple(f"random {seed}" for seed in range(5))
OURS, RANDOM = "vid-TLDR", "random drop"


class Method(NamedTuple):
    """Options of tldr-compile, and where in the model they hold."""

    options: Mapping[str, Any]
    shape: str | None = None
    """One of `SHAPES`; None for the one that the validation clips chose for this method."""
    reductions: Sequence[str] = ()
    """Several that are told as one, their mean."""

    def configs(self, schedule: tuple[float, ...]) -> tuple[TokenMerging, ...]:
        variants: Sequence[Mapping[str, Any]] = [{"reduction": name} for name in self.reductions] or [{}]
        return tuple(TokenMerging(schedule=schedule, **self.options, **variant) for variant in variants)


METHODS: Final[Mapping[str, Method]] = {
    OURS: Method({}),
    "uniform merging, tokens": Method({"saliency": "uniform"}),
    "uniform merging, keys (ToMe)": Method({"saliency": "uniform", "metric": "keys"}),
    "energy, keys (PiToMe)": Method({"saliency": "uniform", "metric": "keys", "reduction": "energy"}),
    "energy, tokens, margin 0.75": Method({"saliency": "uniform", "reduction": "energy", "margin": 0.75}),
    "affinity, keys (AdaMerge)": Method({"saliency": "uniform", "metric": "keys", "reduction": "affinity"}),
    "merging by shift": Method({"saliency": "shift"}),
    "merging by MLP shift": Method({"saliency": "mlp shift"}),
    "merging by key norm": Method({"saliency": "key norm"}),
    "merging by attention received": Method({"saliency": "received"}),
    "merging by change": Method({"saliency": "change"}),
    "random merging": Method({"saliency": "uniform", "reduction": "random merge"}),
    "drop the least salient": Method({"reduction": "drop"}),
    RANDOM: Method({}, reductions=SEEDS),
    "drop the last": Method({"reduction": "slice"}),
    "vid-TLDR, early": Method({}, shape="first half"),
    "vid-TLDR, late": Method({}, shape="second half"),
    "vid-TLDR, plain pooling": Method({"pooling": "plain"}),
    "vid-TLDR, not proportional": Method({"proportional": False}),
}
WHOLE: Final = tuple(name for name in METHODS if not name.startswith(f"{OURS}, "))
"""None of them is the paper's without one of its parts."""
TUNED: Final = "tuned"
TIMED: Final = (OURS, "uniform merging, keys (ToMe)", TUNED, "drop the last")

SHAPES: Final[Mapping[str, Callable[[int], range]]] = {
    "first site": lambda sites: range(1),
    "first two sites": lambda sites: range(min(2, sites)),
    "first three sites": lambda sites: range(min(3, sites)),
    "every site": lambda sites: range(sites),
    "first half": lambda sites: range((sites + 1) // 2),
    "second half": lambda sites: range((sites + 1) // 2, sites),
}
"""Which of the sites that can merge have the fraction; the others keep all their tokens."""
CANDIDATES: Final = ("first site", "first two sites", "first three sites", "every site")


def schedule(shape: str, able: Sequence[bool], fraction: float) -> tuple[float, ...]:
    """One entry for every site; `able` says which of them can merge."""
    sites = [index for index, can in enumerate(able) if can]
    chosen = {sites[place] for place in SHAPES[shape](len(sites))}
    return tuple(fraction if index in chosen else 0.0 for index in range(len(able)))


def register() -> None:
    """Make the seeds known as `reduction="random 0"` and so on."""
    for seed, name in enumerate(SEEDS):
        ops.reduction(name)(partial(scattering, seed))


def scattering(seed: int, tokens: Tokens) -> Split:
    """Lose random tokens, others in every clip: they follow from the seed, the merge and the clip's own values.

    Made clips are in order: by their place in the batch, all clips of a class would lose the same tokens.
    """
    values = tokens.metric.float().sum((1, 2)).view(torch.int32).long()
    places = torch.arange(tokens.metric.shape[1], device=values.device)
    return losing(scrambled(places + scrambled(values, seed)[:, None], tokens.seed), tokens.r)
