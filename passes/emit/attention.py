"""Attention at its step: with the masses of its keys, and with what the merge of its site will ask about it.

q k v -- attention -->      becomes      q k v -- attend_and_sharpness --> output, and Evidence(sharpness, keys)
                                         q k ---- received -------------> and what each key received
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from tldr_compile.passes.axes import Axes, Axis, product
from tldr_compile.passes.emit.mass import Weigher
from tldr_compile.passes.emit.resample import Converter
from tldr_compile.passes.emit.views import Laid, Layout
from tldr_compile.passes.fx_utils import named
from tldr_compile.passes.options import Policy
from tldr_compile.passes.plan import OF_ATTENTION, Conversion, Resolution, Step, Weighing, at
from tldr_compile.passes.sites import Site

aten = torch.ops.aten


@dataclass(frozen=True)
class Evidence:
    """What an attention hands to the merge of its site, done at the resolutions `held`.

    `sharpness` and `received [batch, tokens]`, None where nobody asks; `keys [..., tokens, d]`, None where they are not
    known. The first is told by queries, the others by keys, which may have other protected tokens.
    """

    held: tuple[Resolution, ...]
    sharpness: Laid | None
    received: Laid | None
    keys: Laid | None


def asked(policy: Policy) -> bool:
    """Whether a merge asks anything that has to be noted where the attention is."""
    return not OF_ATTENTION.isdisjoint(policy.asks)


def heads_apart(layout: Layout, site: Site, held: Sequence[Resolution], laid: Laid) -> Laid:
    """`[..., N, d]`, held so, as `[batch, heads, N, d]`; a view, where heads follow the clip's batch."""
    (batch,) = at((site.clip_batch,), held)
    heads = product(f for axis in laid.axes[:-2] for f in axis.factors if f not in batch.factors)
    return layout.rearrange(laid, (batch, heads, *laid.axes[-2:]))


