"""A schedule in numbers: one entry for every site, and how many tokens an entry removes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import sympy
from torch.utils._sympy.functions import FloorDiv

from tldr_compile.passes.errors import ScheduleError
from tldr_compile.passes.sites import AnySite, RefusedSite, Site
from tldr_compile.passes.sizes import Size, simplify

Entry: TypeAlias = int | float


def bind_schedule(
    schedule: Sequence[Entry] | Entry, sites: Sequence[AnySite], *, default: bool = False
) -> tuple[Entry, ...]:
    """One entry for every site.

    A sequence is bound in execution order and missing entries are 0; one fraction, and the default sequence, go to
    the sites that can merge.

    Raises:
        ScheduleError: more entries than sites, or a positive entry at a site that cannot merge.
    """
    able = [site for site in sites if isinstance(site, Site)]
    if isinstance(schedule, (int, float)):
        return tuple(schedule if isinstance(site, Site) else 0 for site in sites)
    if default:
        given = {site.index: entry for site, entry in zip(able, schedule, strict=False)}
        return tuple(given.get(site.index, 0) for site in sites)
    if any(schedule[len(sites) :]):
        raise ScheduleError(
            f"the schedule {list(schedule)} has {len(schedule)} entries, but the graph has {len(sites)} attention "
            f"sites over clip tokens. Give at most {len(sites)}, or one fraction for all of them."
        )
    for site, entry in zip(sites, schedule, strict=False):
        if entry and isinstance(site, RefusedSite):
            raise ScheduleError(
                f"schedule[{site.index}] = {entry}, but {site.name} cannot merge: "
                f"{site.refusal.reason_at}. Give it 0; sites that can: {[each.index for each in able]}."
            )
    return (*schedule, *[0] * len(sites))[: len(sites)]


def check_sites(made_for: Mapping[str, Any], sites: Sequence[AnySite]) -> None:
    """Raises `ScheduleError` where options were made for a model with another number of attention sites."""
    number = made_for.get("sites", len(sites))
    if number != len(sites):
        known = ", ".join(f"{name} {value}" for name, value in made_for.items() if name != "sites")
        raise ScheduleError(
            f"these options are for a model with {number} attention sites over clip tokens"
            f"{f' ({known})' if known else ''}, and this graph has {len(sites)}. Give a schedule of this model's own, "
            "or made_for={} beside them to take them all the same"
        )


def in_blocks(entry: Entry, block: Size, site: Site) -> Entry:
    """An entry for a site whose tokens go in blocks of so many: a number of tokens becomes one of blocks.

    Raises `ScheduleError` for a number that does not divide.
    """
    if not isinstance(entry, int) or block == 1:
        return entry
    if not isinstance(block, int) or entry % block:
        raise ScheduleError(
            f"schedule[{site.index}] = {entry}, but {site.name} removes its tokens in blocks of {block}: give a "
            f"multiple of {block}, a fraction, or grouping='each'"
        )
    return entry // block


def removed(entry: Entry, tokens: Size, left: Fraction = Fraction()) -> Size:
    """How many tokens a schedule's entry removes: a number, or a fraction rounded down; never more than half.

    `left` is what a fraction was rounded down by before.
    """
    half = tokens // 2 if isinstance(tokens, int) else FloorDiv(tokens, 2)
    if isinstance(entry, int):
        wanted: Size = entry
    else:
        part = Fraction(str(entry))
        top = tokens * part.numerator
        wanted = int(tokens * part + left) if isinstance(tokens, int) else FloorDiv(top, part.denominator)
    if isinstance(wanted, int) and isinstance(half, int):
        return min(wanted, half)
    return simplify(sympy.Min(wanted, half)) if isinstance(entry, int) else (wanted if entry <= 0.5 else half)
