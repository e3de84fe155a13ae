"""What was found, merged, restored and left alone, and why: a table to print, a dictionary to keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from math import isnan
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils.flop_counter import FlopCounterMode

from tldr_compile import passes
from tldr_compile.ops.attention_operators import attention_flop
from tldr_compile.passes import show
from tldr_compile.passes.axes import Axes, Axis
from tldr_compile.passes.plan import Entry, Merge, Plan, Resolution, Restored, at, cost, stay_long
from tldr_compile.passes.refusal import Refusal
from tldr_compile.passes.sites import AnySite, RefusedSite, Site, protected
from tldr_compile.passes.sizes import Size, simplify
from tldr_compile.passes.sources import line_of

_NO_CLASS_TOKEN = (
    "the clip comes as tokens, so that no class token could be seen: protect= says how many tokens lead that are never "
    "merged (protect=1 for one class token, protect=0 for none)"
)


class Report:
    """The facts of one merged graph. `print(report)` shows a table; `to_dict()` has the same facts for a program."""

    def __init__(
        self,
        merged: passes.Merged,
        *,
        default: bool = False,
        nothing: str | None = None,
        asked: str = "",
        how: str = "",
        verbose: bool = False,
    ) -> None:
        self._merged, self._default, self.nothing, self._verbose = merged, default, nothing, verbose
        self.how = how
        """How the model was captured, where it was not by torch's own tracer."""
        self._asked = asked if nothing else ""

    @property
    def plan(self) -> Plan:
        return self._merged.plan

    @cached_property
    def sites(self) -> list[dict[str, Any]]:
        """One entry per self-attention over clip tokens, in execution order."""
        return [self._site(site) for site in self.plan.sites]

    @cached_property
    def groupings(self) -> dict[str, list[int]]:
        """Why sites do not group their tokens in the finest way, or in no coarser one: each reason, and the sites."""
        found: dict[str, list[int]] = {}
        for site in self.plan.sites:
            for reason in self.plan.choices[site].reasons if isinstance(site, Site) else ():
                found.setdefault(reason, []).append(site.index)
        return found

    @cached_property
    def restorations(self) -> list[dict[str, Any]]:
        """Where a value got its full length back: the value, the operator that forced it, and why."""
        return list(self._restorations())

    @cached_property
    def notes(self) -> list[str]:
        """What could not be known of this graph, and the option that tells it; where merging saves next to nothing."""
        unseen = self._merged.options.protect == "auto" and _out_of_sight(self.plan)
        return [*([_NO_CLASS_TOKEN] if unseen else []), *self._unread, *self.warnings]

    @property
    def _unread(self) -> Iterator[str]:
        """Where a reading has nothing to tell of any token."""
        first = [merge.site.index for merge in self.plan.merges if merge.site.stream.stretch is None]
        if first and "mlp shift" in self._merged.options.asks:
            yield (
                f"'mlp shift' is 0 of all tokens of sites {_spans(first)}, above which no MLP lies on the same stream: "
                "by it alone tokens weigh alike there, and dropping loses the first"
            )

    @property
    def warnings(self) -> Iterator[str]:
        """Where less than 5 % is saved, and which outputs are asked to leave merged and do not."""
        for node, why in stay_long(self.plan) if self._merged.options.outputs == "merged" else ():
            yield f"output {node.name} [{_text(self.plan.typed.value(node).axes)}] does not leave merged: {why}"
        if self.plan.merges:
            part = cost.of(self.plan) / max(cost.dense(self.plan), 1)
            if part > 0.95:
                yield (
                    f"the merged graph costs {part:.0%} of the dense one, if every byte that restoring and picking "
                    f"tokens moves counts as {cost.BYTE} operations: other sites or larger entries may save more, and "
                    "tldr_compile.explain says what is restored, and for which operator"
                )

    @cached_property
    def gflops(self) -> tuple[float, float]:
        """Floating-point operations of all matrix products, in 1e9, before and after; at the example sizes."""
        return _gflops(self.plan.typed.captured.graph), _gflops(self._merged.graph)

    def to_dict(self) -> dict[str, Any]:
        before, after = self.gflops
        solved = self.plan.solved
        return {
            "schedule": list(self.plan.schedule),
            "default_schedule": self._default,
            "budget": None if solved is None else {**vars(solved), "sizes": {**solved.sizes}},
            "sites": self.sites,
            "groupings": self.groupings,
            "restorations": self.restorations,
            "not_attention": [_refused(each) for each in self.plan.misses],
            "not_sites": [_refused(each) for each in self.plan.others],
            "nothing": self.nothing,
            "how": self.how,
            "notes": self.notes,
            "gflops_before": before,
            "gflops_after": after,
        }

    def _site(self, site: AnySite) -> dict[str, Any]:
        merge = next((merge for merge in self.plan.merges if merge.site is site), None)
        axis, resolutions = self._token_axis(site)
        before, after = (at((axis,), held)[0].size for held in resolutions)
        entry = self.plan.schedule[site.index]
        return {
            "index": site.index,
            "node": site.attention.node.name,
            "tokens": repr(site.tokens),
            "batch": repr(site.clip_batch),
            "layout": site.layout,
            "grouping": str(self.plan.choices[site].grouping) if isinstance(site, Site) else "",
            "stream": repr(axis),
            "tokens_in": _plain(before),
            "tokens_out": _plain(after),
            "protected": _plain(protected(site.tokens)),
            "status": "merged" if merge else "refused" if isinstance(site, RefusedSite) else "left",
            "reason": "" if merge else self._why_left(site, entry),
            "line": line_of(site.attention.node),
            "inserted": _inserted(merge, entry) if merge else "",
        }

    def _why_left(self, site: AnySite, entry: Entry) -> str:
        if isinstance(site, RefusedSite):
            return site.reason
        if self.nothing:
            return "nothing is merged"
        if site in self.plan.left_out:
            return "merging here costs more than it saves"
        return "its fraction rounds down to 0" if entry else "the schedule gives 0"

    def _token_axis(self, site: AnySite) -> tuple[Axis, tuple[Sequence[Resolution], Sequence[Resolution]]]:
        """The token axis that a site is counted on, and the resolutions it has before and after."""
        if isinstance(site, RefusedSite):
            held = self.plan.steps[site.attention.scored].held
            return site.tokens, (held, held)
        merge = next((each for each in self.plan.merges if each.site is site), None)
        if merge is not None:
            before: Sequence[Resolution] = (merge.source,) if merge.source else ()
            after: Sequence[Resolution] = (merge.target,)
        else:
            before = after = self.plan.held(site.stream.node)
        for axis in self.plan.typed.value(site.stream.node).axes:
            if axis.atoms >= site.stream.finest.run.atoms:
                return axis, (before, after)
        return site.stream.finest.run, (before, after)

    def _restorations(self) -> Iterator[dict[str, Any]]:
        for each in self.plan.restored():
            tokens = _text(self.plan.typed.value(each.value).axes)
            yield {**_refused(Refusal(each.node, each.reason)), "value": each.value.name, "tokens": tokens}

    def __str__(self) -> str:
        before, after = self.gflops
        default = ", the default: no schedule was given" if self._default else ""
        part = f" ({after / before:.0%})" if before else ""
        saved = f"GFLOPs in matrix products: {before:.4g} -> {after:.4g}{part}"
        if isnan(before):
            saved = "GFLOPs in matrix products: not known, for sizes depend on the data"
        schedule = self._asked or str(list(self.plan.schedule))
        lines = [f"tldr-compile: schedule {schedule}{default}", *filter(None, (self._budget, self.how)), saved]
        if self.nothing:
            lines.append(f"nothing is merged: {self.nothing}")
        columns = ("index", "node", "tokens", "batch", "layout", "grouping", "tokens_in", "tokens_out", "protected")
        names = ("tokens", "per batch of", "layout", "grouping", "in", "out", "protected", "what is done")
        header = ("site", "attention", *names)
        rows = [
            (*(str(site[key]) for key in columns), site["inserted"] or f"{site['status']}: {_told(site)}")
            for site in self.sites
        ]
        rows = list(_folded(rows))
        lines += _table(header, rows) if rows else ["no attention over clip tokens"]
        lines += [f"grouping of sites {_spans(numbers)}: {reason}" for reason, numbers in self.groupings.items()]
        alike: dict[tuple[str, Any, str], list[Restored]] = {}
        for each in self.plan.restored():
            axes = _text(self.plan.typed.value(each.value).axes)
            alike.setdefault((axes, each.node.target, each.reason), []).append(each)
        for (axes, _, reason), (first, *others) in alike.items():
            more = f" (and {len(others)} more like it)" if others else ""
            lines.append(f"restored: {first.value.name} [{axes}] for {Refusal(first.node, reason)}{more}")
            lines += self._around(first.node)
        for leaving in self.plan.leaving:
            full = self.plan.typed.value(leaving.value).axes
            short = at(full, leaving.held)
            sizes = (f"{one.size} of {two.size}" for one, two in zip(short, full, strict=True) if one.size != two.size)
            lines.append(f"leaves merged: {leaving.value.name} [{_text(short)}], with {' x '.join(sizes)} entries")
        for kind, refusals in (("not a site", self.plan.others), ("not an attention", self.plan.misses)):
            for refusal in refusals:
                lines.append(f"{kind}: {refusal}")
                lines += self._around(refusal.node)
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    __repr__ = __str__

    @property
    def _budget(self) -> str:
        """What a budget became."""
        found = self.plan.solved
        if found is None:
            return ""
        sizes = ", ".join(f"{name} {list(shape)}" for name, shape in found.sizes.items())
        return (
            f"budget {found.budget:g} of the dense operations: one fraction {found.fraction:g} at every site that can "
            f"merge costs {found.part:.2%} of them at {sizes}"
        )

    def _around(self, node: fx.Node) -> Iterator[str]:
        """The typed graph around a node, if that is asked for."""
        return (f"    {line}" for line in show.around(self.plan.typed, node) if self._verbose)


