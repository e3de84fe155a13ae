"""Sites: where the merge of an attention stands, how its tokens are laid out, and why it is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tests.tracing import canonical, named, number
from tldr_compile.passes.axes.infer import infer
from tldr_compile.passes.capture.attention import fuse
from tldr_compile.passes.capture.clip import clip_inputs
from tldr_compile.passes.sites import AnySite, RefusedSite, Site, sites

B, T, N, C = 2, 3, 6, 8
CLIP = number(B, T, N, 7)
EMBED, SCALES, CLASS = number(C, 7), number(C), number(1, 1, C)

Model = Callable[..., Any]


def tokens(clip: Tensor) -> Tensor:
    """`[b, t·n, c]`"""
    return F.linear(clip, EMBED).flatten(1, 2)


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, [C], SCALES, SCALES)


def attend(x: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    q, k, v = (F.linear(x, number(C, C, seed=seed)) for seed in range(3))
    return F.linear(F.scaled_dot_product_attention(q, k, v, mask, **options), number(C, C, seed=3))


def mlp(x: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, number(C, C, seed=4))), number(C, C, seed=5))


def found(model: Model, *inputs: Tensor) -> tuple[fx.Graph, list[AnySite]]:
    fused, attentions, _ = fuse(canonical(model, CLIP, *inputs))
    return fused.graph.graph, list(sites(infer(fused, clip_inputs(fused)), attentions))


def only(model: Model, *inputs: Tensor) -> AnySite:
    _, (site,) = found(model, *inputs)
    return site


def pre_norm(x: Tensor) -> Tensor:
    x = x + attend(norm(x))
    return x + mlp(norm(x))


def post_norm(x: Tensor) -> Tensor:
    x = norm(x + attend(x))
    return norm(x + mlp(x))


def with_layer_scale(x: Tensor) -> Tensor:
    x = x + SCALES * attend(norm(x))
    return x + SCALES * mlp(norm(x))


def attention_first(x: Tensor) -> Tensor:
    h = norm(x)
    return norm((x + attend(h)) + mlp(h)) * 2


def mlp_first(x: Tensor) -> Tensor:
    h = norm(x)
    return (x + mlp(h)) + attend(h)


def branches_first(x: Tensor) -> Tensor:
    h = norm(x)
    return x + (attend(h) + mlp(h))


def on_the_left(x: Tensor) -> Tensor:
    return attend(norm(x)) + x


def branches_then_stream(x: Tensor) -> Tensor:
    h = norm(x)
    return attend(h) + mlp(h) + x


def scaled_stream(x: Tensor) -> Tensor:
    """DeepNorm."""
    return norm(2.2 * x + attend(x))


def values_beside(x: Tensor) -> Tensor:
    """A position is made of the values, and added within the attention."""
    v = F.linear(norm(x), number(C, C))
    q, k = (F.linear(norm(x), number(C, C, seed=seed)) for seed in (1, 2))
    attended = F.scaled_dot_product_attention(q, k, v) + F.linear(v, number(C, C, seed=3))
    return x + F.linear(attended, number(C, C, seed=4))


def queries_beside(x: Tensor) -> Tensor:
    q, k, v = (F.linear(norm(x), number(C, C, seed=seed)) for seed in range(3))
    return x + F.linear(F.scaled_dot_product_attention(q, k, v) + q, number(C, C, seed=4))


@pytest.mark.parametrize(
    ("block", "operator", "which"),
    [
        (pre_norm, "add", 0),
        (post_norm, "layer_norm", 0),
        (with_layer_scale, "add", 0),
        (attention_first, "layer_norm", 1),
        (mlp_first, "add", 1),
        (branches_first, "add", 1),
        (on_the_left, "add", 0),
        (branches_then_stream, "add", 1),
        (scaled_stream, "layer_norm", 0),
        (values_beside, "add", 1),
        (queries_beside, "add", 1),
    ],
)
def test_the_merge_stands_where_the_residual_step_ends(
    block: Callable[[Tensor], Tensor], operator: str, which: int
) -> None:
    graph, (site,) = found(lambda clip: block(tokens(clip)).sum())
    assert isinstance(site, Site)
    assert site.stream.node is named(graph, operator)[which]
    assert site.stream.finest.run == site.tokens
    assert site.layout == "joint space-time"


@pytest.mark.parametrize(
    "block", [pre_norm, branches_first, branches_then_stream, scaled_stream, values_beside, queries_beside]
)
def test_the_stream_is_what_the_attention_is_made_of(block: Callable[[Tensor], Tensor]) -> None:
    """What else is added on the way is a branch beside it, or a part of it."""
    graph, (site,) = found(lambda clip: block(tokens(clip)).sum())
    assert isinstance(site, Site)
    read = named(graph, "mul" if block is scaled_stream else "layer_norm")[0]
    assert site.stream.before is read.args[0]


def test_the_merge_stands_behind_a_cast() -> None:
    graph, (site,) = found(lambda clip: torch.ops.aten._to_copy.default(on_the_left(tokens(clip)), dtype=torch.float64))
    assert isinstance(site, Site)
    assert site.stream.node is named(graph, "_to_copy")[0]


def test_a_stream_that_others_read_is_merged_at_its_addition() -> None:
    """A norm after an addition belongs to the next block, unless it alone reads the sum."""

    def model(clip: Tensor) -> Tensor:
        x = tokens(clip)
        x = x + attend(x)
        return x + mlp(norm(x))

    graph, (site,) = found(model)
    assert isinstance(site, Site)
    assert site.stream.node is named(graph, "add")[0]


def test_dropout_after_the_addition_is_behind_the_merge() -> None:
    """It returns two tensors, and a merge is of one."""

    def model(clip: Tensor) -> Tensor:
        return torch.ops.aten.native_dropout.default(on_the_left(tokens(clip)), 0.5, True)[0]

    graph, (site,) = found(model)
    assert isinstance(site, Site)
    assert site.stream.node is named(graph, "add")[0]


TEXT = number(B, 4, C, seed=7)


def attend_to(x: Tensor, memory: Tensor) -> Tensor:
    q, k, v = (F.linear(each, number(C, C, seed=seed)) for seed, each in enumerate((x, memory, memory)))
    return F.linear(F.scaled_dot_product_attention(q, k, v), number(C, C, seed=3))


def attention_alone(x: Tensor) -> Tensor:
    return x + attend(norm(x))


def with_text(x: Tensor) -> Tensor:
    """Attention to another stream, which has an MLP of its own, stands before the clip's."""
    text = TEXT + attend(TEXT)
    x = x + attend(norm(x))
    x = x + attend_to(norm(x), text + mlp(text))
    return x + mlp(norm(x))


