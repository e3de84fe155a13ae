"""Which grouping each site gets: the finest, and a coarser one only where that removes a barrier and costs less.

finest    merge per frame -> attention over frames: restored first -> merge per frame ...
coarser   one grouping for all frames -> attention over frames, on groups -> ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from torch import fx

from tldr_compile.passes.axes import Atom, Axis
from tldr_compile.passes.errors import OptionError, ScheduleError
from tldr_compile.passes.plan import cost
from tldr_compile.passes.plan.plan import Choice, Choices, How, Plan
from tldr_compile.passes.refusal import Refusal
from tldr_compile.passes.sites import Site

KeptApart: TypeAlias = Callable[[fx.Node, Atom], Refusal | None]


Planned: TypeAlias = Callable[[Choices], Plan]


@dataclass(frozen=True)
class Wish:
    """A barrier that would be none if one grouping of `run` held all values of some atoms."""

    run: Axis
    together: frozenset[Atom]
    refusal: Refusal


def finest(sites: Sequence[Site]) -> Choices:
    """All that is attended as the run, and the rest apart; blocks, where the keys are one for each of them."""

    def reasons(site: Site) -> tuple[str, ...]:
        carried = site.stream.finest.carried
        return (f"its keys are one for all {carried!r}",) if carried.atoms else ()

    return {site: Choice(site.stream.finest, reasons(site)) for site in sites}


def chosen(option: str, sites: Sequence[Site], planned: Planned, kept_apart: KeptApart) -> Plan:
    """The plan with the groupings that `grouping=option` asks for.

    Raises `OptionError` where no site can have them, with what they can have.
    """
    plan = planned(finest(sites))
    if option == "shared":
        return planned(_sharing(plan.choices, kept_apart))
    if option == "blocks":
        return _in_blocks(plan, planned)
    return _cheaper(plan, planned, kept_apart) if option == "auto" else plan


def _cheaper(plan: Plan, planned: Planned, kept_apart: KeptApart) -> Plan:
    """Coarser wherever that costs less; all barriers at once, or else one after the other."""
    best, against = cost.of(plan), Against()
    pending = True
    while pending:
        pending = False
        for choices in _coarser(plan, kept_apart, against):
            try:
                trial = planned(choices)
            except ScheduleError as indivisible:
                for site in _changed(plan.choices, choices):
                    against.add(site, f"a coarser grouping costs less, but {indivisible}")
                continue
            if (price := cost.of(trial)) < best:
                plan, best, pending = trial, price, True
                break
    return replace(plan, choices={site: against.told(site, choice) for site, choice in plan.choices.items()})


@dataclass(frozen=True)
class Against:
    """Why sites must not have a coarser grouping."""

    reasons: dict[Site, dict[str, None]] = field(default_factory=dict)

    def add(self, site: Site, reason: str) -> None:
        self.reasons.setdefault(site, {})[reason] = None

    def told(self, site: Site, choice: Choice) -> Choice:
        return replace(choice, reasons=(*choice.reasons, *self.reasons.get(site, ())))


def _changed(before: Choices, after: Choices) -> list[Site]:
    return [site for site, choice in before.items() if choice.grouping != after[site].grouping]


def _coarser(plan: Plan, kept_apart: KeptApart, against: Against) -> Iterator[Choices]:
    """Groupings that remove some barrier of a plan."""

    def allowed(site: Site, wish: Wish) -> bool:
        apart = [a for a in wish.together if a in plan.choices[site].grouping.apart.atoms]
        for found in (kept_apart(site.stream.node, atom) for atom in apart if atom not in site.tokens.atoms):
            if found is not None:
                against.add(site, f"{_wished(wish)}, but {found.reason_at}")
                return False
        return True

    wishes = list(dict.fromkeys(_wishes(plan)))
    everything = plan.choices
    for wish in wishes:
        everything = _granted(everything, wish, allowed)
    singles = [_granted(plan.choices, wish, allowed) for wish in wishes]
    for choices in (everything, *singles, *_as_before(plan)):
        if _changed(plan.choices, choices):
            yield choices


def _wishes(plan: Plan) -> Iterator[Wish]:
    seen: set[tuple[Axis, frozenset[Atom]]] = set()
    for node, step in plan.steps.items():
        for barrier in step.barriers:
            if barrier.together and (key := (barrier.run, barrier.together)) not in seen:
                seen.add(key)
                yield Wish(*key, Refusal(node, barrier.reason))


def _granted(choices: Choices, wish: Wish, allowed: Callable[[Site, Wish], bool]) -> Choices:
    """The choices with what a barrier needs together joined, at all sites that group its run."""
    return {
        site: _joined(site, choice, wish) if choice.grouping.run == wish.run and allowed(site, wish) else choice
        for site, choice in choices.items()
    }


def _joined(site: Site, choice: Choice, wish: Wish) -> Choice:
    grouping = choice.grouping.joining(wish.together, site.tokens.atoms) or choice.grouping.within(wish.together)
    return Choice(grouping, (*choice.reasons, _wished(wish))) if grouping else choice


def _wished(wish: Wish) -> str:
    names = ", ".join(sorted(map(repr, wish.together)))
    return f"one grouping for all {names} removes a barrier: {wish.refusal}"


def _as_before(plan: Plan) -> Iterator[Choices]:
    """A site that groups anew what comes grouped by itself may group on as it came: windows, at a full site."""
    for merge in plan.merges:
        for source in (each.source for each in merge.stream if each.how is How.RESTORE and each.source):
            grouping = merge.site.stream.finest.within(source.run.atoms)
            if grouping and grouping.apart.atoms == source.batch.atoms and source.run != merge.target.run:
                reason = f"its tokens come grouped along {source.run!r}, and so they need not be restored"
                grouping = replace(grouping, run=source.run, apart=source.batch)
                yield {**plan.choices, merge.site: Choice(grouping, (reason,))}


def _sharing(choices: Choices, kept_apart: KeptApart) -> Choices:
    """One grouping for all values of everything that may be joined."""
    found, refused = dict(choices), list[str]()
    for site, choice in choices.items():
        reasons = {atom: kept_apart(site.stream.node, atom) for atom in choice.grouping.apart.atoms}
        refused += [f"{site.name}: {reason.reason_at}" for reason in reasons.values() if reason]
        free = {atom for atom, reason in reasons.items() if reason is None}
        grouping = choice.grouping.joining(free, site.tokens.atoms) if free else None
        if grouping:
            found[site] = Choice(grouping, ("grouping='shared' asks for it",))
    if all(each.grouping.shared == choices[site].grouping.shared for site, each in found.items()):
        raise OptionError(
            f"grouping='shared': no site can share one grouping: {'; '.join(refused[:3])}. What each of them can have "
            "is grouping='each'"
        )
    return found


def _in_blocks(plan: Plan, planned: Planned) -> Plan:
    """Blocks that a later operator joins stay together."""
    while True:
        choices = plan.choices
        for wish in _wishes(plan):
            if wish.together < wish.run.atoms:
                choices = _granted(choices, wish, lambda site, wish: True)
        if choices == plan.choices:
            break
        plan = planned(choices)
    if not any(choice.grouping.carried.atoms for choice in plan.choices.values()):
        raise OptionError(
            "grouping='blocks': no operator after any site joins tokens in blocks, such as 2 x 2 patches that become "
            "one. What each of them can have is grouping='each'"
        )
    return plan
