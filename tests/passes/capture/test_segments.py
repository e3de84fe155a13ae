"""A loop over segments of one length is one attention over a batch of them; any other loop stays what it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from tests.passes.capture.packed import FRAMES, PER_FRAME, Tower, attend, by_hand, rows
from tests.tracing import canonical, number
from tldr_compile import apply, explain
from tldr_compile.passes import from_export
from tldr_compile.passes.capture.attention import SDPA, fuse
from tldr_compile.passes.capture.segments import stack_segments
from tldr_compile.passes.sources import line_of

S, L, HEADS, D = 3, 4, 2, 6
TABLE = number(L, D)
MASK = number(L, L).double()
WEIGHT = number(D, D).double()
PROJECTION = number(3 * HEADS * D, HEADS * D).double()

Cut = Callable[[Tensor], Sequence[Tensor]]
Branch = Callable[[Tensor, Tensor, Tensor], Tensor]


def heads(batch: int) -> tuple[Tensor, ...]:
    """Queries, keys and values `[B, H, T, d]`."""
    return tuple(number(batch, HEADS, S * L, D, seed=seed).double() for seed in range(3))


def loop(cut: Cut, branch: Branch = attend, join: Callable[[list[Tensor]], Tensor] = lambda x: torch.cat(x, 1)) -> Any:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return join([branch(*each) for each in zip(cut(q), cut(k), cut(v), strict=True)])

    return function


def split(x: Tensor) -> Sequence[Tensor]:
    return x.split(L, 2)


def turned(x: Tensor) -> Tensor:
    """Positions turned into a tensor, as rotary ones are: halves change places."""
    return x * TABLE.cos() + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1) * TABLE.sin()


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Fewer heads of keys, repeated."""
    k, v = (each[:, :1, None].expand(-1, -1, HEADS, -1, -1).reshape(q.shape) for each in (k, v))
    return attend(q, k, v)


def module(x: Tensor) -> Tensor:
    """All that a block does with the tokens `[B, L, C]` of a frame, its split into queries, keys and values too."""
    heads = F.linear(F.layer_norm(x, (HEADS * D,)), PROJECTION).unflatten(-1, (3, HEADS, D)).transpose(1, 3)
    q, k, v = heads.unbind(2)
    return x + F.gelu(attend(q, k, v).flatten(2))


LOOPS: dict[str, Any] = {
    "split": loop(split),
    "split with lengths": loop(lambda x: x.split([L] * S, -2)),
    "chunk": loop(lambda x: x.chunk(S, 2)),
    "tensor_split": loop(lambda x: x.tensor_split(S, 2)),
    "slices": loop(lambda x: [x[:, :, k * L : (k + 1) * L] for k in range(S)]),
    "narrow": loop(lambda x: [x.narrow(2, k * L, L) for k in range(S)]),
    "entries": loop(lambda x: [x.unflatten(2, (S, L))[:, :, k] for k in range(S)]),
    "unbind and stack": loop(lambda x: x.unflatten(2, (S, L)).unbind(2), join=lambda x: torch.stack(x, 1)),
    "stacked first": loop(split, join=torch.stack),
    "stacked last": loop(split, join=lambda x: torch.stack(x, -1)),
    "joined last": loop(split, join=lambda x: torch.cat(x, -1)),
    "by hand": loop(split, by_hand),
    "a mask for all": loop(split, lambda q, k, v: ((q @ k.mT) + MASK).softmax(-1) @ v, lambda x: torch.cat(x, 2)),
    "a mask of many dimensions": loop(
        split, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, MASK.expand(1, HEADS, L, L)), torch.stack
    ),
    "a scale": loop(split, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), torch.stack),
    "causal": loop(split, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), torch.stack),
    "positions": loop(split, lambda q, k, v: attend(turned(q), turned(k), v)),
    "weights": loop(split, lambda q, k, v: attend(F.linear(q, WEIGHT), k, v / 2 + 1)),
    "grouped heads": loop(split, grouped),
    "dimensions that move": loop(
        split, lambda q, k, v: attend(q, k, v).permute(3, 0, 2, 1).unsqueeze(-2).squeeze(-2).reshape(D, -1, HEADS, L)
    ),
    "a whole module": lambda q, k, v: torch.cat([module(x) for x in q.transpose(1, 2).flatten(2).split(L, 1)], 1),
    "no batch": lambda q, k, v: torch.stack(
        [F.scaled_dot_product_attention(*each) for each in zip(*(x[0].split(L, 1) for x in (q, k, v)), strict=True)], 1
    ),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("function", LOOPS.values(), ids=list(LOOPS))
