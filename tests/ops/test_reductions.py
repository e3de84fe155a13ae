"""The ways to merge beside vid-TLDR's, each against its paper's numbers and against the same written out."""

from __future__ import annotations

from math import exp, log, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import Tiny, clip
from tldr_compile import apply, ops
from tldr_compile.ops import blocked, reductions, reference
from tldr_compile.ops.reductions import Split, Tokens, ordered

FEW = torch.tensor([[[5.0, 0.0], [4.0, 3.0], [3.0, 4.0], [0.0, 2.0], [-1.0, 0.0]]])
"""Cosines: 0.8, 0.6, 0, -1 of the first; 0.96, 0.6, -0.8; 0.8, -0.6; 0."""


def chosen(name: str, metric: Tensor, r: int, seed: int = 0, margin: float | None = None) -> Split:
    return ops.REDUCTIONS[name].choose(Tokens(metric, None, r, seed, margin=margin))


def joined(split: Split) -> dict[int, int]:
    """Of one sample: who joins whom."""
    return dict(zip(split.source[0].tolist(), split.kept[0, split.target[0]].tolist(), strict=True))


def drawn(tokens: int, seed: int) -> Tensor:
    return torch.randn(1, tokens, 4, generator=torch.Generator().manual_seed(seed))


# --- energy: PiToMe ---


def test_energy_is_equation_4_by_hand() -> None:
    far, close = exp(0 - 0.7) - 1, exp(0.6 - 0.7) - 1
    opposite = [exp(cosine - 0.7) - 1 for cosine in (-1.0, -0.8, -0.6, 0.0)]
    sums = [
        0.8 + close + far + opposite[0],
        0.8 + 0.96 + close + opposite[1],
        close + 0.96 + 0.8 + opposite[2],
        far + close + 0.8 + opposite[3],
        sum(opposite),
    ]
    by_hand = torch.tensor([sums]) / 5
    torch.testing.assert_close(by_hand, torch.tensor([[-0.1231788, 0.1775935, 0.1874738, -0.0603984, -0.5650138]]))
    torch.testing.assert_close(ops.energy(FEW, 0.7), by_hand)
    torch.testing.assert_close(reference.energy(FEW, 0.7), by_hand)


def test_the_2r_of_most_energy_merge_by_turns() -> None:
    """By energy they are 2, 1, 3, 0, 4: of the first four 2 and 3 are sources, and 1 is most alike to both."""
    split = chosen("energy", FEW, 2, margin=0.7)
    assert split.kept.tolist() == [[0, 1, 4]]
    assert split.source.tolist() == [[2, 3]]
    assert split.target.tolist() == [[1, 1]]
    assert joined(chosen("energy", FEW, 1, margin=0.7)) == {2: 1}
    assert joined(chosen("energy", torch.ones(1, 6, 3), 2)) == {0: 1, 2: 1}


