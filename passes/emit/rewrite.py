"""Plan -> new graph: the only step that edits, and it edits a copy. Sizes come from types.

q k v                              q k v
 |                                  |
attention                          attend_and_sharpness -----------.
 |                                  |                          saliency
add <- residual           ->       add <- residual                 |
 |                                  |------------------ metric -> group
norm, mlp, ...                     down <--------------------------'
 |                                  |
attention                          norm, mlp, ...
 |                                  |
output                             attend (+ log mass)  ...  up -> output
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import torch
from torch import fx

from tldr_compile.passes.axes import UNIT, Axes, Kind, product
from tldr_compile.passes.capture import SDPA
from tldr_compile.passes.emit.attention import Evidence, Fused, asked, spelled_out
from tldr_compile.passes.emit.mass import Weigher
from tldr_compile.passes.emit.merging import Reader, merged
from tldr_compile.passes.emit.resample import Converter
from tldr_compile.passes.emit.resize import RESIZE, Held
from tldr_compile.passes.emit.views import Laid, Layout
from tldr_compile.passes.fx_utils import named, operator_name
from tldr_compile.passes.operators import Operators
from tldr_compile.passes.options import Policy
from tldr_compile.passes.plan import Conversion, How, Leaving, Merge, Plan, Step, at, rows_of
from tldr_compile.passes.sizes import size

aten = torch.ops.aten


@dataclass(frozen=True)
class Rewritten:
    """The new graph, and for each resolution the node that finds its grouping."""

    graph: fx.GraphModule
    groupings: dict[int, fx.Node]


@dataclass(frozen=True)
class Emitted:
    """What a node of the original graph has become: a node or a number, and the axes that its results are held along.

    `evidence` is what the attention of a site tells beside its output.
    """

    value: Any
    results: tuple[Axes, ...] = ()
    evidence: Evidence | None = None

    @property
    def laid(self) -> Laid:
        return Laid(self.value, self.results[0])


def rewrite(plan: Plan, operators: Operators, policy: Policy) -> Rewritten:
    """A copy of the plan's graph with its merges done; same placeholders, same outputs."""
    return _Rewriter(plan, operators, policy).run()


