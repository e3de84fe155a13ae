"""How a merge chooses: which tokens stay, which go away, and which kept token each of those joins.

A reduction is one function, registered under the name that the option `reduction=` gives it. Whoever has one of their
own registers it from outside:

    @reduction("first", gives=True)   # the first tokens join the last
    def first(tokens: Tokens) -> Split: ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .centrality import affinity, energy
from .matching import match
from .registries import put


class Tokens(NamedTuple):
    """What a reduction sees, without gradients."""

    metric: Tensor
    """float `[B, N, C]`: what matching compares."""
    saliency: Tensor | None
    """float `[B, N]`; None where all tokens are alike, never None for a reduction that ranks by it."""
    r: int
    """How many of the `N` tokens go away; at most `N // 2`. Symbolic in a graph with symbolic sizes."""
    seed: int
    """Another number for every merge of a graph."""
    depth: float = 0.0
    """How deep the merge lies: the part of all attention sites that come before it, in [0, 1)."""
    margin: float | None = None
    """The option `margin=`, for a reduction that reads it."""


class Split(NamedTuple):
    """Every position in `[0, N)` is kept or a source, once."""

    kept: Tensor
    """int64 `[B, N-r]`: positions of the tokens that stay, in the order of the result."""
    source: Tensor
    """int64 `[B, r]`: positions of those that go away, ascending."""
    target: Tensor
    """int64 `[B, r]`: the number, in the order of `kept`, of the token that each source joins."""


Choose: TypeAlias = Callable[[Tokens], Split]
Pairs: TypeAlias = Callable[[int, int], int]


@dataclass(frozen=True)
class Reduction:
    """`choose` splits the tokens. Sources give value and mass to their group if it `gives`; otherwise they are lost."""

    choose: Choose
    gives: bool = False
    ranks: bool = False
    """Whether it cannot choose without saliency."""
    margin: bool = False
    """Whether it reads the option `margin=`."""
    pairs: Pairs | None = None
    """How many pairs of tokens it compares, of `N` with `r` that go: what it costs. None: as many as `match`."""

    @property
    def salient(self) -> bool:
        """Whether saliency makes a difference: it weighs what is given, or ranks what is lost."""
        return self.gives or self.ranks


REDUCTIONS: dict[str, Reduction] = {}


def reduction(
    name: str, *, gives: bool = False, ranks: bool = False, margin: bool = False, pairs: Pairs | None = None
) -> Callable[[Choose], Choose]:
    """Register a function as `reduction=name`; `Reduction` says what the others mean."""

    def register(choose: Choose) -> Choose:
        put(REDUCTIONS, name, Reduction(choose, gives, ranks, margin, pairs))
        return choose

    return register


def _none(tokens: int, gone: int) -> int:
    """Of what compares no tokens."""
    return 0


@reduction("merge", gives=True)
def merging(tokens: Tokens) -> Split:
    """vid-TLDR, step 5: tokens at even positions, the `r` best matched, join the best of those at odd ones."""
    similarity, destination = match(tokens.metric)
    merged, remaining = divided(foremost(similarity, tokens.r), tokens.r)
    batch, count = tokens.metric.shape[:2]
    odd = torch.arange(1, count, 2, device=tokens.metric.device).expand(batch, -1)
    kept = torch.cat((2 * remaining, odd), 1)
    return Split(kept, 2 * merged, destination.gather(1, merged) + remaining.shape[1])


@reduction("energy", gives=True, margin=True, pairs=lambda tokens, gone: tokens * (tokens - 1) // 2 + (gone + 1) ** 2)
def merging_by_energy(tokens: Tokens) -> Split:
    """PiToMe (arXiv 2405.16148, section 3.2, algorithm 1): the `2r` tokens of most energy merge, the others are let be.

    In the order of their energy, of equals the earlier first, every other one is a source, and each joins the most
    alike of those between, of equals the one of most energy. The margin is `0.9 - 0.9 depth` unless it is chosen.
    """
    margin = 0.9 - 0.9 * tokens.depth if tokens.margin is None else tokens.margin
    order = ordered(energy(tokens.metric, margin))
    # The first pair once more, so that there is one where none goes: whoever joins it joins the same token.
    pairs = torch.cat((order[:, : 2 * tokens.r], order[:, :2]), 1)
    _, destination = match(_rows(tokens.metric, pairs))
    return joining(pairs[:, ::2][:, : tokens.r], pairs[:, 1::2].gather(1, destination)[:, : tokens.r], order.shape[1])


@reduction("affinity", gives=True, pairs=lambda tokens, gone: tokens**2 + -(-tokens // 2) * (tokens // 2))
def merging_by_affinity(tokens: Tokens) -> Split:
    """AdaMerge's matching (arXiv 2605.27465, equations 1 to 3): similarity times the salience of the source.

    Tokens of the first half, the `r` best by that, join the best of the second. Salience is scaled to [0, 1], ones
    where it is all equal. Not its mean (equation 5) and its counts (equation 4): a group is weighed as any other, and
    the schedule says how many go.
    """
    count = tokens.metric.shape[1]
    half = (count + 1) // 2
    position = _positions(tokens)
    halves = position // 2 + position % 2 * half  # the halves in turn: first of one, first of the other, ...
    similarity, destination = match(_rows(tokens.metric, halves))
    salience = affinity(tokens.metric)
    low, high = salience.amin(1, keepdim=True), salience.amax(1, keepdim=True)
    scaled = torch.where(high > low, (salience - low) / torch.where(high > low, high - low, 1), 1)
    source, _ = divided(foremost(similarity * scaled[:, :half], tokens.r), tokens.r)
    return joining(source, destination.gather(1, source) + half, count)


@reduction("partition", gives=True)
def merging_at_random_places(tokens: Tokens) -> Split:
    """As merge, with sources and destinations drawn from the seed alone: a partition that ToMe compares with its own.

    Of equals the one that was drawn first.
    """
    order = scrambled(_positions(tokens), tokens.seed).argsort(1)
    similarity, destination = match(_rows(tokens.metric, order))
    best, _ = divided(foremost(similarity, tokens.r), tokens.r)
    joined = destination.gather(1, best)
    return joining(order[:, ::2].gather(1, best), order[:, 1::2].gather(1, joined), order.shape[1])


@reduction("random merge", gives=True, pairs=_none)
def merging_at_random(tokens: Tokens) -> Split:
    """The control of every way to merge: random tokens join random kept ones, which follow from the seed alone."""
    position = _positions(tokens)
    source, kept = divided(foremost(scrambled(position, tokens.seed), tokens.r), tokens.r)
    # Other numbers than those that said who goes.
    return Split(kept, source, scrambled(source + position.shape[1], tokens.seed) % kept.shape[1])


@reduction("drop", ranks=True, pairs=_none)
def dropping(tokens: Tokens) -> Split:
    """A baseline: the least salient are lost."""
    if tokens.saliency is None:
        raise ValueError('reduction="drop" loses the least salient tokens and needs their saliency, which is None')
    return losing(tokens.saliency, tokens.r)


@reduction("random", pairs=_none)
def scattering(tokens: Tokens) -> Split:
    """A baseline: random ones are lost, which follow from the seed alone."""
    return losing(scrambled(_positions(tokens), tokens.seed), tokens.r)


@reduction("slice", pairs=_none)
def slicing(tokens: Tokens) -> Split:
    """The floor of the cost: the last are lost, and nothing is computed to tell which."""
    return losing(-_positions(tokens), tokens.r)


def losing(worth: Tensor, r: int) -> Split:
    """Lose the `r` tokens of least `worth [B, N]`; the rest stay in order.

    A lost token's group is the nearest kept token, the earlier of two. Of equal tokens the earlier is lost.
    """
    lost = foremost(-worth.nan_to_num(nan=torch.inf), r)
    source, kept = divided(lost, r)
    after = lost.logical_not().cumsum(1).gather(1, source)
    before = (after - 1).clamp_min(0)
    after = after.clamp_max(kept.shape[1] - 1)
    closer = (source - kept.gather(1, before)).abs() <= (kept.gather(1, after) - source).abs()
    return Split(kept, source, torch.where(closer, before, after))


def joining(source: Tensor, destination: Tensor, count: int) -> Split:
    """Of `count` tokens those at `source [B, r]` join those at `destination [B, r]`; the rest stay in order."""
    position = torch.arange(count, device=source.device).expand(source.shape[0], -1)
    joined = position.scatter(1, source, destination)  # who joins nobody is its own
    away = joined != position
    ascending, kept = divided(away, source.shape[1])
    return Split(kept, ascending, (away.logical_not().cumsum(1) - 1).gather(1, joined.gather(1, ascending)))


def ordered(worth: Tensor) -> Tensor:
    """int64 `[B, N]`: positions by `worth [B, N]`, most first, of equals the earlier; what is no number comes first.

    As in `foremost`, whoever sorts need not keep the order of equals: they are sorted again, by numbers that differ.
    """
    worth = worth.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    values, position = worth.sort(dim=1, descending=True)
    other = torch.cat((torch.zeros_like(position[:, :1]), (values[:, 1:] != values[:, :-1]).to(torch.int64)), 1)
    return (other.cumsum(1) * worth.shape[1] + position).sort(dim=1).values % worth.shape[1]


def foremost(worth: Tensor, r: int) -> Tensor:
    """bool `[B, N]`: the `r` of most `worth [B, N]`, of equal ones the earlier; what is no number comes first.

    Whoever sorts need not keep the order of equals: only the numbers are sorted.
    """
    worth = worth.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    ranked = worth.sort(dim=1, descending=True).values
    least = torch.cat((ranked[:, :1], ranked), 1)[:, r : r + 1]  # of none: all that is equal to the first is left
    above, equal = worth > least, worth == least
    room = r - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= room))


def divided(chosen: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The positions of the `r` that are `chosen`, bool `[B, N]`, and of the others, both ascending."""
    return _where(chosen, r), _where(~chosen, chosen.shape[1] - r)


