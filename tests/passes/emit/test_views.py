"""What the layout emits, run: every entry lands where the axes say."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from tests.tracing import captured
from tldr_compile.passes.axes.algebra import UNIT, Atom, Axes, Axis, Factor, axis, concat, product
from tldr_compile.passes.emit.views import Laid, Layout

aten = torch.ops.aten

B, T, H, W, C = (Atom(size, label) for size, label in zip((2, 3, 4, 5, 7), "bthwc", strict=True))
TOKENS = concat([UNIT, axis(H, W)])  # 1 + h·w, as one factor of a product


def emitted(emit: Callable[[Layout, fx.Node], fx.Node], x: Tensor) -> Tensor:
    graph = fx.Graph()
    node = graph.placeholder("x")
    graph.output(emit(Layout(graph), node))
    return fx.GraphModule({}, graph)(x)


def shape(axes: Axes) -> list[int]:
    return [int(each.size) for each in axes]


def entries(axes: Axes, known: Sequence[Factor]) -> Tensor:
    """A tensor along `axes` whose every entry says which values the known factors have there.

    An axis without any of them has size 1, as nothing tells its entries apart.
    """
    axes = tuple(each if any(f in known for f in each.factors) else UNIT for each in axes)
    apart = [factor for each in axes for factor in each.factors]
    grids = torch.meshgrid([torch.arange(int(factor.size)) for factor in apart], indexing="ij")
    number = torch.zeros([int(factor.size) for factor in apart], dtype=torch.int64)
    for factor in known:
        number = number * 100 + grids[apart.index(factor)]
    return number.reshape(shape(axes))


def divided(factors: list[Factor], cuts: Sequence[int]) -> Axes:
    borders = [0, *sorted(cuts), len(factors)]
    return tuple(product(factors[a:b]) for a, b in itertools.pairwise(borders))


@st.composite
def arrangements(draw: st.DrawFn) -> tuple[Axes, Axes]:
    everything: list[Factor] = draw(st.permutations([B, T, C, TOKENS]))
    known = draw(st.permutations(everything[: draw(st.integers(1, 4))]))
    cuts = st.lists(st.integers(0, 4), max_size=3)
    return divided(known, [min(cut, len(known)) for cut in draw(cuts)]), divided(everything, draw(cuts))


@given(arrangements())
def test_arranging_lays_every_entry_by_its_factors(case: tuple[Axes, Axes]) -> None:
    source, target = case
    known = [factor for each in source for factor in each.factors]
    x = entries(source, known)
    assert torch.equal(emitted(lambda layout, node: layout.arrange(node, source, target), x), entries(target, known))


def test_a_site_of_every_frame_is_laid_along_its_stream() -> None:
    """`[b·t, h·w]` along `(b, h·w·t, c)`, as TimeSformer has it."""
    source, target = (axis(B, T), axis(H, W)), (axis(B), axis(H, W, T), axis(C))
    x = torch.randn(shape(source))
    expected = x.reshape(2, 3, 20).permute(0, 2, 1).reshape(2, 60, 1)
    assert torch.equal(emitted(lambda layout, node: layout.arrange(node, source, target), x), expected)


def test_where_the_target_has_more_factors_entries_are_repeated() -> None:
    """`[b, n]` along `(b·heads, 1, n)`: the weights of keys whose heads are folded into the batch."""
    heads = Atom(3)
    source, target = (axis(B), axis(H)), (axis(B, heads), UNIT, axis(H))
    x = torch.randn(2, 4)
    expected = x.repeat_interleave(3, 0)[:, None]
    assert torch.equal(emitted(lambda layout, node: layout.arrange(node, source, target), x), expected)


def test_equal_sizes_need_no_operator() -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    layout = Layout(graph)
    assert layout.arrange(node, (axis(B), axis(T)), (axis(B), axis(T))) is node
    assert layout.reshape(node, (axis(H, W),), (axis(Atom(20)),)) is node
    assert layout.narrow(node, 0, 0, 20, 20) is node


@pytest.mark.parametrize(
    ("whole", "before", "after"),
    [
        (axis(H, W), 0, 0),
        (concat([UNIT, axis(H, W)]), 1, 0),
        (concat([UNIT, axis(T), axis(H, W), UNIT]), 4, 1),
    ],
    ids=repr,
)
def test_what_stands_around_a_run_stays(whole: Axis, before: int, after: int) -> None:
    axes, groups = (axis(B), whole, axis(C)), axis(Atom(20, "n"))
    x = torch.randn(shape(axes))
    out, found = applied(axes, axis(H, W), groups, x)
    last = x.shape[1] - after
    assert torch.equal(out, torch.cat([x[:, :before], -x[:, before:last], x[:, last:]], 1))
    assert found[1].size == whole.size
    assert groups.atoms <= found[1].atoms
    assert not {H, W} & found[1].atoms


@pytest.mark.parametrize("run", [axis(H, W), TOKENS], ids=repr)
def test_a_run_is_found_inside_a_product(run: Axis) -> None:
    """`b·(1 + h·w)·c` on one dimension, the run itself or a part of the sum in it."""
    axes, groups = (product([B, TOKENS, C]),), axis(Atom(int(run.size), "n"))
    x = torch.randn(shape(axes))
    out, found = applied(axes, run, groups, x)
    expected = x.reshape(2, 21, 7).clone()
    expected[:, 21 - int(run.size) :] *= -1
    assert torch.equal(out, expected.reshape(-1))
    assert found == (product([B, groups if run is TOKENS else concat([UNIT, groups]), C]),)


def applied(axes: Axes, old: Axis, new: Axis, x: Tensor) -> tuple[Tensor, Axes]:
    """Negate the part `old` of the axis that holds it."""
    found: list[Axes] = []

    def negate(part: fx.Node, axes: Axes, dim: int) -> fx.Node:
        assert axes[dim] == old
        return part.graph.call_function(aten.neg.default, (part,))

    def emit(layout: Layout, node: fx.Node) -> fx.Node:
        (dim,) = (dim for dim, each in enumerate(axes) if old.atoms <= each.atoms)
        result, laid = layout.along(node, axes, dim, old, new, negate)
        found.append(laid)
        return result

    return emitted(emit, x), found[0]


def test_a_run_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="4·5 does not stand in 2·7"):
        applied_to_nothing()


def applied_to_nothing() -> None:
    graph = fx.Graph()
    axes = (axis(B, C),)
    Layout(graph).along(graph.placeholder("x"), axes, 0, axis(H, W), axis(Atom(20)), lambda part, axes, dim: part)


def test_symbolic_sizes_are_read_off_the_inputs() -> None:
    """`[b, t, c] -> [b·t, c]`, then every second token, for any size."""
    traced = captured(lambda x: x.neg(), torch.randn(2, 6, 7), mode="symbolic").graph
    (old,) = traced.graph.find_nodes(op="placeholder")
    batch, tokens, width = (axis(Atom(each.node.expr)) for each in old.meta["val"].shape)
    graph = fx.Graph()
    layout = Layout(graph)
    x = graph.node_copy(old)
    layout.learn(x)
    flat = layout.reshape(x, (batch, tokens, width), (product([batch, tokens]), width))
    half = product([batch, tokens]).size
    graph.output((layout.narrow(flat, 0, 2, half, half), layout.length(half)))
    module = fx.GraphModule({}, graph)
    for size in ((2, 6, 7), (3, 4, 5)):
        value = torch.randn(size)
        rest, count = module(value)
        assert torch.equal(rest, value.flatten(0, 1)[2:])
        assert count == prod(size[:2])


@given(arrangements(), st.data())
def test_factors_are_rearranged_over_dimensions(pair: tuple[Axes, Axes], data: st.DataObject) -> None:
    _, source = pair
    target = divided(data.draw(st.permutations([f for each in source for f in each.factors])), [1, 3])
    known = [B, T, C, TOKENS]
    new = emitted(lambda layout, x: layout.rearrange(Laid(x, source), target).node, entries(source, known))
    assert torch.equal(new, entries(target, known))


def test_factors_are_rearranged_within_sums_of_products() -> None:
    """`b·(2 + h·w)` to `b·(2 + w·h)`: the first two stay, and the rest is transposed."""
    two, sums = axis(Atom(2)), (axis(H, W), axis(W, H))
    source, target = ((product([B, concat([two, each])]), axis(C)) for each in sums)
    x = torch.randn(2, 22, 7)
    new = emitted(lambda layout, node: layout.rearrange(Laid(node, source), target).node, x.reshape(44, 7))
    turned = x[:, 2:].unflatten(1, (4, 5)).transpose(1, 2).flatten(1, 2)
    assert torch.equal(new, torch.cat([x[:, :2], turned], 1).reshape(44, 7))


def test_of_pairs_each_stays_on_its_dimension() -> None:
    source, target = (axis(H, T, W),) * 2, (axis(H, W, T),) * 2
    x = torch.randn(60, 60)
    new = emitted(lambda layout, node: layout.rearrange(Laid(node, source), target).node, x)
    order = torch.arange(60).reshape(4, 3, 5).transpose(1, 2).flatten()
    assert torch.equal(new, x[order][:, order])
