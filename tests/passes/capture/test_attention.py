"""Finding attention: every spelling is the one operator, and what only looks like attention says why it is not."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.tracing import canonical, named, number
from tldr_compile import TokenMerging, ops, passes
from tldr_compile.passes.capture.attention import SDPA, fuse
from tldr_compile.passes.capture.canonicalize import Captured
from tldr_compile.passes.fx_utils import named as named_arguments

B, HEADS, N, D = 2, 4, 6, 5
Q, K, V = (number(B, HEADS, N, D, seed=seed) for seed in range(3))
MASK = number(N, N)
KEPT = number(B, 1, 1, N, seed=1) > -1
SCALE = D**-0.5

Spelling = Callable[[Tensor, Tensor, Tensor], Any]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-2, -1)) * SCALE).softmax(-1) @ v


def folded(x: Tensor) -> Tensor:
    """Heads in the batch, as `bmm` wants them."""
    return x.reshape(B * HEADS, N, D)


def folded_scores(q: Tensor, k: Tensor, mask: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    return torch.baddbmm(mask.expand(B * HEADS, N, N), folded(q), folded(k).mT, beta=beta, alpha=alpha)


def low(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Scores and probabilities in one dtype, the rest in another, as models in half precision have it."""
    return (q @ k.mT * SCALE).softmax(-1, dtype=torch.float64).to(dtype) @ v


SPELLINGS: dict[str, Spelling] = {
    "product, scale": plain,
    "product, quotient": lambda q, k, v: ((q @ k.mT) / D**0.5).softmax(-1) @ v,
    "scale, product": lambda q, k, v: ((q * SCALE) @ k.mT).softmax(-1) @ v,
    "scale on both sides": lambda q, k, v: ((q * D**-0.25) @ (k * D**-0.25).mT).softmax(-1) @ v,
    "no scale": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "permuted keys": lambda q, k, v: ((q @ k.permute(0, 1, 3, 2)) * SCALE).softmax(-1) @ v,
    "keys that were never transposed": lambda q, k, v: ((q @ k.mT.clone()) * SCALE).softmax(-1) @ v,
    "scale, then mask": lambda q, k, v: (q @ k.mT * SCALE + MASK).softmax(-1) @ v,
    "mask on the left": lambda q, k, v: (MASK + q @ k.mT * SCALE).softmax(-1) @ v,
    "two masks": lambda q, k, v: (q @ k.mT * SCALE + MASK + MASK.mT).softmax(-1) @ v,
    "masked with nothing": lambda q, k, v: (q @ k.mT * SCALE).masked_fill(~KEPT, -torch.inf).softmax(-1) @ v,
    "masked with almost nothing": lambda q, k, v: (q @ k.mT * SCALE).masked_fill(~KEPT, -1e9).softmax(-1) @ v,
    "mask and fill": lambda q, k, v: (q @ k.mT * SCALE + MASK).masked_fill(~KEPT, -torch.inf).softmax(-1) @ v,
    "softmax of another dtype": lambda q, k, v: low(q, k, v, torch.float32),
    "dropout at rest": lambda q, k, v: F.dropout((q @ k.mT * SCALE).softmax(-1), 0.5, training=False) @ v,
    "heads in the batch": lambda q, k, v: torch.bmm(
        (torch.bmm(folded(q), folded(k).mT) * SCALE).softmax(-1), folded(v)
    ).reshape(q.shape),
    "a sum that is ignored": lambda q, k, v: torch.bmm(
        folded_scores(q, k, MASK, beta=0, alpha=SCALE).softmax(-1), folded(v)
    ),
    "a sum that is a mask": lambda q, k, v: torch.bmm(
        folded_scores(q, k, MASK, beta=1, alpha=SCALE).softmax(-1), folded(v)
    ),
    "fused": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "fused with a mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, KEPT, scale=0.3),
}


def capture(spelling: Spelling) -> Captured:
    return canonical(spelling, Q, K, V)


def close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=list(SPELLINGS))
def test_every_spelling_becomes_the_one_operator(spelling: Spelling) -> None:
    fused, (attention,), misses = fuse(capture(spelling))
    assert not misses
    assert attention.node.target is SDPA
    assert attention.probabilities is None
    assert not named(fused.graph.graph, "softmax")
    assert not named(fused.graph.graph, "bmm") + named(fused.graph.graph, "matmul")
    close(fused.graph(Q, K, V)[0], spelling(Q, K, V))


def test_the_captured_graph_is_left_alone() -> None:
    found = capture(plain)
    before = str(found.graph.graph)
    fuse(found)
    assert str(found.graph.graph) == before


def arguments(spelling: Spelling) -> dict[str, Any]:
    _, (attention,), _ = fuse(capture(spelling))
    return named_arguments(attention.node)


