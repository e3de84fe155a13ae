"""Operators that multiply and sum: linear layers, matrix products, attention."""

from __future__ import annotations

from tldr_compile.passes.axes.algebra import UNIT, Axes, Axis
from tldr_compile.passes.axes.rules.table import Call, Kind, Operand, Typed, broadcast, rule, unknown


@rule("linear")
def linear(call: Call) -> Typed:
    """`x [..., in]`, `weight [out, in]`: each entry of `out` mixes all of `in`."""
    x, weight, *bias = call.operands
    call.absorb(weight.axes[-1], x.axes[-1], channel=False)
    call.use(Kind.LINEAR, x, -1)
    call.use(Kind.MIX, weight, *range(len(weight.axes)))
    out = call.axes(weight)[:-1]
    for each in bias:
        call.same(*out, *each.axes)
    return call.typed((*call.axes(x)[:-1], *out))


@rule("addmm", "baddbmm")
def add_product(call: Call) -> Typed:
    added, one, two = call.operands
    outputs, reads = _product(call, one, two)
    outputs = broadcast(call, [outputs, added.axes])
    return call.typed(outputs, reads={**reads, added.index: outputs})


@rule("matmul", "bmm", "mm", "mv", "dot")
def matmul(call: Call) -> Typed:
    one, two = call.operands
    outputs, reads = _product(call, one, two)
    return call.typed(outputs, reads=reads)


def _product(call: Call, one: Operand, two: Operand) -> tuple[Axes, dict[int, Axes]]:
    """`one [..., n, k]`, `two [..., k, m]`, either may lack `n` or `m`."""
    rows = one.axes[-2:-1] if len(one.axes) > 1 else ()
    columns = two.axes[-1:] if len(two.axes) > 1 else ()
    inner = two.axes[-2] if len(two.axes) > 1 else two.axes[-1]
    _contract(call, one, -1, two, -2 if len(two.axes) > 1 else -1, inner)
    batch = broadcast(call, [one.axes[:-2], two.axes[:-2]])
    inner = call.solved.resolve(inner)
    reads = {
        one.index: (*batch[len(batch) - max(len(one.axes) - 2, 0) :], *rows, inner),
        two.index: (*batch[len(batch) - max(len(two.axes) - 2, 0) :], inner, *columns),
    }
    if len(one.axes) > 2 and len(two.axes) > 2:
        reads = {one.index: (*batch, *rows, inner), two.index: (*batch, inner, *columns)}
    return (*batch, *rows, *columns), reads


def _contract(call: Call, one: Operand, dim: int, two: Operand, other: int, inner: Axis) -> None:
    """Sum over a shared dimension: over tokens if both factors are activations, else a learned mixture."""
    if two.varies and one.varies:
        call.same(one.axes[dim], inner)
        kind = Kind.CONTRACT
    else:
        weight, activation = (inner, one.axes[dim]) if one.varies else (one.axes[dim], inner)
        call.absorb(weight, activation, channel=False)
        kind = Kind.LINEAR
    call.use(kind if one.varies else Kind.MIX, one, dim)
    call.use(Kind.INVARIANT if kind is Kind.CONTRACT else kind if two.varies else Kind.MIX, two, other)


@rule("einsum")
def einsum(call: Call) -> Typed:
    """Every letter is one axis; letters missing in the result are contracted."""
    equation = call.given["equation"].replace(" ", "")
    inputs, _, result = equation.partition("->")
    letters = inputs.split(",")
    if "..." in equation or not result or len(letters) > 2 or any(len(set(names)) < len(names) for names in letters):
        return unknown(call)
    axes: dict[str, Axis] = {}
    for names, operand in zip(letters, call.operands, strict=True):
        for name, each in zip(names, operand.axes, strict=True):
            axes[name] = call.same(axes.get(name, UNIT), each)
    learned = not all(operand.varies for operand in call.operands)
    for name in axes if learned else ():
        if name not in result and (lone := call.solved.resolve(axes[name]).lone) and lone.clip:
            call.channels.append(lone)
    for position, (names, operand) in enumerate(zip(letters, call.operands, strict=True)):
        gone = [dim for dim, name in enumerate(names) if name not in result]
        shared = [dim for dim in gone if inputs.count(names[dim]) > 1]
        linear = Kind.LINEAR if operand.varies else Kind.MIX
        kind = linear if learned else Kind.INVARIANT if position else Kind.CONTRACT
        call.use(kind, operand, *shared)
        call.use(Kind.CONTRACT, operand, *(dim for dim in gone if dim not in shared))
    resolved = {name: call.solved.resolve(each) for name, each in axes.items()}
    reads = {o.index: tuple(resolved[n] for n in names) for names, o in zip(letters, call.operands, strict=True)}
    return call.typed(tuple(resolved[name] for name in result), reads=reads)


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Typed:
    """`q [..., H, N, d]`, `k [..., H, M, d]`, `v [..., H, M, e]`, mask broadcastable to `[..., H, N, M]`."""
    q, k, v, *mask = call.operands
    keys = call.same(k.axes[-2], v.axes[-2])
    call.same(q.axes[-1], k.axes[-1])
    key_batch = broadcast(call, [k.axes[:-2], v.axes[:-2]])
    if call.given.get("enable_gqa", False):
        batch, heads = broadcast(call, [q.axes[:-3], key_batch[:-1]]), q.axes[-3]
        batch, key_batch = (*batch, heads), (*batch, key_batch[-1])
    else:
        batch = key_batch = broadcast(call, [q.axes[:-2], key_batch])
    queries = call.axes(q)[-2]
    scores = (*batch, queries, keys)
    for each in mask:
        scores = broadcast(call, [scores, each.axes])
    call.use(Kind.MIX, q, -1)
    call.use(Kind.MIX, k, -1)
    call.use(Kind.KEYS, k, -2)
    call.use(Kind.INVARIANT, v, -2)
    if call.given.get("is_causal", False):
        call.use(Kind.MIX, q, -2)  # which keys a query sees follows from the order of the tokens
        call.use(Kind.MIX, k, -2)
    reads = {
        q.index: (*batch, queries, q.axes[-1]),
        k.index: (*key_batch, keys, k.axes[-1]),
        v.index: (*key_batch, keys, v.axes[-1]),
        **{each.index: scores for each in mask},
    }
    return call.typed((*batch, queries, v.axes[-1]), reads=reads)
