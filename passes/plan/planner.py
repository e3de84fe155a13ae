"""Schedule x sites x types -> a plan: one walk over the graph, which knows of every value how it is held.

x [b, n, C] -- attention, add -->  merged: [b, n1, C]  --> linear: at n1  --> reshape to a grid: restored
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from operator import getitem

import torch
from torch import fx

from tldr_compile.passes.axes import Atom, Axis, Kind, Typed, TypedGraph, Value, touches
from tldr_compile.passes.capture import Attention
from tldr_compile.passes.errors import NothingToMerge
from tldr_compile.passes.plan import cost, shares
from tldr_compile.passes.plan.barriers import Asked, Obstacle, obstacle
from tldr_compile.passes.plan.choice import Choices, chosen, finest
from tldr_compile.passes.plan.leaving import leaving, restoring
from tldr_compile.passes.plan.plan import (
    OF_ATTENTION,
    Barrier,
    Conversion,
    How,
    Leaving,
    Merge,
    Pairs,
    Plan,
    Scaling,
    Step,
    Weighing,
    Weight,
)
from tldr_compile.passes.plan.resolution import Resolution, holds, meet, of_run, tokens_at
from tldr_compile.passes.plan.schedule import Entry, bind_schedule, in_blocks, removed
from tldr_compile.passes.plan.states import PLAIN, State, bring, doubled, how_down, joined, of_rows, told_apart, twice
from tldr_compile.passes.refusal import Refusal
from tldr_compile.passes.sites import AnySite, Site, no_sites, why_nothing
from tldr_compile.passes.sites.dependence import Mixing
from tldr_compile.passes.sizes import simplify

_WEIGHED = frozenset({Kind.MEAN, Kind.SUM, Kind.SOFTMAX, Kind.KEYS, Kind.CONTRACT, Kind.LINEAR})


def make_plan(
    typed: TypedGraph,
    sites: tuple[AnySite, ...],
    attentions: tuple[Attention, ...],
    misses: tuple[Refusal, ...],
    schedule: Sequence[Entry] | Entry,
    *,
    default: bool = False,
    grouping: str = "auto",
    merged_outputs: bool = False,
    asks: Collection[str] = (),
    pairs: Pairs | None = None,
    compares: Sequence[str] = ("tokens",),
) -> Plan:
    """Decide everything. Merges that nobody wrote down (the default schedule, one fraction) have to pay.

    Raises `ScheduleError`, or `NothingToMerge` if a positive schedule would remove nothing.
    """
    positive = any(schedule) if isinstance(schedule, Sequence) else schedule > 0
    if positive and not any(isinstance(site, Site) for site in sites):
        raise NothingToMerge(why_nothing(sites, misses, attentions))
    entries = bind_schedule(schedule, sites, default=default)

    def planned(entries: Sequence[Entry], choices: Choices) -> Plan:
        given = {site: entry for site, entry in zip(sites, entries, strict=True) if isinstance(site, Site)}
        walk = _Walk(typed, given, choices, merged_outputs, asks)
        walk.run()
        short = {each for leaving in walk.leaving for each in leaving.held}
        merges = tuple(replace(merge, ordered=merge.target in short) for merge in walk.merges)
        made = Plan(typed, sites, misses, tuple(entries), merges, walk.steps, walk.leaving, choices, others=others)
        return replace(made, pairs=pairs, compares=tuple(compares))

    others = tuple(no_sites(typed, attentions))
    able = [site for site in sites if isinstance(site, Site)]
    if positive:
        plan = chosen(grouping, able, partial(planned, entries), Mixing(typed, attentions).kept_apart)
    else:
        plan = planned(entries, finest(able))
    if default or not isinstance(schedule, Sequence):
        plan = _paying(plan, partial(planned, choices=plan.choices))
    if positive and not plan.merges:
        if plan.left_out:
            raise NothingToMerge(_nothing_pays(sorted(plan.left_out, key=lambda site: site.index)))
        raise NothingToMerge(
            f"the schedule {list(entries)} removes no token: at every site its fraction of the tokens rounds down to "
            "0. Give larger entries, or a schedule of zeros to leave the model as it is."
        )
    return plan


def _paying(plan: Plan, planned: cost.Planned) -> Plan:
    """Without the merges that cost more to restore than they save; the last first, for they save least.

    A merge that nothing restores stays: where so little follows it that matching costs more, the report warns.
    """
    inside = [each.conversion.source for each in plan.restored() if each.node.op != "output"]
    forced = {resolution for source in inside if source for resolution in source.chain}
    doubtful = [merge.site for merge in plan.merges if merge.target in forced]
    left_out: list[Site] = []
    best = cost.of(plan)
    for site in reversed(doubtful):
        entries = tuple(0 if s is site else e for s, e in zip(plan.sites, plan.schedule, strict=True))
        without = planned(entries)
        if (price := cost.of(without)) <= best:
            plan, best = without, price
            left_out.append(site)
    if plan.merges and doubtful and best >= cost.dense(plan):
        left_out += [merge.site for merge in plan.merges]
        plan = planned([0] * len(plan.sites))
    return replace(plan, left_out=tuple(left_out))


def _nothing_pays(sites: Sequence[Site]) -> str:
    names = ", ".join(f"{site.index} ({site.attention.node.name})" for site in sites)
    return (
        f"no merge pays: at the sites {names} restoring tokens where they are needed costs more than merging saves. "
        "Give a schedule with one entry per site to merge there all the same."
    )


class _Walk:
    """One pass over the graph: the `State` of every value, and the `Step` of every call."""

    def __init__(
        self,
        typed: TypedGraph,
        entries: Mapping[Site, Entry],
        choices: Choices,
        merged_outputs: bool,
        asks: Collection[str],
    ) -> None:
        self.typed, self.entries, self.choices = typed, entries, choices
        self.merged_outputs, self.asks = merged_outputs, asks
        self.states: dict[fx.Node, tuple[State, ...]] = {}
        self.steps: dict[fx.Node, Step] = {}
        self.merges: list[Merge] = []
        self.leaving: tuple[Leaving, ...] = ()
        self.left: dict[Axis, Fraction] = {}  # what rounded to nothing, of few blocks, goes at the run's next site

    def run(self) -> None:
        for node in self.typed.captured.graph.graph.nodes:
            self.visit(node)

    def state(self, node: fx.Node) -> State:
        return self.states.get(node, (PLAIN,))[0]

    def visit(self, node: fx.Node) -> None:
        if node.op == "output":
            self.steps[node] = self._output(node)
            return
        if node in self.typed.calls:
            self.steps[node], self.states[node] = self._call(node, self.typed.calls[node])
        elif node.op == "call_function" and node.target is getitem and node.args[0] in self.states:
            self.states[node] = (self.states[node.args[0]][node.args[1]],)  # type: ignore[index]
            self.steps[node] = Step(held=self.state(node).held)
        for site, entry in self.entries.items():
            if entry and site.stream.node is node:
                self._merge(node, site, entry)

    # --- merging ---

    def _merge(self, node: fx.Node, site: Site, entry: Entry) -> None:
        grouping, state = self.choices[site].grouping, self.state(node)
        run, batch = grouping.run, grouping.apart
        weight = state.weight(run)
        source = weight.resolution if weight and not weight.gone and weight.resolution.batch == batch else None
        source = of_run(state.held, run) or source
        source = source if source is not None and source.batch.atoms == batch.atoms else None
        tokens = tokens_at(run, source)
        block = grouping.block(site.tokens.atoms)
        entry = in_blocks(entry, block, site)
        left = self.left.pop(run, Fraction())
        count = removed(entry, tokens.size, left)
        if count == 0:
            if block != 1 and isinstance(entry, float) and isinstance(tokens.size, int):
                self.left[run] = left + Fraction(str(entry)) * tokens.size
            return
        number = len(self.merges) + 1
        target = Resolution(
            number, run, batch, Atom(simplify(tokens.size - count), f"n{number}", clip=True), Atom(count), source
        )
        kept = tuple(r for r in state.held if not r.meets(target))
        wanted = (*kept, *([source] if source else []))
        scored = self.state(site.attention.scored).held if site.attention.scored in self.states else ()
        axes = self.typed.value(node).axes
        told = OF_ATTENTION.intersection(self.asks)
        keys = site.attention.keys if "keys" in told else None
        before = self.state(site.stream.before).held
        self.merges.append(
            Merge(
                site,
                grouping,
                node,
                count,
                source,
                target,
                kept,
                stream=tuple(bring(axes, state.held, wanted, How.MERGE)),
                rows=tuple(of_rows(scored, target, source)) if told else (),
                keys=self._keys_as_scored(keys, scored) if keys else (),
                before=tuple(bring(axes, before, wanted, How.MERGE)) if "before" in self.asks else (),
                stretch=tuple(self._ends(site, wanted)) if "mlp shift" in self.asks else (),
                told=told,
            )
        )
        weighed = tuple(w for w in state.weighed if not w.resolution.meets(target))
        self.states[node] = (State((*kept, target), (*weighed, Weight(target, held=True))),)

    def _ends(self, site: Site, wanted: Sequence[Resolution]) -> Iterator[tuple[fx.Node, tuple[Conversion, ...]]]:
        """Of the stretch above, as they are held by now: merged at the attention that it begins behind."""
        for each in site.stream.stretch or ():
            axes = self.typed.value(each).axes
            yield each, tuple(bring(axes, self.state(each).held, wanted, How.MERGE))

    def _keys_as_scored(self, keys: fx.Node, scored: Sequence[Resolution]) -> tuple[Conversion, ...]:
        return tuple(bring(self.typed.value(keys).axes, self.state(keys).held, scored, How.MERGE))

    # --- calls ---

    def _call(self, node: fx.Node, typed: Typed) -> tuple[Step, tuple[State, ...]]:
        states = [self.state(each) for each in self.typed.operands(node)]
        runs = {r.run: None for state in states for r in (*state.held, *(w.resolution for w in state.weighed))}
        runs.update(dict.fromkeys(each.run for each in self._masks_summed(node, typed)))
        step = Step()
        results = [PLAIN] * len(typed.outputs)
        for run in runs:
            one, after = self._over(node, typed, states, run)
            step = Step(
                step.held + one.held,
                step.conversions + one.conversions,
                step.weighings + one.weighings,
                step.scalings + one.scalings,
                step.barriers + one.barriers,
            )
            results = [joined(*pair) for pair in zip(results, after, strict=True)]
        return step, tuple(results)

    def _over(self, node: fx.Node, typed: Typed, states: Sequence[State], run: Axis) -> tuple[Step, tuple[State, ...]]:
        """What a call does over one run, and what is known of its results then."""
        target = meet([r for state in states for r in state.held if r.run == run])
        target = target or of_run(self._masks_summed(node, typed), run)
        barriers: list[Barrier] = []
        marked = tuple(k for k, state in enumerate(states) if state.dims(run))
        as_numbers = bool(marked) and not shares.commutes(node, self.typed, run, marked)
        if target is not None:
            found = obstacle(Asked(typed, run, target, self.typed.conflicts.get(node)))
            if found is None and as_numbers:
                found = Obstacle(f"it reads probabilities over {run!r} as numbers")
            if found is None and self._counts_in_a_product(node, typed, run):
                found = Obstacle("it counts tokens in a product")
            if found is None and any(run in state.scaled for state in states):
                found = Obstacle(f"it holds probabilities over {run!r} at full length")
            if found is not None:
                barriers.append(Barrier(run, found.reason, found.together))
                target = None
        several = enumerate(states) if as_numbers else ()
        scalings = tuple(scaling for number, state in several for scaling in self._scalings(number, state, run))
        weighings = tuple(self._weighings(node, typed, states, run, target))
        step = Step(
            held=(target,) if target is not None else (),
            conversions=tuple(self._conversions(node, typed, states, run, target)),
            weighings=weighings,
            scalings=scalings,
            barriers=tuple(barriers),
        )
        return step, tuple(
            self._after(node, typed, states, run, target, step, number) for number in range(len(typed.outputs))
        )

    def _masks_summed(self, node: fx.Node, typed: Typed) -> tuple[Resolution, ...]:
        """The latest resolutions of what a mask is summed over, which says how many tokens a masked mean is of.

        Such a sum is done on groups, as that of the tokens which it divides. As a number of tokens it stays exact.
        """
        operands = self.typed.operands(node)
        if len(operands) != 1 or not all(use.kind in (Kind.SUM, Kind.MEAN) for use in typed.uses) or not typed.uses:
            return ()
        value = self.typed.value(operands[0])
        floats = all(each.floating for each in self.typed.values[node]) or self._read_as(node) is not None
        if value.clip or not floats:
            return ()
        atoms = {atom for axis in value.axes for atom in axis.atoms}
        summed = {atom for use in typed.uses for dim in use.dims for atom in value.axes[dim].atoms}
        latest = {merge.target.run: merge.target for merge in self.merges}
        return tuple(r for r in latest.values() if r.run.atoms <= summed and r.batch.atoms <= atoms)

    def _conversions(
        self, node: fx.Node, typed: Typed, states: Sequence[State], run: Axis, target: Resolution | None
    ) -> Iterator[Conversion]:
        for number, operand in enumerate(self.typed.operands(node)):
            source = of_run(states[number].held, run)
            if source is target or not touches(typed.own[number], run):
                continue
            if source is None and not holds(typed.reads[number], run):
                continue
            have, wanted = ([source] if source else []), ([target] if target else [])
            yield from bring(typed.reads[number], have, wanted, how_down(self.typed.value(operand)), number)

    def _weighings(
        self, node: fx.Node, typed: Typed, states: Sequence[State], run: Axis, target: Resolution | None
    ) -> Iterator[Weighing]:
        if any(run in state.scaled for state in states) or self._counts_in_a_product(node, typed, run):
            return
        floating = all(value.floating for value in self._results(node))
        for use in typed.uses:
            if use.kind not in _WEIGHED:
                continue
            weight = Weight(target, held=True) if target is not None else self._weight_of(states, use.operand, run)
            if weight is None:
                continue
            axes = typed.reads[use.operand]
            left = run.atoms - weight.gone
            summed = left & {atom for dim in use.dims for atom in axes[dim].atoms}
            here = left <= {atom for each in axes for atom in each.atoms}
            if not summed or not here or doubled(axes, weight.resolution, use.dims):
                continue
            if use.kind is Kind.LINEAR and (weight.held or summed != left):
                continue
            read = None if floating or use.kind is not Kind.SUM else self._read_as(node)
            counts = use.kind is Kind.SUM and not floating and read is None
            if not (counts and not weight.held):
                yield Weighing(use, weight, counts, summed != left, read)

    def _counts_in_a_product(self, node: fx.Node, typed: Typed, run: Axis) -> bool:
        """Whether integers are multiplied and summed over tokens: each token counts once."""
        floating = all(value.floating for value in self.typed.values[node])
        return not floating and any(
            use.kind in (Kind.CONTRACT, Kind.LINEAR) and touches((typed.reads[use.operand][d] for d in use.dims), run)
            for use in typed.uses
        )

    def _weight_of(self, states: Sequence[State], operand: int, run: Axis) -> Weight | None:
        """The weight of restored tokens: that of the operand that is summed, or of what it is multiplied with."""
        own = states[operand].weight(run)
        others = (state.weight(run) for state in states)
        found = own or next((each for each in others if each is not None), None)
        return replace(found, held=False) if found else None

    def _results(self, node: fx.Node) -> tuple[Value, ...]:
        return self.typed.values[node]

    def _read_as(self, node: fx.Node) -> torch.dtype | None:
        """What an integer sum becomes, if it has no reader but those that make floats of it."""
        results = [value for user in node.users for value in self.typed.values.get(user, ())]
        floats = bool(results) and all(user in self.typed.calls for user in node.users)
        if not floats or not all(value.floating for value in results):
            return None
        dtype: torch.dtype = next(iter(node.users)).meta["val"].dtype
        return dtype

    def _scalings(self, operand: int, state: State, run: Axis, merged: bool = False) -> Iterator[Scaling]:
        """An operand that is a distribution over the run gets the weights of its tokens."""
        if (weight := state.weight(run)) is not None:
            for dim in state.dims(run):
                yield Scaling(operand, dim, replace(weight, held=merged and weight.held))

    def _after(
        self,
        node: fx.Node,
        typed: Typed,
        states: Sequence[State],
        run: Axis,
        target: Resolution | None,
        step: Step,
        number: int,
    ) -> State:
        """What is known of a result, as far as one run goes."""
        axes = typed.outputs[number]
        atoms = {atom for each in axes for atom in each.atoms}
        if target is not None:
            if not holds(axes, run):
                return PLAIN
            found = State((target,), (Weight(target, held=True),))
        else:
            known = [weight for state in states if (weight := state.weight(run)) is not None]
            resolution = meet([weight.resolution for weight in known])
            if not typed.known or resolution is None or step.scalings or any(run in s.scaled for s in states):
                stays = bool(step.scalings or any(run in s.scaled for s in states)) and bool(run.atoms & atoms)
                return State(scaled=frozenset({run}) if stays else frozenset())
            summed = {a for w in step.weighings for d in w.use.dims for a in typed.reads[w.use.operand][d].atoms}
            absent = run.atoms - atoms
            before = frozenset(atom for weight in known for atom in weight.gone)
            known_batch = set(resolution.batch.factors) <= told_apart(axes, run)
            if absent == run.atoms or not absent <= before | summed or not known_batch or twice(axes, run):
                return PLAIN
            found = State(weighed=(Weight(resolution, frozenset(absent)),))
        return replace(found, shares=tuple(self._shares(node, typed, states, run, step, number)))

    def _shares(
        self, node: fx.Node, typed: Typed, states: Sequence[State], run: Axis, step: Step, number: int
    ) -> Iterator[tuple[Axis, int]]:
        """Along which dimensions a result is a distribution over the run."""
        found: dict[int, None] = {}
        for weighing in step.weighings:
            if weighing.use.kind is Kind.SOFTMAX:
                found.update(dict.fromkeys(weighing.use.dims))
        for operand, state in enumerate(states):
            for dim in state.dims(run):
                if not shares.summed(typed, operand, dim):
                    found.update(dict.fromkeys(shares.dims_after(self.typed, node, operand, dim, run)[number]))
        return ((run, dim) for dim in found)

    def _output(self, node: fx.Node) -> Step:
        results = self.typed.operands(node)
        writes = len(self.typed.captured.mutated)
        states = [self.state(each) for each in results]
        self.leaving = leaving(self.typed, results, writes, self.state) if self.merged_outputs else ()
        short = {each.operand for each in self.leaving}
        for each in self.leaving:
            if each.key is not None and set(results[each.operand].users) == {node}:
                self.steps[results[each.operand]] = Step()  # nobody reads it at full length
        scalings = (
            scaling
            for number, state in enumerate(states)
            for run in {each for each, _ in state.shares}
            for scaling in self._scalings(number, state, run, number in short)
        )
        return Step(conversions=restoring(states, short), scalings=tuple(scalings))