@dataclass(frozen=True)
class Fused:
    """A call of `scaled_dot_product_attention`: how its operands are held now, and what its keys weigh."""

    weigher: Weigher
    node: fx.Node
    operands: Sequence[Laid]
    weighings: Sequence[Weighing]

    @property
    def _layout(self) -> Layout:
        return self.weigher.converter.layout

    @property
    def _options(self) -> dict[str, Any]:
        given = named(self.node)
        return {
            "scale": given.get("scale"),
            "mask": self.operands[3].node if len(self.operands) > 3 else None,
            "enable_gqa": given.get("enable_gqa", False),
        }

    def plain(self) -> fx.Node:
        """The attention alone, along the axes of the call."""
        return self._attend(self._log_mass())

    def of_site(self, site: Site, step: Step, reads: Sequence[Axes], result: Axes) -> tuple[fx.Node, Evidence]:
        """The attention of a site that merges, along `result`, and what it tells."""
        asks, log_mass, sharpness = self.weigher.policy.asks, self._log_mass(), None
        if "sharpness" not in asks:
            attended = self._attend(log_mass)
        elif named(self.node).get("dropout_p", 0.0):  # which fused attention alone draws
            attended = self._attend(log_mass)
            sharpness = self._told(self.weigher.converter.operators.sharpness, site, step, reads)
        else:
            attended, sharpness = self._both(site, step, reads, result, log_mass)
        received = None
        if "received" in asks:
            received = self._told(self.weigher.converter.operators.received, site, step, reads)
        evidence = Evidence(
            step.held,
            _by_query(site, step.held, sharpness),
            _by_key(site, step.held, received, self.operands[1].axes[-2]),
            self.operands[1],
        )
        return attended, evidence

    def _log_mass(self) -> fx.Node | None:
        weights = self.weigher.weights(self.weighings, self.operands).values()
        return next((self._layout.call(aten.log.default, weight) for weight in weights), None)

    def _attend(self, log_mass: fx.Node | None) -> fx.Node:
        given = named(self.node)
        return self._layout.call(
            self.weigher.converter.operators.attend,
            *(each.node for each in self.operands[:3]),
            log_mass=log_mass,
            dropout_p=given.get("dropout_p", 0.0),
            is_causal=given.get("is_causal", False),
            **self._options,
        )

    def _both(
        self, site: Site, step: Step, reads: Sequence[Axes], result: Axes, log_mass: fx.Node | None
    ) -> tuple[fx.Node, fx.Node]:
        """Output and sharpness in one pass."""
        operands, (query, key, value), options = self._heads_apart(site, step, reads)
        pair = self._layout.call(
            self.weigher.converter.operators.attend_and_sharpness,
            query.node,
            key.node,
            value.node,
            **options,
            log_mass=self._scores_apart(query, key, operands, log_mass),
        )
        attended, sharpness = (self._layout.call(getitem, pair, k) for k in range(2))
        laid = Laid(attended, (*query.axes[:-1], value.axes[-1]))
        return self._layout.rearrange(laid, result).node, sharpness

    def _told(self, operator: Callable[..., Any], site: Site, step: Step, reads: Sequence[Axes]) -> fx.Node:
        """What an operator tells of queries and keys, beside the attention."""
        _, (query, key, _), options = self._heads_apart(site, step, reads)
        return self._layout.call(operator, query.node, key.node, **options)

    def _heads_apart(
        self, site: Site, step: Step, reads: Sequence[Axes]
    ) -> tuple[Sequence[Laid], Sequence[Laid], dict[str, Any]]:
        """Query, key and value as they are read, the same with heads apart, and options with a mask that fits those."""
        pairs = zip(self.operands[:3], reads[:3], strict=True)
        operands = [self.weigher.converter.broadcast(each, at(axes, step.held)) for each, axes in pairs]
        apart, options = [heads_apart(self._layout, site, step.held, each) for each in operands], self._options
        options["mask"] = self._scores_apart(apart[0], apart[1], operands, options["mask"])
        return operands, apart, options

    def _scores_apart(self, query: Laid, key: Laid, operands: Sequence[Laid], addend: fx.Node | None) -> fx.Node | None:
        """An addend of the scores with heads apart, as `query` and `key` have them; broadcast first, if it has to be.

        It is along the axes of `operands`, in which batch and heads may share dimensions, or split them.
        """
        if addend is None or operands[0].axes[:-2] == query.axes[:-2]:
            return addend
        axes = (*operands[0].axes[:-1], operands[1].axes[-2])
        wide = self._layout.call(aten.expand.default, addend, self._layout.lengths(axes))
        return self._layout.rearrange(Laid(wide, axes), (*query.axes[:-1], key.axes[-2])).node


def spelled_out(
    converter: Converter,
    policy: Policy,
    site: Site,
    held: tuple[Resolution, ...],
    probabilities: Laid,
    keys: Laid | None,
    to_scores: Sequence[Conversion],
) -> Evidence:
    """What is read off the probabilities where they are at hand; `to_scores` brings the keys to their resolution."""
    operators, apart = converter.operators, heads_apart(converter.layout, site, held, probabilities)
    sharpness, received = (
        converter.layout.call(operator, apart.node) if name in policy.asks else None
        for name, operator in (("sharpness", operators.sharpness_of), ("received", operators.received_of))
    )
    return Evidence(
        held,
        _by_query(site, held, sharpness),
        _by_key(site, held, received, probabilities.axes[-1]),
        converter.converted(keys, to_scores) if keys else None,
    )


def _by_query(site: Site, held: Sequence[Resolution], node: fx.Node | None) -> Laid | None:
    return Laid(node, at((site.clip_batch, site.tokens), held)) if node is not None else None


def _by_key(site: Site, held: Sequence[Resolution], node: fx.Node | None, keys: Axis) -> Laid | None:
    return Laid(node, (*at((site.clip_batch,), held), keys)) if node is not None else None