def test_segments_of_one_length_are_a_batch(function: Any, batch: int) -> None:
    inputs = heads(batch)
    fused, (attention,), misses = fuse(canonical(function, *inputs))
    assert not misses
    assert attention.node.target is SDPA
    count = S if function is LOOPS["no batch"] else S * batch
    assert attention.node.meta["val"].shape == (count, HEADS, L, D)
    torch.testing.assert_close(fused.graph(*inputs)[0], function(*inputs), rtol=1e-12, atol=1e-12)


def test_the_call_says_where_the_model_has_it() -> None:
    _, attentions, _ = fuse(from_export(torch.export.export(Tower("loop"), (rows(),))))
    assert [Path(str(line_of(each.node)).split('"')[1]).name for each in attentions] == ["packed.py"] * 2


@pytest.mark.parametrize(("batch", "calls"), [(1, 1), (2, S)])
def test_masks_that_are_pieces_too(batch: int, calls: int) -> None:
    """Of one sample each: for more samples they would have to be repeated."""

    mask = number(S, 1, 1, L).double()

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = zip(split(q), split(k), split(v), mask.split(1), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*each) for each in pieces], 2)

    inputs = heads(batch)
    fused, attentions, _ = fuse(canonical(masked, *inputs))
    assert len(attentions) == calls
    torch.testing.assert_close(fused.graph(*inputs)[0], masked(*inputs), rtol=1e-12, atol=1e-12)