def _refused(refusal: Refusal) -> dict[str, Any]:
    return {
        "node": refusal.node.name,
        "operator": refusal.operator,
        "reason": refusal.reason,
        "line": refusal.line,
    }


def _told(site: Mapping[str, Any]) -> str:
    """Why nothing is merged at a site; with the line of the model where that is its own."""
    return f"{site['reason']} ({site['line']})" if site["status"] == "refused" and site["line"] else site["reason"]


def _out_of_sight(plan: Plan) -> bool:
    """Whether a site attends along tokens that came into the graph as such, in an input `[batch, tokens, channels]`."""
    inputs = plan.typed.captured.graph.graph.find_nodes(op="placeholder")
    values = [value for node in inputs for value in plan.typed.values.get(node, ())]
    given = {
        atom for value in values if value.clip and len(value.axes) == 3 for axis in value.axes for atom in axis.atoms
    }
    return any(site.tokens.atoms and site.tokens.atoms <= given and _whole(site) for site in plan.sites)


def _whole(site: AnySite) -> bool:
    """Whether all tokens of a site are the clip's: none is protected."""
    return protected(site.tokens) == 0


def _spans(numbers: Sequence[int]) -> str:
    """Ascending numbers, neighbours as one: `1-3, 7`."""
    starts = [k for k, each in enumerate(numbers) if k == 0 or each != numbers[k - 1] + 1]
    spans = [numbers[one:two] for one, two in zip(starts, [*starts[1:], len(numbers)], strict=True)]
    return ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)