def with_class_token(x: Tensor) -> Tensor:
    """It is there for the second attention only."""
    return torch.cat([CLASS.expand(len(x), -1, -1), pre_norm(x)], 1)


def divided(x: Tensor) -> Tensor:
    """Attention over time, where nothing merges, and over space stand before the next."""
    x = pre_norm(x.unflatten(1, (T, N)).transpose(1, 2).flatten(1, 2))
    return spatial(temporal(x))


def narrowed(x: Tensor) -> Tensor:
    x = F.linear(pre_norm(x), number(C // 2, C))
    return torch.cat([x, x * 2], -1)


@pytest.mark.parametrize(
    ("block", "stretch"),
    [
        (pre_norm, ("add", 0, "add", 1)),
        (post_norm, ("layer_norm", 0, "layer_norm", 1)),
        (with_layer_scale, ("add", 0, "add", 1)),
        (lambda x: attention_alone(pre_norm(x)), ("add", 0, "add", 1)),
        (with_text, ("add", 3, "add", 4)),
        (with_class_token, ("add", 0, "cat", 0)),
        (divided, ("add", 0, "add", 1)),
        (attention_first, None),
        (mlp_first, None),
        (branches_first, None),
        (attention_alone, None),
        (narrowed, None),
    ],
)
def test_the_stretch_above_is_between_two_attentions_and_holds_an_mlp(
    block: Callable[[Tensor], Tensor], stretch: tuple[str, int, str, int] | None
) -> None:
    graph, sites = found(lambda clip: attention_alone(block(tokens(clip))).sum())
    able = [each for each in sites if isinstance(each, Site)]
    assert able[0].stream.stretch is None
    ends = None if stretch is None else (named(graph, stretch[0])[stretch[1]], named(graph, stretch[2])[stretch[3]])
    assert able[-1].stream.stretch == ends


def refused(model: Model, *inputs: Tensor) -> str:
    site = only(model, *inputs)
    assert isinstance(site, RefusedSite)
    return site.reason


def test_without_a_residual_addition_there_is_no_place_to_merge() -> None:
    assert (
        refused(lambda clip: mlp(attend(tokens(clip))))
        == "no residual addition follows it on every path, so there is no stream to merge"
    )


def test_an_addition_on_one_path_only_is_no_place_to_merge() -> None:
    def model(clip: Tensor) -> tuple[Tensor, Tensor]:
        x = tokens(clip)
        attended = attend(x)
        return x + attended, attended.sum(1)

    assert refused(model) == "no residual addition follows it on every path, so there is no stream to merge"


def test_a_sum_with_a_table_is_no_residual_addition() -> None:
    reason = refused(lambda clip: attend(tokens(clip)) + number(T * N, C))
    assert reason == "no residual addition follows it on every path, so there is no stream to merge"


def test_causal_attention_is_refused() -> None:
    def model(clip: Tensor) -> Tensor:
        x = tokens(clip)
        return x + attend(x, is_causal=True)

    assert refused(model) == "it is causal: the order of its tokens carries meaning"


def temporal(x: Tensor) -> Tensor:
    return x + attend(x.reshape(B * N, T, C)).reshape(B, N * T, C)


def spatial(x: Tensor) -> Tensor:
    frames = x.reshape(B, N, T, C).transpose(1, 2).reshape(B * T, N, C)
    return x + attend(frames).reshape(B, T, N, C).transpose(1, 2).reshape(B, N * T, C)


def test_divided_attention_merges_at_its_spatial_sites() -> None:
    """The stream is `[b, n·t, c]`, as TimeSformer has it."""
    _, (time, space) = found(lambda clip: spatial(temporal(F.linear(clip, EMBED).transpose(1, 2).reshape(B, N * T, C))))
    assert (time.index, space.index) == (0, 1)
    assert (time.layout, space.layout) == ("temporal", "divided, spatial")
    assert isinstance(time, RefusedSite)
    assert time.reason == "it is temporal: it attends along t only, at one place of the picture"
    assert isinstance(space, Site)
    assert [repr(each) for each in (space.tokens, space.batch, space.stream.finest.run)] == ["H", "b·t", "H"]


def test_attention_per_frame_merges_in_every_frame() -> None:
    site = only(lambda clip: pre_norm(F.linear(clip, EMBED).reshape(B * T, N, C)))
    assert isinstance(site, Site)
    assert site.layout == "spatial"
    assert [repr(each) for each in (site.tokens, site.stream.finest.apart, site.stream.finest.run)] == ["H", "b·t", "H"]


def test_protected_tokens_are_no_part_of_the_run() -> None:
    def model(clip: Tensor) -> Tensor:
        x = torch.cat([CLASS.expand(B, -1, -1), tokens(clip), CLASS.expand(B, 2, -1)], 1)
        return pre_norm(x)

    site = only(model)
    assert isinstance(site, Site)
    assert (repr(site.tokens), repr(site.stream.finest.run)) == ("1 + t·H + 2", "t·H")


def test_two_blocks_of_clip_tokens_are_refused() -> None:
    def model(clip: Tensor) -> Tensor:
        x = tokens(clip)
        return pre_norm(torch.cat([x, CLASS.expand(B, -1, -1), x], 1))

    assert refused(model) == "its tokens t·H + 1 + t·H hold the clip in 2 places, and a merge shortens one"


def test_heads_may_come_before_the_batch() -> None:
    def model(clip: Tensor) -> Tensor:
        x = tokens(clip)
        heads = x.reshape(B, T * N, 4, 2).permute(2, 0, 1, 3).reshape(4 * B, T * N, 2)
        attended = F.scaled_dot_product_attention(heads, heads, heads)
        return x + attended.reshape(4, B, T * N, 2).permute(1, 2, 0, 3).reshape(B, T * N, C)

    site = only(model)
    assert isinstance(site, Site)
    assert (repr(site.heads), repr(site.clip_batch), str(site.stream.finest)) == ("4", "b", "run t·H; apart b")


def test_a_mask_that_differs_by_token_and_sample_is_refused() -> None:
    def model(clip: Tensor, kept: Tensor) -> Tensor:
        x = tokens(clip)
        return x + attend(x, kept[:, None, :])

    reason = refused(model, number(B, T * N) > -1)
    assert re.fullmatch(
        r"its mask \(\w+\) differs by token and by sample: a masked token must not merge with another", reason
    )


def test_a_mask_from_the_clip_is_refused() -> None:
    def model(clip: Tensor) -> Tensor:
        x = tokens(clip)
        return x + attend(x, (clip.sum(-1) > 0).flatten(1)[:, None, :])

    assert "differs by token and by sample" in refused(model)


def test_masks_that_tell_no_tokens_apart_or_no_samples_are_fine() -> None:
    def model(clip: Tensor) -> Tensor:
        x = tokens(clip)
        x = x + attend(x, number(T * N, T * N))
        return x + attend(x, (clip.mean((1, 2, 3)) > -9)[:, None, None])

    _, both = found(model)
    assert [type(site) for site in both] == [Site, Site]


def test_only_attention_of_the_clip_to_itself_is_a_site() -> None:
    def model(clip: Tensor) -> Tensor:
        x = tokens(clip)
        queries = CLASS.expand(B, 5, -1)
        pooled = queries + F.scaled_dot_product_attention(queries, x, x)
        return pooled + attend(pooled)

    assert found(model)[1] == []


def test_sites_are_numbered_whether_or_not_they_merge() -> None:
    def model(clip: Tensor) -> Tensor:
        x = tokens(clip)
        x = x + attend(x, is_causal=True)
        x = pre_norm(x)
        return pre_norm(x)

    _, three = found(model)
    assert [site.index for site in three] == [0, 1, 2]
    assert [type(site) for site in three] == [RefusedSite, Site, Site]