def test_what_was_spelled_is_told() -> None:
    _, (attention,), _ = fuse(capture(SPELLINGS["product, quotient"]))
    assert not attention.masks
    assert not attention.causal
    assert attention.keys is not None
    assert [each.meta["val"].shape for each in (attention.queries, attention.keys)] == [Q.shape, K.shape]
    assert arguments(SPELLINGS["product, quotient"])["scale"] == pytest.approx(SCALE)
    assert arguments(SPELLINGS["no scale"])["scale"] == 1.0
    assert "scale" not in arguments(SPELLINGS["fused"])


def test_masks_and_order_are_told() -> None:
    _, (masked,), _ = fuse(capture(SPELLINGS["mask and fill"]))
    assert [mask.meta["val"].dtype for mask in masked.masks] == [torch.float32]
    _, (causal,), _ = fuse(capture(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)))
    assert causal.causal


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_kept(training: bool) -> None:
    """Functional ATen spells it by its native operator, which returns what it kept too."""
    spelled = capture(lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.25, training) @ v)
    assert len(named(spelled.graph.graph, "native_dropout")) == training
    fused, (attention,), misses = fuse(spelled)
    assert not misses
    assert named_arguments(attention.node)["dropout_p"] == (0.25 if training else 0.0)
    assert not named(fused.graph.graph, "native_dropout")


def test_attentions_are_told_in_execution_order() -> None:
    def two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = plain(q, k, v)
        second = F.scaled_dot_product_attention(first, k, v, scale=0.3)
        return plain(second, k, first)

    fused, attentions, _ = fuse(capture(two))
    assert [each.node for each in attentions] == named(fused.graph.graph, "scaled_dot_product_attention")
    assert [named_arguments(each.node)["scale"] for each in attentions] == pytest.approx([SCALE, 0.3, SCALE])
    close(fused.graph(Q, K, V)[0], two(Q, K, V))


def test_probabilities_that_something_else_reads_stay() -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = ((q @ k.transpose(-2, -1)) * SCALE + MASK).softmax(-1)
        return probabilities @ v, probabilities

    fused, (attention,), misses = fuse(capture(model))
    assert not misses
    (softmax,) = named(fused.graph.graph, "softmax")
    assert attention.probabilities is attention.queries is attention.scored is softmax
    assert attention.node is named(fused.graph.graph, "matmul")[-1]
    assert attention.keys is not None
    assert attention.keys.meta["val"].shape == K.shape
    for one, other in zip(fused.graph(Q, K, V), model(Q, K, V), strict=True):
        close(one, other)


def heads_that_talk_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).transpose(1, 3).matmul(number(HEADS, HEADS)).transpose(1, 3).softmax(-1) @ v


SPELLED_OUT: dict[str, Spelling] = {
    "heads that talk before": heads_that_talk_before,
    "capped scores": lambda q, k, v: (q @ k.mT).tanh().softmax(-1) @ v,
    "a mask that is scaled too": lambda q, k, v: ((q @ k.mT + MASK) * SCALE).softmax(-1) @ v,
    "a mask that a sum scales": lambda q, k, v: torch.bmm(folded_scores(q, k, MASK, beta=0.5).softmax(-1), folded(v)),
    "a fill that leaves something": lambda q, k, v: (q @ k.mT).masked_fill(~KEPT, -3.0).softmax(-1) @ v,
    "no product of queries and keys": lambda q, k, v: (MASK + q.sum(-1, keepdim=True)).softmax(-1) @ v,
}


@pytest.mark.parametrize("spelling", SPELLED_OUT.values(), ids=list(SPELLED_OUT))
def test_scores_that_the_operator_cannot_say_stay(spelling: Spelling) -> None:
    fused, (attention,), misses = fuse(capture(spelling))
    assert not misses
    (softmax,) = named(fused.graph.graph, "softmax")
    assert attention.probabilities is softmax
    assert attention.keys is None
    close(fused.graph(Q, K, V)[0], spelling(Q, K, V))


HEAD_WEIGHT, HEAD_BIAS = number(HEADS, HEADS), number(HEADS, seed=1)
PER_HEAD = number(HEADS, 1, 1)


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1)


def written_out(q: Tensor, k: Tensor) -> Tensor:
    scores = q @ k.mT
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    return powers / powers.sum(-1, keepdim=True)


def talking(p: Tensor) -> Tensor:
    """Heads mix between the softmax and the values."""
    return F.linear(p.movedim(1, -1), HEAD_WEIGHT, HEAD_BIAS).movedim(-1, 1)


def normalized(p: Tensor) -> Tensor:
    return F.batch_norm(p, number(HEADS), number(HEADS).abs(), number(HEADS), number(HEADS))


