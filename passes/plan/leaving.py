"""Outputs that leave with one entry for each group: all at one length, in the order of their places.

x [b, n2, C] ---------------------> [b, n2, C]
y [b, n1, C] -- down -------------> [b, n2, C]     of an earlier layer: at the length of the last
z [b, n2, C] -- index(argsort(k)) > [b, n2, C]     tokens put back in order: by the numbers of those that are left
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import getitem

import torch
from torch import fx

from tldr_compile.passes.axes import Axes, Axis, Typed, TypedGraph
from tldr_compile.passes.fx_utils import named
from tldr_compile.passes.plan.barriers import Asked, obstacle
from tldr_compile.passes.plan.plan import Conversion, How, Leaving
from tldr_compile.passes.plan.resolution import Resolution, at, of_run
from tldr_compile.passes.plan.states import State, bring, how_down

aten = torch.ops.aten

_ARGSORTS = frozenset({aten.argsort.default, aten.argsort.stable})
_SORTS = frozenset({aten.sort.default, aten.sort.stable})


def leaving(
    typed: TypedGraph, results: Sequence[fx.Node], writes: int, state: Callable[[fx.Node], State]
) -> tuple[Leaving, ...]:
    """The results, after the first `writes`, that leave short."""
    told = {number: _in_order(typed, node, state) for number, node in enumerate(results) if number >= writes}
    held = [each for value, _ in told.values() for each in state(value).held]
    coarsest: dict[Axis, Resolution] = {}
    for each in held:
        if each.run not in coarsest or coarsest[each.run] in each.chain:
            coarsest[each.run] = each
    found = (_leaving(typed, number, *pair, coarsest, state) for number, pair in told.items())
    return tuple(each for each in found if each.held)


def _leaving(
    typed: TypedGraph,
    number: int,
    value: fx.Node,
    key: fx.Node | None,
    coarsest: Mapping[Axis, Resolution],
    state: Callable[[fx.Node], State],
) -> Leaving:
    axes, mine = typed.value(value).axes, state(value)
    wanted = tuple(_wanted(axes, mine, coarsest.values()))
    conversions = tuple(bring(axes, mine.held, wanted, how_down(typed.value(value)), number))
    if key is None:
        return Leaving(number, value, wanted, conversions)
    keys = tuple(bring(axes[:1], (), wanted, How.PICK))
    return Leaving(number, value, wanted, conversions, key, keys)


def _wanted(axes: Axes, state: State, coarsest: Iterable[Resolution]) -> Iterable[Resolution]:
    for target in coarsest:
        source = of_run(state.held, target.run)
        probability = state.dims(target.run) or target.run in state.scaled
        if source is not None:
            yield target if source in target.chain and not probability else source
        elif _is_stream(axes, target) and not probability and not any(each.meets(target) for each in state.held):
            known = Typed(outputs=(axes,), reads=(axes,), own=(axes,))
            if obstacle(Asked(known, target.run, target, None)) is None:
                yield target


def _is_stream(axes: Axes, target: Resolution) -> bool:
    """Whether a value has an entry for each token: of pairs of them, nothing says whether they are probabilities."""
    return sum(target.groups in axis.atoms for axis in at(axes, [target])) == 1


def _in_order(
    typed: TypedGraph, node: fx.Node, state: Callable[[fx.Node], State]
) -> tuple[fx.Node, fx.Node | None]:
    """What a result is before its entries are put in the order of a key, `x[argsort(key)]`, and that key.

    Only where all that its groups stand for lies along the key: then as many keys are left as entries.
    """
    given = named(node) if node.op == "call_function" else {}
    indices = given.get("indices", given.get("index"))
    order = None
    if node.target is aten.index.Tensor and isinstance(indices, Sequence) and not any(indices[1:]):
        order = indices[0]
    elif node.target is aten.index_select.default and given["dim"] == 0:
        order = indices
    key = _sorted(order) if isinstance(order, fx.Node) else None
    value: fx.Node = given["self"] if key is not None else node
    if key is None or state(key).held:
        return node, None
    first, *_ = typed.value(value).axes
    if [axis.size for axis in typed.value(key).axes] != [first.size]:
        return node, None
    if not all(each.run.atoms <= first.atoms for each in state(value).held):
        return node, None
    return value, key


def _sorted(order: fx.Node) -> fx.Node | None:
    """What an order puts in ascending order."""
    if order.target is getitem and order.args[1] == 1:
        order = order.args[0]  # type: ignore[assignment]
        given = named(order) if order.target in _SORTS else None
    else:
        given = named(order) if order.target in _ARGSORTS else None
    if given is None or given.get("descending", False):
        return None
    key: fx.Node = given["self"]
    return key


def restoring(states: Sequence[State], short: Iterable[int]) -> tuple[Conversion, ...]:
    """All other results get their full length back."""
    return tuple(
        Conversion(number, held.run, held, None, How.RESTORE)
        for number, state in enumerate(states)
        for held in state.held
        if number not in short
    )
