"""MergePlan -> new graph: the only step that edits, and it edits a copy. Sizes come from types.

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
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from tldr_compile.passes.axes import Axes, Axis, Kind, find, product, subaxis
from tldr_compile.passes.capture import SDPA
from tldr_compile.passes.emit.mass import Weigher
from tldr_compile.passes.emit.resample import FIELDS, Converter, Laid, holding
from tldr_compile.passes.emit.resize import RESIZE, Held
from tldr_compile.passes.emit.views import Layout, segment_of
from tldr_compile.passes.errors import OptionError
from tldr_compile.passes.fx_utils import named, operator_name
from tldr_compile.passes.operators import Operators
from tldr_compile.passes.options import Policy
from tldr_compile.passes.plan import Conversion, How, Merge, Plan, Resolution, Step, at, of_run, tokens_at
from tldr_compile.passes.sites import maximal_runs
from tldr_compile.passes.sizes import size

aten = torch.ops.aten


@dataclass(frozen=True)
class Rewritten:
    """The new graph, and for each resolution the node that finds its grouping."""

    graph: fx.GraphModule
    groupings: dict[int, fx.Node]


def rewrite(plan: Plan, operators: Operators, policy: Policy) -> Rewritten:
    """A copy of the plan's graph with its merges done; same placeholders, same outputs."""
    return _Rewriter(plan, operators, policy).run()