def scales(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pieces = enumerate(zip(split(q), split(k), split(v), strict=True))
    return torch.cat([F.scaled_dot_product_attention(*each, scale=1.0 + (n == 1)) for n, each in pieces], 2)


def factors(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pieces = enumerate(zip(split(q), split(k), split(v), strict=True))
    return torch.cat([attend(*each) * (2.0 + (n == 2)) for n, each in pieces], 1)


def operators(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pieces = enumerate(zip(split(q), split(k), split(v), strict=True))
    return torch.cat([-(attend(*each) * 2.0 if n else attend(*each) / 2.0) for n, each in pieces], 1)


def read_twice(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    found = [attend(*each) for each in zip(split(q), split(k), split(v), strict=True)]
    return torch.cat(found, 1), found[0]


def other_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every segment with the keys of the next."""
    (a, b, c), (d, e, f) = split(k), split(v)
    return torch.cat([attend(*each) for each in zip(split(q), (b, c, a), (e, f, d), strict=True)], 1)


APART: dict[str, Any] = {
    "pieces out of order": loop(split, join=lambda x: torch.cat([x[1], x[0], x[2]], 1)),
    "a piece that is there twice": loop(split, join=lambda x: torch.cat([*x, x[1]], 1)),
    "a piece that is left out": loop(lambda x: x.split(L, 2)[:2]),
    "pieces of the end": loop(lambda x: x[:, :, L:].split(L, 2), join=lambda x: torch.cat([*x, x[0]], 1)),
    "pieces that overlap": loop(lambda x: [x[:, :, 2 * k : 2 * k + L] for k in range(S)]),
    "pieces with a gap": loop(lambda x: [x[:, :, k * L : k * L + 3] for k in range(S)]),
    "every third": loop(lambda x: [x[:, :, k::S] for k in range(S)]),
    "different lengths": loop(lambda x: x.split([4, 5, 3], 2)),
    "a last one that is shorter": loop(lambda x: x.split(5, 2)),
    "another scale": scales,
    "another factor": factors,
    "another operator": operators,
    "keys of the next segment": other_keys,
    "common keys": lambda q, k, v: torch.cat([attend(each, k, v) for each in split(q)], 1),
    "one that is read elsewhere": read_twice,
    "an operator that is not known": loop(split, lambda q, k, v: attend(q, k, v).cumsum(1)),
    "dropout": loop(split, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5), torch.stack),
    "noise": loop(split, lambda q, k, v: attend(q, k, v) + torch.rand(L, HEADS, D), lambda x: torch.cat(x, 1)),
    "broadcast against other dimensions": loop(split, lambda q, k, v: attend(q, k, v) + v[0, 0, :, None]),
}


@pytest.mark.parametrize("function", APART.values(), ids=list(APART))
def test_other_loops_stay_as_they_are(function: Any) -> None:
    inputs = heads(1)
    found = canonical(function, *inputs)
    graph = copy.deepcopy(found.graph.graph)
    stack_segments(graph)
    fused, attentions, _ = fuse(found)
    calls = [node for node in found.graph.graph.nodes if node.target is SDPA]
    assert len(attentions) == len(calls) > 1
    assert [each.node.meta["val"].shape for each in attentions] == [each.meta["val"].shape for each in calls]
    assert str(graph) == str(found.graph.graph)  # nothing is left of the attempt
    torch.manual_seed(0)
    expected = function(*inputs)
    torch.manual_seed(0)
    outputs = fused.graph(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    torch.testing.assert_close(tuple(outputs), expected, rtol=1e-12, atol=1e-12)


def test_branches_without_attention_stay_as_they_are() -> None:
    fused, attentions, _ = fuse(canonical(lambda q: torch.cat([each * 2 for each in split(q)], 2), heads(1)[0]))
    assert not attentions
    assert fused.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)


@pytest.mark.parametrize("name", ["split", "by hand", "unbind and stack", "grouped heads", "dimensions that move"])
def test_a_batch_whose_size_is_open(name: str) -> None:
    class Loop(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return LOOPS[name](q, k, v)

    batch = {0: Dim("batch", min=2, max=64)}
    program = torch.export.export(Loop(), heads(2), dynamic_shapes=(batch, batch, batch))
    fused, attentions, _ = fuse(from_export(program))
    assert len(attentions) == 1
    inputs = heads(5)
    torch.testing.assert_close(fused.graph(*inputs)[0], LOOPS[name](*inputs), rtol=1e-12, atol=1e-12)


# --- towers ---


def merged(kind: str, **options: Any) -> Any:
    return apply(Tower(kind), (rows(),), clip="rows", schedule=[3, 2], verify=True, **options)


@pytest.mark.parametrize("kind", ["loop", "loop by hand"])
@torch.no_grad()
def test_a_tower_merges_as_if_its_frames_were_a_batch(kind: str) -> None:
    ours, clip = merged(kind), rows()
    sites = ours.report.sites
    assert [site["tokens_out"] for site in sites] == [FRAMES * (PER_FRAME - 3), FRAMES * (PER_FRAME - 5)]
    assert all("apart" in site["grouping"] for site in sites)
    torch.testing.assert_close(ours(clip), merged("batched")(clip))
    torch.testing.assert_close(apply(Tower(kind), (clip,), clip="rows", schedule=[0])(clip), Tower(kind)(clip))


@pytest.mark.parametrize("frame", range(FRAMES))
@torch.no_grad()
def test_frames_stay_apart(frame: int) -> None:
    """Other pixels of one frame change that frame alone, bit for bit."""
    ours, clip = merged("loop"), rows()
    other = clip.unflatten(0, (FRAMES, PER_FRAME)).clone()
    other[frame] = other[frame].flip(0) * 2
    before, after = (ours(each).unflatten(0, (FRAMES, PER_FRAME)) for each in (clip, other.flatten(0, 1)))
    same = [torch.equal(one, two) for one, two in zip(before, after, strict=True)]
    assert same == [each != frame for each in range(FRAMES)]


def test_frames_of_different_sizes_are_told_one_by_one() -> None:
    found = explain(Tower("loop of different lengths"), (rows(),), clip="rows", schedule=())
    assert len(found.sites) + len(found.plan.others) == 2 * FRAMES
    assert all(each.reason for each in found.plan.others)
