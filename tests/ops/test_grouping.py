"""The laws of a grouping, for every reduction; and merging against a dense matrix of weights."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tldr_compile import ops
from tldr_compile.ops.grouping import Grouping
from tldr_compile.records.measure import peak_bytes

REDUCTIONS = sorted(ops.REDUCTIONS)
GIVING = [name for name in REDUCTIONS if ops.REDUCTIONS[name].gives]


def drawn(batch: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A metric, saliencies (some 0), masses and sizes."""
    generator = torch.Generator().manual_seed(seed)
    saliency = torch.rand(batch, tokens, generator=generator).sub(0.3).clamp_min(0)
    size = torch.randint(1, 4, (batch, tokens), generator=generator).float()
    return torch.randn(batch, tokens, 6, generator=generator), saliency, size * 0.75, size


@st.composite
def groupings(draw: st.DrawFn) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Grouping, str]:
    tokens = draw(st.integers(2, 30))
    inputs = drawn(draw(st.integers(1, 3)), tokens, draw(st.integers(0, 1000)))
    reduction = draw(st.sampled_from(REDUCTIONS))
    r, seed = draw(st.integers(0, tokens // 2)), draw(st.integers(0, 9))
    return inputs, ops.group(*inputs, r, reduction=reduction, seed=seed), reduction


def laid(found: Grouping, rank: int = 3) -> list[Tensor]:
    return [part.reshape(*part.shape, *(1,) * (rank - 2)) for part in found[:5]]


@settings(max_examples=150)
@given(groupings())
def test_every_token_is_in_one_group(drawn_case: tuple[Any, Grouping, str]) -> None:
    (metric, _, mass, size), found, reduction = drawn_case
    batch, tokens, _ = metric.shape
    groups = found.kept.shape[1]
    everyone = torch.arange(tokens).expand(batch, -1)
    assert torch.equal(torch.cat((found.kept, found.source), 1).sort(-1).values, everyone)
    assert torch.equal(found.assign.gather(1, found.kept), torch.arange(groups).expand(batch, -1))
    assert torch.equal(found.assign.gather(1, found.source), found.target)
    assert torch.equal(found.source, found.source.sort(-1).values)
    counted = torch.zeros(batch, groups).scatter_add(1, found.assign, size)
    torch.testing.assert_close(found.size, counted, rtol=0, atol=0)
    if reduction != "merge":
        assert torch.equal(found.kept, found.kept.sort(-1).values)
    if not ops.REDUCTIONS[reduction].gives:
        assert not found.source_weight.any()
        assert (found.kept_weight == 1).all()
        assert torch.equal(found.mass, mass.gather(1, found.kept))


@settings(max_examples=150)
@given(groupings())
def test_weights_of_a_group_sum_to_one_so_down_undoes_up(drawn_case: tuple[Any, Grouping, str]) -> None:
    _, found, _ = drawn_case
    total = found.kept_weight.scatter_add(1, found.target, found.source_weight)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-6, atol=0)
    coarse = torch.randn(found.kept.shape[0], found.kept.shape[1], 3)
    fine = ops.up(coarse, found.assign.unsqueeze(-1), dim=1)
    torch.testing.assert_close(ops.down(fine, *laid(found), dim=1), coarse, rtol=1e-6, atol=1e-6)


@settings(max_examples=60)
@given(tokens=st.integers(2, 30), seed=st.integers(0, 1000), reduction=st.sampled_from(GIVING))
def test_without_saliency_mass_is_conserved(tokens: int, seed: int, reduction: str) -> None:
    metric, _, mass, size = drawn(2, tokens, seed)
    found = ops.group(metric, None, mass, size, tokens // 2, reduction=reduction)
    torch.testing.assert_close(found.mass.sum(-1), mass.sum(-1), rtol=1e-6, atol=0)
    salient = ops.group(metric, torch.ones_like(mass), mass, size, tokens // 2, reduction=reduction)
    for one, other in zip(found, salient, strict=True):
        assert torch.equal(one, other)


@settings(max_examples=60)
@given(tokens=st.integers(2, 24), data=st.data())
def test_merge_is_the_matching_written_out_token_by_token(tokens: int, data: st.DataObject) -> None:
    r = data.draw(st.integers(0, tokens // 2))
    metric, saliency, mass, size = (t[0] for t in drawn(1, tokens, data.draw(st.integers(0, 1000))))
    cosine = torch.cosine_similarity(metric[:, None], metric[None], -1)
    best = {s: max(range(1, tokens, 2), key=lambda d: cosine[s, d].item()) for s in range(0, tokens, 2)}
    gone = sorted(best, key=lambda s: -cosine[s, best[s]].item())[:r]
    kept = [s for s in best if s not in gone] + list(range(1, tokens, 2))
    weights = torch.eye(tokens) * mass
    for s in gone:
        weights[best[s], s] = saliency[s] * mass[s]
    weights = weights[kept]

    found = ops.group(metric[None], saliency[None], mass[None], size[None], r)
    assert found.kept[0].tolist() == kept
    torch.testing.assert_close(found.mass[0], weights.sum(-1))
    expected = weights / weights.sum(-1, keepdim=True) @ metric
    torch.testing.assert_close(ops.down(metric[None], *laid(found), dim=1)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_samples_do_not_see_each_other(reduction: str) -> None:
    metric, saliency, mass, size = drawn(4, 21)
    order = torch.tensor([2, 0, 3, 1])
    together = ops.group(metric, saliency, mass, size, 8, reduction=reduction)
    shuffled = ops.group(metric[order], saliency[order], mass[order], size[order], 8, reduction=reduction)
    for one, other in zip(shuffled, together, strict=True):
        torch.testing.assert_close(one, other[order], rtol=0, atol=0)


def test_ties_are_broken_by_position() -> None:
    ones = torch.ones(1, 8)
    found = ops.group(torch.ones(1, 8, 3), None, ones, ones, 3)
    assert found.kept.tolist() == [[6, 1, 3, 5, 7]]
    assert found.source.tolist() == [[0, 2, 4]]
    assert found.target.tolist() == [[1, 1, 1]]


def test_zero_vectors_match_without_nan() -> None:
    ones = torch.ones(1, 6)
    metric = torch.zeros(1, 6, 2)
    metric[0, 2:4] = 1
    found = ops.group(metric, None, ones, ones, 1)
    assert found.source.tolist() == [[2]]
    assert found.kept[0, found.target].tolist() == [[3]]


@pytest.mark.parametrize(
    ("reduction", "lost", "joined"),
    [("drop", [1, 2, 5], [0, 3, 4]), ("slice", [4, 5, 6], [3, 3, 3])],
)
def test_a_lost_token_joins_its_nearest_neighbour(reduction: str, lost: list[int], joined: list[int]) -> None:
    saliency, ones = torch.tensor([[5.0, 0, 0, 3, 4, 0, 6]]), torch.ones(1, 7)
    found = ops.group(torch.ones(1, 7, 2), saliency, ones, ones, 3, reduction=reduction)
    assert found.source[0].tolist() == lost
    assert found.kept[0, found.target[0]].tolist() == joined


def test_a_lost_token_at_the_start_joins_the_first_kept() -> None:
    ones = torch.ones(1, 4)
    found = ops.group(torch.ones(1, 4, 2), torch.tensor([[0.0, 0, 1, 1]]), ones, ones, 2, reduction="drop")
    assert found.kept.tolist() == [[2, 3]]
    assert found.target.tolist() == [[0, 0]]


def test_random_follows_from_the_seed_alone() -> None:
    inputs = drawn(2, 64)

    def lost(seed: int) -> Tensor:
        return ops.group(*inputs, 20, reduction="random", seed=seed).source

    state = torch.random.get_rng_state()
    assert torch.equal(lost(0), lost(0))
    assert torch.equal(state, torch.random.get_rng_state())
    assert len({tuple(lost(seed)[0].tolist()) for seed in range(20)}) == 20
    often = torch.stack([torch.zeros(64).index_fill(0, lost(seed)[0], 1) for seed in range(400)]).mean(0)
    assert (often - 20 / 64).abs().max() < 0.1  # four standard deviations of a fair draw


def test_refusals_name_the_argument() -> None:
    metric, _, mass, size = drawn(1, 6)
    with pytest.raises(ValueError, match=r'reduction="drop".*saliency'):
        ops.group(metric, None, mass, size, 2, reduction="drop")
    with pytest.raises(ValueError, match="not 'keep'"):
        ops.group(metric, None, mass, size, 2, reduction="keep")


def test_weights_carry_gradients_and_indices_do_not() -> None:
    metric, saliency, mass, size = drawn(2, 12)
    inputs = [t.requires_grad_() for t in (metric, saliency, mass)]
    found = ops.group(metric, saliency, mass, size, 5)
    gradients = torch.autograd.grad(ops.down(metric, *laid(found), dim=1).square().sum() + found.mass.sum(), inputs)
    assert all(g.isfinite().all() and g.any() for g in gradients)
    lost = torch.zeros_like(saliency).scatter(1, found.source, 1.0)
    assert not gradients[1][lost == 0].any()


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_down_pick_and_up_along_any_dimension(dim: int) -> None:
    found = ops.group(*drawn(1, 10), 4)
    rank = 3
    shape = [1] * rank
    shape[dim] = -1
    fields = [part[0].view(shape) for part in found[:5]]
    x = torch.randn(10, 10, 10)
    expected = ops.down(x.movedim(dim, 1), *(part[:1].unsqueeze(-1) for part in found[:5]), dim=1).movedim(1, dim)
    torch.testing.assert_close(ops.down(x, *fields, dim=dim), expected, rtol=0, atol=0)
    assert torch.equal(ops.pick(x, fields[0], dim=dim), x.index_select(dim, found.kept[0]))
    assert torch.equal(ops.up(x, found.assign[0].view(shape), dim=dim), x.index_select(dim, found.assign[0]))


def test_a_table_without_batch_gets_the_batch_of_its_indices() -> None:
    found = ops.group(*drawn(3, 10), 4)
    table = torch.arange(10 * 2).view(1, 10, 2)
    expected = torch.stack([table[0, kept] for kept in found.kept])
    assert torch.equal(ops.pick(table, found.kept.unsqueeze(-1), dim=1), expected)


def test_half_precision_is_merged_in_float32() -> None:
    metric, saliency, mass, size = drawn(2, 16)
    found = ops.group(metric.bfloat16(), saliency, mass, size, 6)
    merged = ops.down(metric.bfloat16(), *laid(found), dim=1)
    assert merged.dtype == torch.bfloat16
    assert found.mass.dtype == torch.float32
    exact = ops.down(metric.bfloat16().float(), *laid(found), dim=1)
    torch.testing.assert_close(merged, exact.bfloat16(), rtol=0, atol=0)


def test_autocast_does_not_reach_the_matching() -> None:
    inputs = drawn(2, 64)
    expected = ops.group(*inputs, 20)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.group(*inputs, 20)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles_whole_with_a_dynamic_batch_and_length(reduction: str) -> None:
    def merge(metric: Tensor, saliency: Tensor, mass: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        found = ops.group(metric, saliency, mass, size, metric.shape[1] // 3, reduction=reduction)
        return ops.down(metric, *laid(found), dim=1), ops.up(found.mass, found.assign, dim=1)

    # What the others are made of AOTAutograd has seen in these, and in what the laws compile of them.
    backend = "aot_eager" if reduction in ("merge", "drop", "random", "slice") else "eager"
    compiled = torch.compile(merge, backend=backend, fullgraph=True, dynamic=True)
    for batch, tokens in ((2, 20), (3, 31)):
        inputs = drawn(batch, tokens)
        for one, other in zip(compiled(*inputs), merge(*inputs), strict=True):
            torch.testing.assert_close(one, other)


def test_saliency_is_one_where_all_are_equal_and_zero_on_the_background() -> None:
    sharp = torch.tensor([[-1.3, -1.3, -1.3, -1.3, -1.3], [-3.0, -1.0, -2.0, -2.5, -1.5]], requires_grad=True)
    found = ops.saliency(sharp)
    torch.testing.assert_close(found, torch.tensor([[1.0] * 5, [0, 1, 0, 0, 0.5]]))
    (gradient,) = torch.autograd.grad(found.square().sum(), sharp)
    assert gradient.isfinite().all()
    assert gradient[1].any()


@settings(max_examples=100)
@given(st.lists(st.floats(-9, 0, width=32), min_size=1, max_size=30))
def test_saliency_is_a_share_of_the_sharpest(values: list[float]) -> None:
    found = ops.saliency(torch.tensor([values]))
    assert found.min() >= 0
    assert found.max() == 1


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_memory_grows_with_tokens_and_not_with_pairs_of_them(reduction: str) -> None:
    def peak(tokens: int) -> int:
        return peak_bytes(partial(ops.group, *drawn(1, tokens), tokens // 4, reduction=reduction), torch.device("cpu"))

    with torch.no_grad():
        assert peak(8192) <= 2.2 * peak(4096)