def as_matrices(p: Tensor) -> Tensor:
    """A product with weights on either side, of probabilities that lie about otherwise."""
    right = (p.permute(0, 2, 3, 1) @ HEAD_WEIGHT).permute(0, 3, 1, 2)
    return (HEAD_WEIGHT @ right.permute(0, 2, 1, 3)).transpose(1, 2)


MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": talking,
    "einsum": lambda p: torch.einsum("bhij,hg->bgij", p, HEAD_WEIGHT),
    "einsum, the weight first": lambda p: torch.einsum("gh, bhij -> bgij", HEAD_WEIGHT, p),
    "einsum to another order": lambda p: torch.einsum("bhij,hg->jbig", p, HEAD_WEIGHT).permute(1, 3, 2, 0),
    "products of matrices": as_matrices,
    "convolution": lambda p: F.conv2d(p, number(HEADS, HEADS, 1, 1), HEAD_BIAS),
    "convolution in groups": lambda p: F.conv2d(p, number(HEADS, 1, 1, 1), groups=HEADS),
    "more heads": lambda p: F.conv2d(F.conv2d(p, number(7, HEADS, 1, 1)), number(HEADS, 7, 1, 1)),
    "a factor and an offset for each": lambda p: 2 * p * PER_HEAD / 3 + PER_HEAD - 1,
    "batch norm": normalized,
    "layer norm over heads": lambda p: F.layer_norm(p.permute(0, 2, 3, 1), (HEADS,)).permute(0, 3, 1, 2),
    "several": lambda p: normalized(F.dropout(talking(p), 0.5, training=False) * PER_HEAD),
}


@pytest.mark.parametrize("softmax", [probabilities, written_out])
@pytest.mark.parametrize("mix", MIXED.values(), ids=list(MIXED))
def test_heads_may_talk_after_the_softmax(mix: Callable[[Tensor], Tensor], softmax: Callable[..., Tensor]) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mix(softmax(q, k)) @ v

    fused, (attention,), misses = fuse(capture(model))
    assert not misses
    (own,) = named(fused.graph.graph, "softmax")
    assert attention.probabilities is attention.queries is own
    assert attention.keys is not None
    assert attention.keys.meta["val"].shape == K.shape
    (result,) = fused.graph.graph.output_node().all_input_nodes
    assert attention.node is result
    close(fused.graph(Q, K, V)[0], model(Q, K, V))


def test_heads_may_talk_and_values_stand_on_the_left() -> None:
    fused, (attention,), _ = fuse(capture(lambda q, k, v: v.mT @ talking(probabilities(q, k)).mT))
    assert attention.node in fused.graph.graph.output_node().all_input_nodes


def test_dropout_behind_talking_heads_stays() -> None:
    fused, (attention,), misses = fuse(capture(lambda q, k, v: F.dropout(talking(probabilities(q, k)), 0.25) @ v))
    assert not misses
    assert attention.probabilities is named(fused.graph.graph, "softmax")[0]
    assert named(fused.graph.graph, "native_dropout")


@pytest.mark.parametrize("softmax", [probabilities, written_out])
@pytest.mark.parametrize("mix", MIXED.values(), ids=list(MIXED))
def test_talking_heads_merge_and_mean_what_they_should(
    mix: Callable[[Tensor], Tensor], softmax: Callable[..., Tensor]
) -> None:
    """Two blocks over the places of a clip; `mix` stands between softmax and values."""
    width, places = HEADS * D, 10

    def heads(x: Tensor, seed: int) -> Tensor:
        return F.linear(x, number(width, width, seed=seed)).reshape(B, places, HEADS, D).transpose(1, 2)

    def model(clip: Tensor) -> Tensor:
        x = F.linear(clip, number(width, 7))
        for block in range(2):
            q, k, v = (heads(x, 3 * block + each) * SCALE for each in range(3))
            x = x + (mix(softmax(q, k)) @ v).transpose(1, 2).reshape(B, places, width)
        return x.mean(1)

    clip = number(B, places, 7)
    example = FakeTensorMode(allow_non_fake_inputs=True).from_tensor(clip)
    found = passes.from_dynamo(fx.symbolic_trace(model), [example])
    config = TokenMerging(schedule=(3, 2))
    merged = passes.merge(passes.analyse(found, config), config, ops)
    assert [merge.count for merge in merged.plan.merges] == [3, 2]
    assert not [step.barriers for step in merged.plan.steps.values() if step.barriers]
    passes.verify(merged, [clip])


