"""What depends on all values of a dimension in the dense graph, so that a merge may make it depend on all of them.

One grouping of tokens for all frames makes every merged frame depend on every frame. That raises a dependence, unless
the dense model mixes its frames too, as divided attention does. A forward data flow tells, segment by segment:

    clip [b, t, h·w, c]                        own: each frame depends on its own
    attention over h·w                         own
    attention over t, which hides nothing      all
    cat([class token, frames], 1)              free + all
    causal attention over t                    unknown; with the residual stream, own

What is claimed holds for parameters in general: that one happens to be 0 is not looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from operator import getitem, or_
from typing import Any

import torch
from torch import Tensor, fx

from tldr_compile.passes.axes import UNIT, Atom, Axes, Axis, Kind, Role, Typed, TypedGraph, Use, border, product
from tldr_compile.passes.axes.rules import TABLE, indexing, pointwise, products, spatial, sums, views
from tldr_compile.passes.capture import Attention
from tldr_compile.passes.fx_utils import above, named, operands, operator_name
from tldr_compile.passes.refusal import Refusal
from tldr_compile.passes.sites import mask_analysis
from tldr_compile.passes.sizes import Size

# What an entry holds of the values of an atom: nothing; nobody knows what; the value that it stands at; all of them.
FREE, UNKNOWN, OWN, ALL = range(4)


def _names(text: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in text.split())


_FULL = frozenset({Kind.MEAN, Kind.SUM, Kind.SOFTMAX, Kind.KEYS, Kind.CONTRACT})
_WEIGHED = frozenset({Kind.KEYS, Kind.CONTRACT})  # whose second factor is INVARIANT
_ATTENTION = _names("scaled_dot_product_attention")
_SUMS, _PRODUCTS_ADDED, _CHOICES = _names("add sub rsub"), _names("addmm baddbmm"), _names("where lerp masked_fill")
_COPIES = _names("expand repeat tile repeat_interleave")  # a dimension of copies is not born: it has one value
_PERMUTED, _STACKED = _names("permute transpose t"), _names("stack")
_JOINED = _STACKED | _names("cat concat concatenate")
# Operators of which a result, or a part of it, holds nothing of an operand; or whose letters would have to be read.
_NOT_FOLLOWED = _names("""
    tril triu scatter scatter_add scatter_reduce slice_scatter select_scatter copy fill empty_like full_like ones_like
    zeros_like rand_like randn_like new_zeros new_ones new_full new_empty native_dropout einsum