def _folded(rows: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Neighbouring rows that say the same of different sites as one."""
    for _, same in groupby(rows, key=lambda row: row[2:]):
        first, *_, last = (*same,) * 2
        yield first if first is last else (f"{first[0]}-{last[0]}", f"{first[1]} ... {last[1]}", *first[2:])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    line = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return [line[0], "  ".join("-" * width for width in widths), *line[1:]]


def _text(axes: Axes) -> str:
    return " x ".join(map(repr, axes))


def _inserted(merge: Merge, entry: Entry) -> str:
    """What a merge does; a number asked for counts tokens that one attention sees, not groups."""
    removed = simplify(merge.count * merge.grouping.block(merge.site.tokens.atoms))
    return f"saliency, matching, merge to {merge.target!r}{_capped(entry, removed)}"


def _capped(entry: Entry, count: Size) -> str:
    """What to say where an entry asks for more than a site gives."""
    short = count < entry if isinstance(entry, int) and isinstance(count, int) else entry > 0.5
    return f"; {entry} asked, but no more than half can go" if short else ""


def _plain(size: Size) -> int | str:
    return size if isinstance(size, int) else str(size)


def _hint(value: Any) -> Any:
    return value.node.hint if isinstance(value, torch.SymInt) else value


def _gflops(graph: fx.GraphModule) -> float:
    """Count on fake tensors of the example sizes: nothing is computed. NaN where sizes depend on the data."""
    if any(free_unbacked_symbols(node.meta.get("val")) for node in graph.graph.find_nodes(op="placeholder")):
        return float("nan")
    try:
        return _counted(graph)
    except (DataDependentOutputException, DynamicOutputShapeException):
        return float("nan")


# What torch has no formula for.
_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flop}


def _counted(graph: fx.GraphModule) -> float:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        inputs = [
            torch.empty([_hint(s) for s in value.shape], dtype=value.dtype, device=value.device)
            if isinstance(value, torch.Tensor)
            else _hint(value)
            for value in (node.meta.get("val") for node in graph.graph.find_nodes(op="placeholder"))
        ]
        with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
            _ToOutputs(graph).run(*inputs)
    return float(counter.get_total_flops()) / 1e9


class _ToOutputs(fx.Interpreter):
    """Runs what the outputs are made of: what only asserts something of the data has nothing to run on."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.needed: set[fx.Node] = set()
        for node in reversed(graph.graph.nodes):
            if node.op == "output" or not self.needed.isdisjoint(node.users):
                self.needed.add(node)

    def run_node(self, n: fx.Node) -> Any:
        return super().run_node(n) if n in self.needed or n.op == "placeholder" else None