class _Rewriter:
    """Walks the graph; `env` says what each of its nodes has become, `converter` knows the resolutions so far."""

    def __init__(self, plan: Plan, operators: Operators, policy: Policy) -> None:
        self.plan, self.typed, self.policy = plan, plan.typed, policy
        self.graph = fx.Graph()
        self.layout = Layout(self.graph)
        self.converter = Converter(self.layout, operators)
        self.env: dict[fx.Node, Emitted] = {}

    def run(self) -> Rewritten:
        old = self.typed.captured.graph
        inputs = old.graph.find_nodes(op="placeholder")
        for node in inputs:
            self.env[node] = Emitted(self.graph.node_copy(node), self._full(node))
        for node in inputs:
            self.layout.learn(self.env[node].value)
        for node in old.graph.nodes:
            if node.op != "placeholder":
                self.env[node] = self._emit(node)
                self.layout.learn_from_data(node, self.env[node].value, shortened=bool(self.plan.held(node)))
                for merge in self.plan.merges_after(node):
                    self._merge(merge)
        self.graph.eliminate_dead_code()
        module = fx.GraphModule(old, self.graph)
        module.meta.update(old.meta)
        return Rewritten(module, {each.index: found.node for each, found in self.converter.grouped.items()})

    def _full(self, node: fx.Node) -> tuple[Axes, ...]:
        """The axes of a node's results in the original graph."""
        return tuple(each.axes for each in self.typed.values.get(node, ()))

    def _copy(self, node: fx.Node, results: tuple[Axes, ...]) -> Emitted:
        return Emitted(self.graph.node_copy(node, lambda each: self.env[each].value), results)

    # --- one node ---

    def _emit(self, node: fx.Node) -> Emitted:
        if isinstance(node.meta.get("val"), (torch.SymInt, int)) and self.layout.knows(node.meta["val"]):
            return Emitted(self.layout.length(size(node.meta["val"])))
        if node.target is getitem and (results := self.env[node.args[0]].results):  # type: ignore[index]
            return self._copy(node, (results[node.args[1]],))  # type: ignore[index]
        if node.op == "output":
            return self._output(node)
        step, merge = self.plan.steps.get(node), self.plan.merge_of(node)
        busy = step and (step.held or step.conversions or step.weighings or step.scalings)
        if step is None or not (busy or (merge is not None and asked(self.policy))):
            return self._copy(node, self._full(node))
        results = tuple(at(axes, step.held) for axes in self._full(node))
        operands = self._operands(node, step)
        if node.target is SDPA:
            emitted = self._attention(node, step, merge, operands, results)
        else:
            evidence = None
            new = self._call(node, step, operands, results)
            if merge is not None:
                evidence = self._spelled_out(merge)
            emitted = Emitted(new, results, evidence)
        if isinstance(emitted.value, fx.Node):
            emitted.value.meta = {key: value for key, value in node.meta.items() if key != "val"}
        return emitted

    def _output(self, node: fx.Node) -> Emitted:
        operands = self._operands(node, self.plan.steps.get(node, Step()))
        for each in self.plan.leaving:
            operands[each.operand] = self._left(each, operands[each.operand])
        (results,), _ = self._arguments(node, iter(operands))
        kept = self._kept() if self.policy.return_places else ()
        return Emitted(self.graph.output((*results, *kept)))

    def _kept(self) -> tuple[fx.Node, fx.Node]:
        """Of every group that leaves its place and its mass, `[B, n]`."""
        rows = rows_of(self.plan)
        resolution, full, call = rows.resolution, (rows.batch, rows.tokens), self.layout.call
        grouped, short = self.converter.grouped[resolution], at(full, [resolution])
        weights = self._repeated(grouped.mass, (resolution.batch, resolution.axis), short)
        if rows.leaving.key is None:
            numbers = Laid(self.layout.numbers(grouped.kept, full[1:]), full[1:])
            picking = Conversion(0, resolution.run, None, resolution, How.PICK)
            places = self.converter.convert(numbers, picking, reads=full)
            return self.layout.arrange(places.node, places.axes, short), weights
        ranks = self.layout.view(self._ranks(rows.leaving), short).node
        order = call(aten.argsort.default, ranks, 1)
        return call(aten.gather.default, ranks, 1, order), call(aten.gather.default, weights, 1, order)

    def _ranks(self, leaving: Leaving) -> Laid:
        """Where everything that is left stood among all keys in order."""
        keys = self.env[leaving.key].value  # type: ignore[index]
        ranks = self.layout.call(aten.argsort.default, self.layout.call(aten.argsort.default, keys))
        first, *_ = self.typed.value(leaving.value).axes
        return self.converter.converted(Laid(ranks, (first,)), leaving.key_conversions)

    def _repeated(self, node: fx.Node, axes: Axes, target: Axes) -> fx.Node:
        """Laid as `target`, once for each value of what `axes` have not."""
        known = {factor for axis in axes for factor in axis.factors}
        apart = [product([factor]) for axis in target for factor in axis.factors]
        held = tuple(each if known.issuperset(each.factors) else UNIT for each in apart)
        wide = self.layout.call(aten.expand.default, self.layout.arrange(node, axes, held), self.layout.lengths(apart))
        return self.layout.call(aten.reshape.default, wide, self.layout.lengths(target))

    def _left(self, leaving: Leaving, operand: Laid) -> Laid:
        """An output that leaves short: where it has a key, in the order of the keys that are left."""
        if leaving.key is None:
            return self.converter.converted(operand, leaving.conversions)
        laid = self._brought(leaving.value, leaving.conversions)
        order = self.layout.call(aten.argsort.default, self._ranks(leaving).node)
        return Laid(self.layout.call(aten.index_select.default, laid.node, 0, order), laid.axes)

    def _operands(self, node: fx.Node, step: Step) -> list[Laid]:
        typed, operands, own = self.typed.calls.get(node), self.typed.operands(node), self.typed.own(node)
        laid = [
            self.env[each].laid if self.typed.value(each).varies else Laid(self.env[each].value, own[k])
            for k, each in enumerate(operands)
        ]
        for conversion in step.conversions:
            number = conversion.operand
            reads, full = typed.reads[number] if typed else None, self.typed.value(operands[number]).axes
            laid[number] = self.converter.convert(laid[number], conversion, reads=reads, full=full)
            if typed is not None and not typed.known and operands[number].meta["val"].is_contiguous():
                laid[number] = self._contiguous(laid[number])
        for scaling in step.scalings:
            laid[scaling.operand] = self._weigher.scaled(laid[scaling.operand], scaling)
        return laid

    def _contiguous(self, laid: Laid) -> Laid:
        """What an operator of which nothing is known may read by its place in memory (`as_strided`)."""
        node = self.layout.call(aten.clone.default, laid.node, memory_format=torch.contiguous_format)
        return Laid(node, laid.axes)

    def _call(self, node: fx.Node, step: Step, operands: Sequence[Laid], results: tuple[Axes, ...]) -> fx.Node:
        operands = list(operands)
        for use, weight in self._weigher.weights(step.weighings, operands).items():
            if use.kind not in (Kind.CONTRACT, Kind.LINEAR):
                weighing = next(each for each in step.weighings if each.use is use)
                return self._weigher.sum(node, weighing, operands[0], weight)
            operands[use.operand] = self._weigher.multiplied(operands[use.operand], weight)
        args, kwargs = self._arguments(node, iter(operands))
        name = operator_name(node)
        if name in RESIZE and step.held:
            given = named(node, args, kwargs)
            held = Held(node.target, given, self.typed.calls[node], operands[0].axes, results, self.layout.length)
            target, args, *options = RESIZE[name](held)
            return self.layout.call(target, *args, **dict(*options))
        return self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)

    def _arguments(self, node: fx.Node, feed: Iterator[Laid]) -> tuple[Any, Any]:
        """A call's arguments with its tensor operands, in order, from `feed`."""

        def new(each: fx.Node) -> Any:
            return next(feed).node if isinstance(each.meta.get("val"), torch.Tensor) else self.env[each].value

        return fx.node.map_arg((node.args, dict(node.kwargs)), new)

    # --- attention and merges ---

    @property
    def _weigher(self) -> Weigher:
        return Weigher(self.converter, self.policy)

    def _attention(
        self, node: fx.Node, step: Step, merge: Merge | None, operands: Sequence[Laid], results: tuple[Axes, ...]
    ) -> Emitted:
        call = Fused(self._weigher, node, operands, step.weighings)
        if merge is None:
            return Emitted(call.plain(), results)
        value, evidence = call.of_site(merge.site, step, self.typed.calls[node].reads, results[0])
        return Emitted(value, results, evidence)

    def _spelled_out(self, merge: Merge) -> Evidence:
        attention = merge.site.attention
        assert attention.probabilities is not None
        held = self.plan.steps[attention.scored].held
        keys = self.env[attention.keys].laid if attention.keys is not None else None
        probabilities = self.env[attention.probabilities].laid
        return spelled_out(self.converter, self.policy, merge.site, held, probabilities, keys, merge.keys)

    def _merge(self, merge: Merge) -> None:
        site, node = merge.site, merge.node
        before = site.stream.before
        reader = Reader(
            self.converter,
            self.policy,
            merge,
            stream=self._brought(node, merge.stream),
            before=lambda: self._brought(before, merge.before),
            stretch=lambda: [self._brought(*each) for each in merge.stretch],
            evidence=self.env[site.attention.node].evidence,
            depth=site.index / len(self.plan.sites),
        )
        self.converter, laid = merged(reader)
        self.env[node] = replace(self.env[node], value=laid.node, results=(laid.axes,))

    def _brought(self, node: fx.Node, conversions: Sequence[Conversion]) -> Laid:
        """A value along the residual stream as it is where a merge starts."""
        return self.converter.converted(self.env[node].laid, conversions, self.typed.value(node).axes)
