"""Which grouping each site gets: the finest, and a coarser one only where that removes a barrier and costs less.

finest    merge per frame -> attention over frames: restored first -> merge per frame ...
coarser   one grouping for all frames -> attention over frames, on groups -> ...
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TypeAlias

from torch import fx

from tldr_compile.passes.axes import Atom, Axis, Kind, Role, Typed
from tldr_compile.passes.errors import OptionError, ScheduleError
from tldr_compile.passes.plan import cost
from tldr_compile.passes.plan.plan import Choice, Choices, How, Plan
from tldr_compile.passes.refusal import Refusal
from tldr_compile.passes.sites import Grouping, Site
from tldr_compile.passes.sites.groupings import TIME

KeptApart: TypeAlias = Callable[[fx.Node, Atom], Refusal | None]
Planned: TypeAlias = Callable[[Choices], Plan]


@dataclass(frozen=True)
class Wish:
    """A barrier that would be none if one grouping of `run` held all values of some atoms.

    `windows`: the barrier is an attention along them, and they can be grouped within each window.
    """

    run: Axis
    together: frozenset[Atom]
    refusal: Refusal
    windows: bool

    def __str__(self) -> str:
        names = ", ".join(sorted(map(repr, self.together)))
        return f"one grouping for all {names} removes a barrier: {self.refusal}"


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
        plan = planned(_sharing(plan.choices, kept_apart))
    if option == "blocks":
        return _in_blocks(plan, planned)
    return plan if option == "each" else _Search(planned, kept_apart).cheapest(plan)


class _Search:
    """For a plan that costs less, with coarser groupings; `against` says why sites must not have them."""

    def __init__(self, planned: Planned, kept_apart: KeptApart) -> None:
        self.planned, self.kept_apart = planned, kept_apart
        self.against: dict[Site, dict[str, None]] = {}
        self.tried: set[tuple[Grouping, ...]] = set()

    def cheapest(self, plan: Plan) -> Plan:
        """All barriers removed at once where that costs less, or else one after the other."""
        while (cheaper := self._cheaper(plan)) is not None:
            plan = cheaper
        choices = plan.choices.items()
        told = {site: replace(each, reasons=(*each.reasons, *self.against.get(site, ()))) for site, each in choices}
        return replace(plan, choices=told)

    def _cheaper(self, plan: Plan) -> Plan | None:
        price, now = _price(plan), tuple(each.grouping for each in plan.choices.values())
        self.tried.add(now)
        for choices in self._coarser(plan):
            groupings = tuple(each.grouping for each in choices.values())
            if groupings in self.tried:
                continue
            self.tried.add(groupings)
            try:
                trial = self.planned(choices)
            except ScheduleError as indivisible:
                for site, before, after in zip(choices, now, groupings, strict=True):
                    if before != after:
                        self._refuse(site, str(indivisible))
                continue
            if _price(trial) < price:
                return trial
        return None

    def _coarser(self, plan: Plan) -> Iterator[Choices]:
        """Groupings that remove some barrier of a plan."""
        wishes = list(_wishes(plan))
        yield reduce(self._granted, wishes, plan.choices)
        yield from (self._granted(plan.choices, wish) for wish in wishes)
        yield from _as_before(plan)

    def _granted(self, choices: Choices, wish: Wish) -> Choices:
        """What a barrier needs together joined, at all sites that group its run."""
        return {site: self._joined(site, choice, wish) for site, choice in choices.items()}

    def _joined(self, site: Site, choice: Choice, wish: Wish) -> Choice:
        grouping = choice.grouping
        if grouping.run != wish.run:
            return choice
        within = grouping.within(wish.together)
        if within and wish.windows:
            return _within(choice, within, wish)
        if joined := grouping.joining(wish.together, site.tokens.atoms):
            for atom in _in_order(joined.shared, wish.together):
                if (found := self.kept_apart(site.stream.node, atom)) is not None:
                    self._refuse(site, f"{wish}, but {found.reason_at}")
                    return choice
            return Choice(joined, (*choice.reasons, str(wish)))
        return _within(choice, within, wish) if within else choice

    def _refuse(self, site: Site, reason: str) -> None:
        self.against.setdefault(site, {})[f"a coarser one is not taken: {reason}"] = None


def _within(choice: Choice, within: Grouping, wish: Wish) -> Choice:
    reason = f"a grouping for each of {within.apart!r} removes a barrier: {wish.refusal}"
    return Choice(within, (*choice.reasons, reason))


def _price(plan: Plan) -> tuple[int, float]:
    """Outputs that leave short were asked for: whoever reads them pays for every token."""
    return -len(plan.leaving), cost.of(plan)


def _wishes(plan: Plan) -> Iterator[Wish]:
    seen: set[tuple[Axis, frozenset[Atom]]] = set()
    for node, step in plan.steps.items():
        for barrier in step.barriers:
            if barrier.together and (key := (barrier.run, barrier.together)) not in seen:
                seen.add(key)
                yield Wish(*key, Refusal(node, barrier.reason), _attends(plan.typed.calls[node]))


def _attends(call: Typed) -> bool:
    return any(use.kind in (Kind.KEYS, Kind.SOFTMAX) for use in call.uses)


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
    """One grouping for all frames, wherever all that a merge reaches depends on all of them.

    Of frames that are packed in one row nothing says whether they are of one clip: there it is as was asked for.
    """
    found, refused = dict(choices), list[str]()
    attended = frozenset[Atom]().union(*(site.tokens.atoms for site in choices))
    for site, choice in choices.items():
        frames = {atom for atom in choice.grouping.apart.atoms if atom.role in TIME - {Role.SAMPLE}}
        packed = {atom for atom in choice.grouping.apart.atoms - attended if atom.role is Role.TOKEN}
        seen = _in_order(choice.grouping.apart, packed | frames - site.tokens.atoms)
        reasons = {atom: None if atom in packed else kept_apart(site.stream.node, atom) for atom in seen}
        refused += [reason.reason_at for reason in reasons.values() if reason]
        refused += [] if reasons else [f"{site.name} has no frames but those that it attends along"]
        free = {atom for atom, reason in reasons.items() if reason is None}
        if free:
            found[site] = Choice(choice.grouping.sharing(free), (*choice.reasons, "grouping='shared' asks for it"))
    if found == choices:
        raise OptionError(
            f"grouping='shared': no site can share one grouping: {'; '.join(list(dict.fromkeys(refused))[:3])}. Use "
            "grouping='auto' or 'each'"
        )
    return found


def _in_order(axis: Axis, atoms: Collection[Atom]) -> list[Atom]:
    """Some atoms of an axis, as it has them."""
    return [factor for factor in axis.factors if isinstance(factor, Atom) and factor in atoms]


def _in_blocks(plan: Plan, planned: Planned) -> Plan:
    """Blocks that a later operator joins stay together."""
    while True:
        choices = dict(plan.choices)
        for wish in _wishes(plan):
            for site, choice in choices.items():
                if choice.grouping.run != wish.run or not wish.together < wish.run.atoms:
                    continue
                if wish.windows and (within := choice.grouping.within(wish.together)):
                    choices[site] = _within(choice, within, wish)
                elif joined := choice.grouping.joining(wish.together, site.tokens.atoms):
                    choices[site] = Choice(joined, (*choice.reasons, str(wish)))
        if choices == plan.choices:
            break
        plan = planned(choices)
    if not any(choice.grouping.carried.atoms for choice in plan.choices.values()):
        raise OptionError(
            "grouping='blocks': no operator after any site joins tokens in blocks, such as 2 x 2 patches that become "
            "one. Use grouping='auto' or 'each'"
        )
    return plan