NEAR_MISSES: dict[str, tuple[Spelling, str]] = {
    "heads that talk with tokens": (
        lambda q, k, v: F.linear(probabilities(q, k), number(N, N)) @ v,
        r"the probabilities \(softmax\) are not multiplied with values but read by aten.linear",
    ),
    "a product with the queries": (
        lambda q, k, v: probabilities(q, k).mT @ v,
        r"the probabilities \(transpose_1\) are not multiplied with values but read by aten.matmul",
    ),
    "tokens that meet a window": (
        lambda q, k, v: F.conv2d(probabilities(q, k), number(HEADS, HEADS, 3, 3), padding=1) @ v,
        "read by aten.conv2d",
    ),
    "every other query": (
        lambda q, k, v: F.conv2d(probabilities(q, k), number(HEADS, HEADS, 1, 1), stride=(2, 1)) @ v,
        "read by aten.conv2d",
    ),
    "a number for each pair": (lambda q, k, v: (probabilities(q, k) * MASK) @ v, "read by aten.mul"),
    "a number for each key": (lambda q, k, v: (probabilities(q, k) + KEPT.float()) @ v, "read by aten.add"),
    "a quotient by probabilities": (lambda q, k, v: (1 / probabilities(q, k)) @ v, "read by aten.reciprocal"),
    "a table divided by probabilities": (lambda q, k, v: (PER_HEAD / probabilities(q, k)) @ v, "read by aten.div"),
    "weights for each query": (
        lambda q, k, v: (probabilities(q, k).permute(0, 2, 3, 1) @ number(N, HEADS, HEADS)).permute(0, 3, 1, 2) @ v,
        "read by aten.matmul",
    ),
    "einsum over the keys": (
        lambda q, k, v: torch.einsum("bhij,jk->bhik", probabilities(q, k), MASK) @ v,
        "not multiplied with values but read by",
    ),
    "einsum that keeps the keys but reads a table of them": (
        lambda q, k, v: torch.einsum("bhij,hgj->bgij", probabilities(q, k), number(HEADS, HEADS, N)) @ v,
        "not multiplied with values but read by",
    ),
    "statistics of a batch": (
        lambda q, k, v: F.batch_norm(probabilities(q, k), None, None, training=True) @ v,
        "not multiplied with values but read by",
    ),
    "a norm over the keys": (lambda q, k, v: F.layer_norm(probabilities(q, k), (N,)) @ v, "read by aten.layer_norm"),
    "pairs laid in a row": (
        lambda q, k, v: F.linear(probabilities(q, k).flatten(2), number(N * N, N * N)).unflatten(-1, (N, N)) @ v,
        "read by aten.reshape",
    ),
    "queries laid in two rows": (
        lambda q, k, v: (
            F.linear(probabilities(q, k).permute(0, 2, 3, 1).unflatten(1, (2, N // 2)), HEAD_WEIGHT).permute(
                0, 4, 1, 2, 3
            )
            @ v[:, :, None]
        ),
        "read by aten.reshape",
    ),
    "a norm for each query": (
        lambda q, k, v: (
            F.batch_norm(probabilities(q, k).transpose(1, 2), number(N), number(N).abs()).transpose(1, 2) @ v
        ),
        "read by aten._native_batch_norm_legit_no_training",
    ),
    "the mask of a dropout": (
        lambda q, k, v: torch.native_dropout(probabilities(q, k), 0.0, True)[1].float() @ v,
        r"\(native_dropout\) are not multiplied with values but read by <built-in function getitem>",
    ),
    "cut after heads have talked": (
        lambda q, k, v: talking(probabilities(q, k))[..., :4] @ v[..., :4, :],
        "are cut",
    ),
    "another dimension": (
        lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
        "it does not run over the last of at least three dimensions",
    ),
    "too few dimensions": (
        lambda q, k, v: (q[0, 0] @ k[0, 0].T).softmax(-1) @ v[0, 0],
        "it does not run over the last of at least three dimensions",
    ),
    "the probabilities alone": (
        lambda q, k, v: (q @ k.mT).softmax(-1),
        r"the probabilities \(softmax\) are not multiplied with values but read by output",
    ),
    "probabilities on the right": (
        lambda q, k, v: v.mT @ (q @ k.mT).softmax(-1),
        r"the probabilities \(softmax\) are not multiplied with values but read by aten.matmul.default",
    ),
}


@pytest.mark.parametrize(("spelling", "reason"), NEAR_MISSES.values(), ids=list(NEAR_MISSES))
def test_near_misses_say_why(spelling: Spelling, reason: str) -> None:
    fused, attentions, (miss,) = fuse(capture(spelling))
    assert not attentions
    assert miss.node.target is torch.ops.aten.softmax.int
    assert re.search(reason, miss.reason), miss
    close(fused.graph(Q, K, V)[0], spelling(Q, K, V))