@pytest.mark.parametrize(("depth", "margin", "read"), [(0.0, None, 0.9), (0.5, None, 0.45), (0.5, -0.2, -0.2)])
def test_the_margin_falls_with_the_depth_or_is_chosen(
    depth: float, margin: float | None, read: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    monkeypatch.setattr(reductions, "energy", lambda metric, margin: seen.append(margin) or metric[..., 0])
    ones = torch.ones(1, 5)
    ops.group(FEW, None, ones, ones, 2, reduction="energy", depth=depth, margin=margin)
    assert seen == pytest.approx([read])


def test_depth_and_margin_reach_the_graph() -> None:
    merged = apply(Tiny(3).eval(), (clip(),), schedule=[3, 0, 2], reduction="energy", margin=0.3)
    calls = [node for node in merged.graph_module.graph.nodes if node.target is ops.group]
    assert [node.kwargs["depth"] for node in calls] == [0, 2 / 3]
    assert [node.kwargs["margin"] for node in calls] == [0.3, 0.3]


@settings(max_examples=40)
@given(tokens=st.integers(2, 24), seed=st.integers(0, 1000), margin=st.sampled_from([0.9, 0.4, -0.5]), data=st.data())
def test_energy_is_the_algorithm_written_out(tokens: int, seed: int, margin: float, data: st.DataObject) -> None:
    metric, r = drawn(tokens, seed), data.draw(st.integers(0, tokens // 2))
    energy = reference.energy(metric, margin)[0].tolist()
    cosine = torch.cosine_similarity(metric[0, :, None], metric[0, None], -1)
    merge = sorted(range(tokens), key=lambda place: -energy[place])[: 2 * r]
    wanted = {one: max(merge[1::2], key=lambda other: cosine[one, other].item()) for one in merge[::2]}
    assert joined(chosen("energy", metric, r, margin=margin)) == wanted


@settings(max_examples=40)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(2, 20),
    budget=st.integers(1, 2000),
    name=st.sampled_from(["energy", "affinity"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_centrality_equals_the_specification_for_any_block(
    batch: int, tokens: int, budget: int, name: str, dtype: torch.dtype
) -> None:
    metric = torch.randn(batch, tokens, 4, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    arguments = (metric, 0.3)[: 1 + (name == "energy")]
    expected = getattr(reference, name)(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(blocked.BLOCK_BYTES, "cpu", budget)
        patch.setattr(blocked, "DECOMPOSED_BYTES", budget)
        torch.testing.assert_close(getattr(ops, name)(*arguments), expected, rtol=1e-5, atol=1e-5)
        with ops.decomposing():
            torch.testing.assert_close(getattr(ops, name)(*arguments), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["energy", "affinity"])
def test_no_matrix_of_all_pairs_exists(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocked.BLOCK_BYTES, "cpu", 16 * 2048 * 4)
    metric = torch.randn(1, 2048, 4)
    arguments = (metric, 0.3)[: 1 + (name == "energy")]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        getattr(ops, name)(*arguments)
    assert max(event.self_cpu_memory_usage for event in watched.events()) < 2048 * 2048 * 4 / 8


@pytest.mark.parametrize("name", ["energy", "affinity"])
def test_centrality_is_registered_soundly(name: str) -> None:
    arguments = (torch.randn(2, 7, 4), 0.3)[: 1 + (name == "energy")]
    operator = getattr(torch.ops.tldr, name)
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    many = torch.randn(3, 2, 7, 4)
    found = torch.func.vmap(lambda each: operator(each, *arguments[1:]))(many)
    torch.testing.assert_close(found[1], operator(many[1], *arguments[1:]))


def test_equals_keep_their_order_and_what_is_no_number_comes_first() -> None:
    worth = torch.tensor([[1.0, 3.0, torch.nan, 3.0, 1.0, torch.inf], [0.0, 0.0, 0.0, 1.0, 1.0, -torch.inf]])
    assert ordered(worth).tolist() == [[2, 5, 1, 3, 0, 4], [3, 4, 0, 1, 2, 5]]
    equal = torch.zeros(1, 500)
    assert torch.equal(ordered(equal)[0], torch.arange(500))


# --- affinity: AdaMerge ---


def test_affinity_is_equations_1_to_3_by_hand() -> None:
    """Products are 1, 2, 0, 1; 2, 4, 0, 2; 0, 0, 0, 0; 1, 2, 0, 1 times log 2: rows of 2, 4, 1, 2 / 9 and so on."""
    metric = sqrt(log(2)) * torch.tensor([[[1.0], [2.0], [0.0], [1.0]]])
    given_away = [2 / 9 + 4 / 25 + 1 / 4 + 2 / 9, 4 / 9 + 16 / 25 + 1 / 4 + 4 / 9, 1 / 9 + 1 / 25 + 1 / 4 + 1 / 9]
    torch.testing.assert_close(ops.affinity(metric), torch.tensor([[*given_away, given_away[0]]]))
    # Both of the first half are like the last token, cosine 1; the second is scaled to 1, the first to 0.27.
    assert joined(chosen("affinity", metric, 1)) == {1: 3}
    assert joined(chosen("affinity", metric, 2)) == {0: 3, 1: 3}
    assert joined(chosen("affinity", torch.ones(1, 7, 2), 2)) == {0: 4, 1: 4}


@pytest.mark.parametrize("tokens", [10, 11])
def test_affinity_says_how_many_pairs_it_compares(tokens: int) -> None:
    pairs = ops.REDUCTIONS["affinity"].pairs
    assert pairs is not None
    with FlopCounterMode(display=False) as counter:
        chosen("affinity", drawn(tokens, 0), 3)
    assert counter.get_total_flops() == 2 * 4 * pairs(tokens, 3)


@settings(max_examples=30)
@given(tokens=st.integers(2, 24), seed=st.integers(0, 1000), data=st.data())
def test_affinity_is_the_matching_written_out(tokens: int, seed: int, data: st.DataObject) -> None:
    metric, r = drawn(tokens, seed), data.draw(st.integers(0, tokens // 2))
    cosine = torch.cosine_similarity(metric[0, :, None], metric[0, None], -1)
    salience = reference.affinity(metric)[0]
    salience = (salience - salience.min()) / (salience.max() - salience.min())
    half = (tokens + 1) // 2
    best = {one: max(range(half, tokens), key=lambda other: cosine[one, other].item()) for one in range(half)}
    gone = sorted(best, key=lambda one: -(salience[one] * cosine[one, best[one]]).item())[:r]
    assert joined(chosen("affinity", metric, r)) == {one: best[one] for one in gone}


# --- at random ---


@settings(max_examples=30)
@given(tokens=st.integers(2, 24), seed=st.integers(0, 1000), data=st.data())
def test_a_random_partition_is_merge_among_other_places(tokens: int, seed: int, data: st.DataObject) -> None:
    metric, r = drawn(tokens, seed), data.draw(st.integers(0, tokens // 2))
    order = reductions.scrambled(torch.arange(tokens), seed).argsort()
    merged = joined(chosen("merge", metric[:, order], r))
    wanted = {order[one].item(): order[other].item() for one, other in merged.items()}
    assert joined(chosen("partition", metric, r, seed)) == wanted


@pytest.mark.parametrize("name", ["partition", "random merge"])
def test_what_is_drawn_follows_from_the_seed_alone(name: str) -> None:
    metric = drawn(64, 0)
    state = torch.random.get_rng_state()
    pairs = [joined(chosen(name, metric, 20, seed)) for seed in range(20)]
    assert pairs[0] == joined(chosen(name, metric, 20, 0))
    assert torch.equal(state, torch.random.get_rng_state())
    assert len({tuple(each.items()) for each in pairs}) == 20


def test_who_is_joined_at_random_is_drawn_fairly() -> None:
    found = [chosen("random merge", drawn(64, 0), 20, seed) for seed in range(400)]
    often = torch.cat([each.target[0] for each in found]).bincount(minlength=44) / 400
    assert (often - 20 / 44).abs().max() < 0.15  # more than four standard deviations of a fair draw
    gone = torch.cat([each.source[0] for each in found]).bincount(minlength=64) / 400
    assert (gone - 20 / 64).abs().max() < 0.1