def _where(chosen: Tensor, count: int) -> Tensor:
    """`[B, count]`: the positions in `[B, N]` that are chosen, as many in every row."""
    batch, length = chosen.shape
    # Those that are not chosen fall into one place beyond the end.
    place = torch.where(chosen, chosen.cumsum(1) - 1, count)
    position = torch.arange(length, device=chosen.device).expand(batch, -1)
    return position.new_zeros(batch, count + 1).scatter(1, place, position)[:, :count]


def _rows(metric: Tensor, index: Tensor) -> Tensor:
    """The tokens of `metric [B, N, C]` at `index [B, M]`."""
    return metric.gather(1, index.unsqueeze(-1).expand(-1, -1, metric.shape[2]))


def _positions(tokens: Tokens) -> Tensor:
    batch, count = tokens.metric.shape[:2]
    return torch.arange(count, device=tokens.metric.device).expand(batch, -1)


def scrambled(numbers: Tensor, seed: int) -> Tensor:
    """A 32-bit hash of every number, int64: a random order that touches no generator's state."""
    low = 0xFFFFFFFF
    mixed = (numbers + (seed * 0x9E3779B9 & low)) & low
    for _ in range(2):
        mixed = ((mixed ^ (mixed >> 16)) * 0x45D9F3B) & low
    return mixed ^ (mixed >> 16)