class _Rewriter:
    def __init__(self, plan: Plan, operators: Operators, policy: Policy) -> None:
        self.plan, self.typed, self.operators, self.policy = plan, plan.typed, operators, policy
        self.graph = fx.Graph()
        self.layout = Layout(self.graph)
        self.env: dict[fx.Node, Any] = {}
        self.axes: dict[fx.Node, tuple[Axes, ...]] = {}
        self.converter = Converter(self.layout, operators)
        self.weigher = Weigher(self.converter, policy)
        self.sharpness: dict[fx.Node, Laid] = {}
        self.keys: dict[fx.Node, Laid | None] = {}

    def run(self) -> Rewritten:
        old = self.typed.captured.graph
        inputs = old.graph.find_nodes(op="placeholder")
        for node in inputs:
            self.env[node] = self.graph.node_copy(node)
            self.axes[node] = tuple(each.axes for each in self.typed.values.get(node, ()))
        for node in inputs:
            self.layout.learn(self.env[node])
        for node in old.graph.nodes:
            if node.op != "placeholder":
                self.env[node] = self._emit(node)
                self.layout.learn_from_data(node, self.env[node], shortened=bool(self.plan.held(node)))
                for merge in self.plan.merges_after(node):
                    self._merge(merge)
        self.graph.eliminate_dead_code()
        module = fx.GraphModule(old, self.graph)
        module.meta.update(old.meta)
        return Rewritten(module, {index: fields["kept"].args[0] for index, fields in self.converter.groupings.items()})  # type: ignore[misc]

    # --- one node ---

    def _emit(self, node: fx.Node) -> Any:
        if isinstance(node.meta.get("val"), (torch.SymInt, int)) and self.layout.knows(node.meta["val"]):
            return self.layout.length(size(node.meta["val"]))
        if node in self.typed.values:
            self.axes[node] = tuple(each.axes for each in self.typed.values[node])
        step = self.plan.steps.get(node)
        if node.target is getitem and node.args[0] in self.axes:
            self._inherit(node)
            return self.graph.node_copy(node, lambda n: self.env[n])
        busy = step and (step.held or step.conversions or step.weighings or step.scalings)
        if step is None or not (busy or self._scores(node)):
            return self.graph.node_copy(node, lambda n: self.env[n])
        if node in self.axes:
            self.axes[node] = tuple(at(axes, step.held) for axes in self.axes[node])
        operands = self._operands(node, step)
        new = self._call(node, step, operands)
        if node.target is not SDPA and (merge := self.plan.merge_of(node)) is not None:
            self.env[node] = new
            self._spelled_out(merge)
        if isinstance(new, fx.Node):
            new.meta = {key: value for key, value in node.meta.items() if key != "val"}
        return new

    def _inherit(self, node: fx.Node) -> None:
        """An element of a tuple is held as the tuple is."""
        source, index = node.args[0], node.args[1]
        self.axes[node] = (self.axes[source][index],)  # type: ignore[index]

    def _operands(self, node: fx.Node, step: Step) -> list[Laid]:
        typed, operands, own = self.typed.calls.get(node), self.typed.operands(node), self.typed.own(node)
        laid = [
            Laid(self.env[each], self.axes[each][0] if self.typed.value(each).varies else own[k])
            for k, each in enumerate(operands)
        ]
        for conversion in step.conversions:
            number = conversion.operand
            laid[number] = self.converter.convert(laid[number], conversion, typed.reads[number] if typed else None)
            if conversion.how is How.RESTORE:
                laid[number] = self._reshaped(laid[number], self.typed.value(operands[number]).axes)
        for scaling in step.scalings:
            laid[scaling.operand] = self.weigher.scaled(laid[scaling.operand], scaling)
        return laid

    def _reshaped(self, laid: Laid, full: Axes) -> Laid:
        """A restored value with its run on as many dimensions as it had."""
        atoms = {atom for axis in laid.axes for atom in axis.atoms}
        wanted = at(full, [merge.target for merge in self.plan.merges if merge.target.groups in atoms])
        return Laid(self.layout.reshape(laid.node, laid.axes, wanted), wanted)

    def _call(self, node: fx.Node, step: Step, operands: Sequence[Laid]) -> Any:
        if node.target is SDPA:
            return self._attention(node, step, operands)
        operands = list(operands)
        for use, weight in self.weigher.weights(step.weighings, operands).items():
            if use.kind not in (Kind.CONTRACT, Kind.LINEAR):
                weighing = next(each for each in step.weighings if each.use is use)
                return self.weigher.sum(node, weighing, operands[0], weight)
            operands[use.operand] = self.weigher.multiplied(operands[use.operand], weight)
        feed = iter(operands)
        args, kwargs = self._arguments(node, feed)
        name = operator_name(node)
        if name in RESIZE and step.held:
            given = named(node, args, kwargs)
            call, now = self.typed.calls[node], self.axes[node]
            held = Held(node.target, given, call, operands[0].axes, now, self.layout.length)
            target, args, *options = RESIZE[name](held)
            return self.layout.call(target, *args, **dict(*options))
        return self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)

    def _arguments(self, node: fx.Node, feed: Iterator[Laid]) -> tuple[Any, Any]:
        """A call's arguments with its tensor operands, in order, from `feed`."""

        def new(each: fx.Node) -> Any:
            return next(feed).node if isinstance(each.meta.get("val"), torch.Tensor) else self.env[each]

        return fx.node.map_arg((node.args, dict(node.kwargs)), new)

    # --- attention ---

    def _scores(self, node: fx.Node) -> bool:
        """Whether the saliency of a merge is computed at this node."""
        merge = self.plan.merge_of(node)
        return merge is not None and ("sharpness" in self.policy.asks or "keys" in self.policy.asks)

    def _attention(self, node: fx.Node, step: Step, operands: Sequence[Laid]) -> Any:
        given = named(node)
        log_mass = None
        for weight in self.weigher.weights(step.weighings, operands).values():
            log_mass = self.layout.call(aten.log.default, weight)
        mask = operands[3].node if len(operands) > 3 else None
        query, key, value = (each.node for each in operands[:3])
        merge = self.plan.merge_of(node)
        grouped = given.get("enable_gqa", False)
        options: dict[str, Any] = {"scale": given.get("scale"), "mask": mask, "enable_gqa": grouped}
        dropout, causal = given.get("dropout_p", 0.0), given.get("is_causal", False)
        if merge is None or "sharpness" not in self.policy.asks or dropout:
            if merge is not None:
                sharp = "sharpness" in self.policy.asks
                beside = self._sharpness(merge, operands, mask, given.get("scale")) if sharp else None
                self._note(merge, operands[1], beside)
            return self.layout.call(
                self.operators.attend,
                query,
                key,
                value,
                log_mass=log_mass,
                dropout_p=dropout,
                is_causal=causal,
                **options,
            )
        reads = [at(each, step.held) for each in self.typed.calls[node].reads[:3]]
        operands = [self.converter.broadcast(*pair) for pair in zip(operands[:3], reads, strict=True)]
        canonical = self._canonical(merge, operands)
        pair = self.layout.call(
            self.operators.attend_and_sharpness,
            *(each.node for each in canonical),
            **{**options, "mask": self._canonical_scores(merge, operands, mask)},
            log_mass=self._canonical_scores(merge, operands, log_mass),
        )
        attended, sharpness = (self.layout.call(getitem, pair, k) for k in range(2))
        self._note(merge, operands[1], sharpness)
        axes = canonical[0].axes[:-1] + canonical[2].axes[-1:]
        return self.layout.reshape(attended, axes, self.axes[node][0])

    def _canonical(self, merge: Merge, operands: Sequence[Laid]) -> list[Laid]:
        """Queries, keys and values as `[batch, heads, tokens, d]`; heads follow the batch, so this is a view."""
        result = []
        for each in operands[:3]:
            axes = (*self._batch_and_heads(merge, each.axes[:-2]), *each.axes[-2:])
            result.append(Laid(self.layout.reshape(each.node, each.axes, axes), axes))
        return result

    def _batch_and_heads(self, merge: Merge, axes: Axes) -> Axes:
        """Leading axes of an attention as two: the clip's, and the heads."""
        batch = set(merge.site.clip_batch.factors)
        factors = [f for axis in axes for f in axis.factors]
        return product(f for f in factors if f in batch), product(f for f in factors if f not in batch)

    def _canonical_scores(self, merge: Merge, operands: Sequence[Laid], mask: fx.Node | None) -> fx.Node | None:
        """An addend of the scores in the same form; broadcast first where batch and heads share or split dimensions."""
        query, key = operands[0].axes, operands[1].axes
        batch, heads = merge.site.clip_batch, merge.site.heads
        if mask is None or query[:-2] == (batch, heads):
            return mask
        mask = self.layout.call(aten.expand.default, mask, self.layout.lengths((*query[:-1], key[-2])))
        return self.layout.call(aten.reshape.default, mask, self.layout.lengths((batch, heads, query[-2], key[-2])))

    def _sharpness(self, merge: Merge, operands: Sequence[Laid], mask: fx.Node | None, scale: float | None) -> fx.Node:
        query, key, _ = self._canonical(merge, operands)
        mask = self._canonical_scores(merge, operands, mask)
        grouped = bool(named(merge.site.attention.node).get("enable_gqa", False))
        return self.layout.call(
            self.operators.sharpness, query.node, key.node, scale=scale, mask=mask, enable_gqa=grouped
        )

    def _note(self, merge: Merge, key: Laid | None, sharpness: fx.Node | None) -> None:
        """Keep what the merge of this site will ask for."""
        site = merge.site
        self.keys[site.attention.node] = key
        if sharpness is not None:
            (tokens,) = at((site.tokens,), self._held_at(merge))
            self.sharpness[site.attention.node] = Laid(sharpness, (site.clip_batch, tokens))

    def _held_at(self, merge: Merge) -> tuple[Resolution, ...]:
        return self.plan.steps[merge.site.attention.scored].held

    def _spelled_out(self, merge: Merge) -> None:
        """Where the probabilities are at hand, their sharpness is read off them."""
        attention = merge.site.attention
        assert attention.probabilities is not None
        laid = Laid(self.env[attention.probabilities], self.axes[attention.probabilities][0])
        sharpness = None
        if "sharpness" in self.policy.asks:
            axes = (*self._batch_and_heads(merge, laid.axes[:-2]), *laid.axes[-2:])
            sharpness = self.layout.call(self.operators.sharpness_of, self.layout.reshape(laid.node, laid.axes, axes))
        keys = None
        if attention.keys is not None:
            keys = self.converter.converted(Laid(self.env[attention.keys], self.axes[attention.keys][0]), merge.keys)
        self._note(merge, keys, sharpness)

    # --- merging ---

    def _merge(self, merge: Merge) -> None:
        stream, target, source = merge.site.stream, merge.target, merge.source
        assert stream is not None
        laid = self._stream(merge, merge.node, merge.stream)
        tokens = tokens_at(stream.run, source)
        metric = self._metric(merge, laid, tokens)
        told = self._told(merge, laid, tokens)
        saliency = self.layout.call(self.operators.saliency, told) if told is not None else None
        mass, sizes = self._counts(source, metric, stream.batch, tokens)
        grouping = self.layout.call(
            self.operators.group, metric, saliency, mass, sizes, self.layout.length(merge.count),
            reduction=self.policy.reduction, seed=target.index,
        )  # fmt: skip
        self.converter.groupings[target.index] = {
            name: self.layout.call(getitem, grouping, k) for k, name in enumerate(FIELDS)
        }
        laid = self.converter.down(laid, target, How.MERGE)
        self.env[merge.node], self.axes[merge.node] = laid.node, (laid.axes,)

    def _stream(self, merge: Merge, value: fx.Node, conversions: Sequence[Conversion]) -> Laid:
        """A value along the residual stream as it is where a merge starts."""
        laid = Laid(self.env[value], self.axes[value][0])
        for each in conversions:
            laid = self.converter.convert(laid, each)
            if each.how is How.RESTORE:
                laid = self._reshaped(laid, self.typed.value(value).axes)
        return laid

    def _told(self, merge: Merge, stream: Laid, tokens: Axis) -> fx.Node | None:
        """What saliency is read off, `[B, N]`; None where all tokens are alike."""
        if "sharpness" in self.policy.asks:
            return self._laid_along_stream(merge, self.sharpness[merge.site.attention.node])
        return self._shift(merge, stream, tokens) if "before" in self.policy.asks else None

    def _shift(self, merge: Merge, stream: Laid, tokens: Axis) -> fx.Node:
        """How far the attention of a site moved every token of its stream, `[B, N]` float32.

        Representation Shift (ICCV 2025): a token that a layer moves little says little. It needs no attention map.
        """
        assert merge.site.stream is not None
        before = self._stream(merge, merge.site.stream.before, merge.before)
        moved = self.layout.call(self.operators.shift, stream.node, before.node)
        rows = self._over_tokens(merge, Laid(moved, stream.axes), tokens)
        return self.layout.call(aten.linalg_vector_norm.default, rows, 2, [-1])

    def _counts(self, source: Resolution | None, like: fx.Node, batch: Axis, tokens: Axis) -> tuple[fx.Node, fx.Node]:
        """Mass and size of every token so far, `[B, N]` float32."""
        if source is not None:
            return self.converter.groupings[source.index]["mass"], self.converter.groupings[source.index]["size"]
        ones = self.graph.call_function(
            aten.new_ones.default, (like, self.layout.lengths((batch, tokens))), {"dtype": torch.float32}
        )
        return ones, ones

    def _metric(self, merge: Merge, stream: Laid, tokens: Axis) -> fx.Node:
        """What matching compares, `[B, N, C]`."""
        return self._key_metric(merge) if "keys" in self.policy.asks else self._over_tokens(merge, stream, tokens)

    def _over_tokens(self, merge: Merge, stream: Laid, tokens: Axis) -> fx.Node:
        """A value along the residual stream as rows of its clip tokens, `[B, N, C]`."""
        assert merge.site.stream is not None
        batch = merge.site.stream.batch
        stream = self.converter.apart(self.converter.flat(stream, tokens), tokens)
        (dim,) = holding(stream.axes, tokens)
        place = segment_of(stream.axes[dim], tokens)
        part = self.layout.segments(stream.node, stream.axes, dim, place)
        axes = (*stream.axes[:dim], subaxis(stream.axes[dim].segments[slice(*place)]), *stream.axes[dim + 1 :])
        rest = product(f for axis in axes for f in axis.factors if f not in (*batch.factors, *tokens.factors))
        return self.layout.arrange(part, axes, (batch, tokens, rest))

    def _key_metric(self, merge: Merge) -> fx.Node:
        key = self.keys[merge.site.attention.node]
        if key is None:
            raise OptionError(
                f"metric='keys' needs the keys of site {merge.site.index} ({merge.site.attention.node.name}), and "
                "something that is no scale and no mask is between their product and the softmax; use metric='tokens'"
            )
        axes = (*self._batch_and_heads(merge, key.axes[:-2]), *key.axes[-2:])
        node = self.layout.reshape(key.node, key.axes, axes)
        node = self.layout.call(aten.mean.dim, node, [1])
        return self._laid_along_stream(merge, Laid(node, (axes[0], axes[2], axes[3])))

    def _laid_along_stream(self, merge: Merge, laid: Laid) -> fx.Node:
        """What a site says of its clip tokens, `[batch, tokens, ...]`, by atom along the stream `[B, N, ...]`."""
        stream, held = merge.site.stream, self._held_at(merge)
        assert stream is not None
        laid = self.converter.converted(laid, (each for each in merge.rows if each.run != stream.run))
        piece = tokens_at(stream.run, of_run(held, stream.run))
        if piece == stream.run:
            (piece,) = maximal_runs(merge.site.tokens)  # the same tokens, in the site's own order
        place = find(laid.axes[1], piece)
        assert place is not None
        node = self.layout.segments(laid.node, laid.axes, 1, place)
        along = tokens_at(stream.run, of_run(held, stream.run))
        source, target = (laid.axes[0], piece, *laid.axes[2:]), (stream.batch, along, *laid.axes[2:])
        laid = Laid(self.layout.arrange(node, source, target), target)
        return self.converter.converted(laid, (each for each in merge.rows if each.run == stream.run)).node