""")
_MEETING = frozenset(each.__name__ for each in (pointwise, sums, products, spatial))


class Mixing:
    """Says of merges in a graph whether they would tie values together that the dense graph keeps apart."""

    def __init__(self, typed: TypedGraph, attentions: Sequence[Attention]) -> None:
        self.typed, self.attentions = typed, attentions
        self._flows: dict[tuple[fx.Node, Atom], _Flow] = {}

    def kept_apart(self, stream: fx.Node, atom: Atom) -> Refusal | None:
        """What, of all that `stream` reaches, does not depend on every value of `atom`, and why; None if all does."""
        if atom.role is Role.SAMPLE:
            return Refusal(stream, f"{atom!r} are samples, and what becomes of one depends on no other")
        whole = above(stream)
        births = [node for node in self.typed.values if node in whole and self._bears(node, atom)]
        for birth in births:
            if (birth, atom) not in self._flows:
                self._flows[birth, atom] = _Flow(self.typed, self.attentions, birth, atom)
            if (apart := self._flows[birth, atom].apart(stream)) is not None:
                return apart
        return None if births else Refusal(stream, f"where {atom!r} was born is not seen")

    def _bears(self, node: fx.Node, atom: Atom) -> bool:
        """Whether an input or a call has the dimension in its result, and no operand of it has."""
        values = self.typed.values[node]
        before = self.typed.own(node) if node in self.typed.calls else ()
        new = node.op == "placeholder" or (node in self.typed.calls and operator_name(node) not in _COPIES)
        held = _holds([each.axes for each in values if each.varies], atom)
        return new and held and not _holds(before, atom)


class _Flow:
    """How the values of an atom spread from where they are born: for every tensor, a level for each of its segments."""

    def __init__(self, typed: TypedGraph, attentions: Sequence[Attention], birth: fx.Node, atom: Atom) -> None:
        self.typed, self.atom, self.birth = typed, atom, birth
        self.attended = {each.node for each in attentions}
        self.hiding = {node: why for each in attentions for node, why in self._hiding(each).items()}
        self.reached = {birth}
        self.levels: dict[fx.Node, tuple[Tensor, ...]] = {}
        for node, values in typed.values.items():
            if any(each in self.reached for each in node.all_input_nodes):
                self.reached.add(node)
            if values and values[0].varies:
                self.levels[node] = self._levels(node)

    def apart(self, stream: fx.Node) -> Refusal | None:
        """The first output that `stream` reaches and that does not hold all values."""
        if self._has(stream, FREE):
            return Refusal(stream, f"a part of it depends on nothing along {self.atom!r}")
        (output,) = stream.graph.find_nodes(op="output")
        for node in operands(output):
            whole = above(node)
            if stream in whole and (self._has(node, UNKNOWN) or self._has(node, OWN)):
                hiding = [why for each, why in self.hiding.items() if each in whole and each in self.reached]
                return hiding[0] if hiding else self._origin(node)
        return None

    def _has(self, node: fx.Node, level: int) -> bool:
        return any(bool((each == level).any()) for each in self.levels[node])

    def _origin(self, node: fx.Node) -> Refusal:
        """Where a value was lost that is not known at an output."""
        if not self._has(node, UNKNOWN):
            return Refusal(node, f"{self.atom!r} leave one by one: what leaves for one depends on no other")
        while lost := [each for each in operands(node) if each in self.reached and self._has(each, UNKNOWN)]:
            node = lost[0]
        return Refusal(node, f"what it holds of {self.atom!r} is not known to be all of it")

    def _hiding(self, attention: Attention) -> Mapping[fx.Node, Refusal]:
        """The calls of an attention that hides some of its keys from some queries, with the reason."""
        scored, call = attention.probabilities, self.typed.calls[attention.node]
        keys = self.typed.value(scored).axes[-1] if scored else call.reads[1][-2]
        if not self._tells_apart((keys,)):
            return {}
        reason = "it is causal: what comes first depends on nothing later" if attention.causal else None
        if not (reason := reason or self._mask(attention, keys)):
            return {}
        found = [attention.node]
        while scored:  # up to the softmax, from which sinks may be cut off
            found.append(scored)
            kinds = {use.kind for use in self.typed.calls[scored].uses} if scored in self.typed.calls else set()
            scored = None if Kind.SOFTMAX in kinds else next(iter(scored.all_input_nodes), None)
        return dict.fromkeys(found, Refusal(attention.node, reason))

    def _mask(self, attention: Attention, run: Axis) -> str | None:
        """Why a mask hides some of a run; one whose numbers are not at hand may."""
        numbers = self.typed.captured.values
        for mask in attention.masks:
            given = [each for each in above(mask) if each.op in ("placeholder", "get_attr")]
            if not self.typed.value(mask).varies and any(str(each.target) not in numbers for each in given):
                return f"its mask ({mask.name}) is not known here, and may hide some of its tokens from others"
        return mask_analysis.refusal(self.typed, attention, run)

    def _tells_apart(self, axes: Axes) -> bool:
        """Whether values of the atom, or segments, lie along some axes."""
        return _holds([axes], self.atom) or any(len(_leaves(axis)) > 1 for axis in axes)

    def _levels(self, node: fx.Node) -> tuple[Tensor, ...]:
        outputs = [value.axes for value in self.typed.values[node]]
        if node is self.birth:
            return tuple(torch.where(self._count(axes) > 0, OWN, UNKNOWN) for axes in outputs)
        if node.target is getitem:
            return (self.levels[node.args[0]][node.args[1]],)  # type: ignore[index]
        if node.op == "placeholder":  # another clip; or it may be a mask
            return tuple(_filled(axes, FREE if self.typed.value(node).clip else UNKNOWN) for axes in outputs)
        return tuple(self._result(node, number, axes) for number, axes in enumerate(outputs))

    def _result(self, node: fx.Node, number: int, out: Axes) -> Tensor:
        name, call = operator_name(node), self.typed.calls[node]
        unseen = name in _ATTENTION and node not in self.attended
        if not call.known or name in _NOT_FOLLOWED or node in self.hiding or unseen:
            return _filled(out, UNKNOWN)
        family = TABLE[name].__module__
        if family == views.__name__:
            return self._moved(node, call, number, out)
        if family == indexing.__name__:  # every entry is made of some entry
            parts = [_anywhere(self.levels[each][0]) for each in operands(node) if each in self.levels]
            return _filled(out, int(_joined(torch.stack(parts))))
        return self._met(node, call, out) if family in _MEETING else _filled(out, UNKNOWN)

    def _read(self, node: fx.Node, call: Typed, k: int) -> tuple[Tensor, Axes]:
        """Operand `k` as the call uses it, and the axes along which its entries are still told apart."""
        operand, axes = self.typed.operands(node)[k], call.own[k]
        levels = self.levels[operand][0] if operand in self.levels else _filled(axes, FREE)
        for use in call.uses:
            if use.operand == k and use.dims:
                if use.kind is Kind.LINEAR and operand not in self.reached:
                    levels = torch.zeros_like(levels)  # a learned sum is no mask
                levels = self._reduced(levels, axes, use, {each.kind for each in call.uses})
                if use.kind is not Kind.SOFTMAX:
                    axes = tuple(UNIT if dim in use.dims else axis for dim, axis in enumerate(axes))
        return levels, axes

    def _reduced(self, levels: Tensor, axes: Axes, use: Use, kinds: set[Kind]) -> Tensor:
        """Entries meet along dimensions, each of which is left with one segment."""
        along = self._count(tuple(axis if dim in use.dims else UNIT for dim, axis in enumerate(axes))) > 0
        own, holes = (levels == OWN) & along, levels == UNKNOWN
        if use.kind not in _FULL and not (use.kind is Kind.INVARIANT and kinds & _WEIGHED):
            return _weakest(torch.where(own, UNKNOWN, levels), use.dims)
        met = torch.where(own, ALL, levels).amax(use.dims, keepdim=True)
        if use.kind is Kind.SOFTMAX:  # what is hidden stays hidden
            return torch.where(holes, UNKNOWN, met)
        if Kind.CONTRACT in kinds:  # one factor may be 0 wherever the other is something
            return torch.where(holes.any(use.dims, keepdim=True), UNKNOWN, met)
        return met

    def _met(self, node: fx.Node, call: Typed, out: Axes) -> Tensor:
        """Operands, laid over one another by their last dimensions, make every entry."""
        name, shape, held = operator_name(node), _shape(out), self._places(out)
        tops, places = [], []
        for k, operand in enumerate(operands(node)):
            if self._may_hide(node, operand, call.own[k]):
                return _filled(out, UNKNOWN)
            if operand not in self.levels:
                continue
            levels, axes = self._read(node, call, k)
            if operand not in self.reached and _is_entrywise(name):
                levels = torch.zeros_like(levels)
            if len(axes) > len(out):
                gone = {dim for use in call.uses if use.operand == k for dim in use.dims}
                levels, axes = levels.squeeze(tuple(gone)), tuple(a for dim, a in enumerate(axes) if dim not in gone)
            if name in _ATTENTION and k > 2:  # a mask
                levels, axes = _anywhere(levels).clamp(max=UNKNOWN), ()
            elif not _fits(levels, shape):
                levels, axes = _anywhere(levels), ()
            own = torch.where(levels == OWN, self._places(axes), 0)
            if name in _CHOICES:
                levels = torch.where((levels == OWN) & (own != held), UNKNOWN, levels)
            tops.append(levels.expand(shape))
            places.append(own.expand(shape))
        joined = _joined(torch.stack(tops), name in _CHOICES, holes=name not in _SUMS | _ATTENTION)
        return torch.where((joined == OWN) & (reduce(or_, places) != held), UNKNOWN, joined)

    def _may_hide(self, node: fx.Node, operand: fx.Node, own: Axes) -> bool:
        """Whether an operand may leave nothing of some values or segments of what it meets entry by entry."""
        name = operator_name(node)
        if not _is_entrywise(name) or not self._tells_apart(own):
            return False
        if operand in self.reached:
            return operand.meta["val"].dtype == torch.bool
        if self.typed.value(operand).varies:
            return self._has(operand, UNKNOWN)
        added = name in _SUMS | _PRODUCTS_ADDED
        return not added or self._mask(Attention(node, node, None, (operand,)), product(own)) is not None

    def _moved(self, node: fx.Node, call: Typed, number: int, out: Axes) -> Tensor:
        """Entries change places, and segments with them."""
        read = [self._read(node, call, k) for k in range(len(call.own))]
        shapes = [_shape(each) for each in call.reads]
        if not all(_fits(levels, shape) for (levels, _), shape in zip(read, shapes, strict=True)):
            return _filled(out, UNKNOWN)
        levels = [levels.expand(shape) for (levels, _), shape in zip(read, shapes, strict=True)]
        counts = [self._count(axes).expand(shape) for (_, axes), shape in zip(read, shapes, strict=True)]
        moved, count = _placed(node, call, number, levels, _weakest), _placed(node, call, number, counts, torch.amin)
        if moved.numel() != _filled(out, 0).numel():
            return _filled(out, UNKNOWN)
        moved, count = moved.reshape(_shape(out)), count.reshape(_shape(out))
        return torch.where((moved == OWN) & (count != self._count(out)), UNKNOWN, moved)

    def _count(self, axes: Axes) -> Tensor:
        """How often each segment of a tensor holds the atom."""
        return _laid([[leaf.count(self.atom) for leaf in _leaves(axis)] for axis in axes])

    def _places(self, axes: Axes) -> Tensor:
        """Along which dimensions it does, as bits: the last dimension is bit 0."""
        last = len(axes) - 1
        return _laid([[(self.atom in leaf) << (last - dim) for leaf in _leaves(axis)] for dim, axis in enumerate(axes)])


def _placed(
    node: fx.Node, call: Typed, number: int, parts: list[Tensor], least: Callable[[Tensor, tuple[int, ...], bool], Any]
) -> Tensor:
    """What a call that moves entries makes of one number for each segment; `least` says it of several."""
    name, (first, *_) = operator_name(node), parts
    if name in _PERMUTED:
        return node.target(first, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    if name in _JOINED:
        laid = node.target(parts, *node.args[1:], **node.kwargs)  # type: ignore[operator]
        return least(laid, (named(node).get("dim", 0),), True) if name in _STACKED else laid
    if call.cut is None:
        return first
    dim, span, out = call.cut, call.spans[number], call.outputs[number]
    begin, end = (0, first.shape[dim]) if span is None else _between(call.own[0][dim], span)
    taken = first.narrow(dim, begin, end - begin)
    left = len(_leaves(out[dim])) if len(out) == first.ndim else 1
    return taken if taken.shape[dim] == left else least(taken, (dim,), True)


def _between(axis: Axis, span: tuple[Size, Size]) -> tuple[int, int]:
    """The leaves that a span of an axis touches."""
    (first, _), (last, inside) = (border(axis, offset) or (0, 0) for offset in span)
    return len(_leaves(Axis(axis.segments[:first]))), len(_leaves(Axis(axis.segments[: last + bool(inside)])))


def _leaves(axis: Axis) -> list[tuple[Atom, ...]]:
    """The segments of an axis, those of sums inside of its products too: `b` and `b·n` of `b·(1 + n)`."""
    parts = ([[(f,)] if isinstance(f, Atom) else _leaves(f) for f in segment] for segment in axis.segments)
    return [tuple(itertools.chain(*each)) for part in parts for each in itertools.product(*part)]


def _shape(axes: Axes) -> list[int]:
    return [len(_leaves(axis)) for axis in axes]


def _laid(vectors: Sequence[Sequence[int]]) -> Tensor:
    """The sum of one vector along each dimension."""
    total = torch.zeros([len(each) for each in vectors], dtype=torch.long)
    for dim, each in enumerate(vectors):
        total = total + torch.tensor(each, dtype=torch.long).view(-1, *[1] * (len(vectors) - dim - 1))
    return total


def _filled(axes: Axes, level: int) -> Tensor:
    return torch.full(_shape(axes), level)


def _fits(levels: Tensor, shape: Sequence[int]) -> bool:
    pairs = zip(reversed(levels.shape), reversed(shape), strict=False)
    return levels.ndim <= len(shape) and all(have in (1, want) for have, want in pairs)


def _weakest(levels: Tensor, dims: tuple[int, ...], keepdim: bool = True) -> Tensor:
    """What holds of every entry along some dimensions."""
    least, most = levels.amin(dims, keepdim), levels.amax(dims, keepdim)
    return torch.where(most == FREE, FREE, least.clamp(min=UNKNOWN))


def _anywhere(levels: Tensor) -> Tensor:
    """What holds of every entry, wherever it goes."""
    return _weakest(torch.where(levels == OWN, UNKNOWN, levels).flatten(), (0,), False)


def _joined(levels: Tensor, choice: bool = False, holes: bool = True) -> Tensor:
    """Levels `[operands, ...]` in one result: a choice of them, or all; a factor may be 0 where it is not known."""
    if choice:
        least = torch.where(levels == FREE, ALL + 1, levels).amin(0)
        return torch.where(least > ALL, FREE, least)
    top = levels.amax(0)
    return torch.where((levels == UNKNOWN).any(0), UNKNOWN, top) if holes else top


def _holds(many: Iterable[Axes], atom: Atom) -> bool:
    return any(atom in axis.atoms for axes in many for axis in axes)


def _is_entrywise(name: str) -> bool:
    return TABLE[name] is pointwise.pointwise or name in _PRODUCTS_ADDED
