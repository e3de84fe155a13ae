"""What depends on all frames, by the types, is what moves with each of them, by the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.tracing import canonical, named, number
from tests.zoo import case
from tldr_compile import TokenMerging, passes
from tldr_compile.passes.axes import Role, infer
from tldr_compile.passes.capture import clip_inputs, fuse
from tldr_compile.passes.refusal import Refusal
from tldr_compile.passes.sites import Site
from tldr_compile.passes.sites.dependence import Mixing

B, T, N, C = 2, 3, 5, 8
CLIP = number(B, T, N, 7)
EMBED, SCALES, CLASS = number(C, 7), 1 + 0.2 * number(C), number(1, 1, C)
WEIGHTS = [0.3 * number(C, C, seed=seed) for seed in range(3)]
TIMES, BIAS, PLACES, KERNEL = number(2 * C, 4), number(T, T), 3 * number(T, 1, C), number(4, N * C, 3)
LATER = torch.ones(T, T, dtype=torch.bool).tril()
FRAME = torch.eye(T, dtype=torch.bool)

Model = Callable[..., Any]


def tokens(clip: Tensor) -> Tensor:
    """`[b, t, n, c]`; the first product of a graph is the stream that the tests ask about."""
    return F.linear(clip, EMBED)


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, [C], SCALES, SCALES)


def projected(x: Tensor) -> list[Tensor]:
    return [F.linear(norm(x), weight) for weight in WEIGHTS]


def attend(x: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(*projected(x), mask, **options)


def over_space(x: Tensor) -> Tensor:
    return x + attend(x)


def over_time(x: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    return x + attend(x.transpose(1, 2), mask, **options).transpose(1, 2)


def spelled(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention over time and its probabilities, which keep it from being one operator."""
    q, k, v = projected(x.transpose(1, 2))
    scores = q @ k.transpose(-2, -1)
    weights = (scores if mask is None else scores + mask).softmax(-1)
    return x + (weights @ v).transpose(1, 2), weights


def with_class(x: Tensor) -> Tensor:
    return torch.cat([CLASS.expand(len(x), -1, -1), x.flatten(1, 2)], 1)


def told(model: Model, *inputs: Tensor, mark: str = "linear") -> Refusal | None:
    """Whether the first result of `mark` is kept apart along time."""
    captured = canonical(model, CLIP, *inputs)
    fused, attentions, _ = fuse(captured)
    typed = infer(fused, clip_inputs(fused), [each.queries for each in attentions])
    clip = next(iter(typed.captured.graph.graph.find_nodes(op="placeholder")))
    (time,) = typed.value(clip).axes[1].atoms
    return Mixing(typed, attentions).kept_apart(named(typed.captured.graph.graph, mark)[0], time)


def stays(model: Callable[..., Any], inputs: tuple[Tensor, ...], dim: int) -> list[Tensor]:
    """For each output, which of its entries do not move with some slice of the first input along `dim`."""
    clip, *rest = inputs
    with torch.no_grad():
        outputs = tensors(model(*inputs))
        still = [torch.zeros_like(each, dtype=torch.bool) for each in outputs]
        for index in range(clip.shape[dim]):
            moved = [torch.zeros_like(each) for each in still]
            for seed in range(3):  # that one change leaves a number as it was may be luck
                other = clip.clone()
                other.select(dim, index).copy_(number(*clip.select(dim, index).shape, seed=seed))
                after = tensors(model(other, *rest))
                moved = [each | (one != two) for each, one, two in zip(moved, outputs, after, strict=True)]
            still = [each | ~now for each, now in zip(still, moved, strict=True)]
    return still


def tensors(tree: Any) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(tree) if isinstance(each, Tensor)]


def all_move(model: Model, *inputs: Tensor) -> bool:
    return not any(bool(each.any()) for each in stays(model, (CLIP, *inputs), 1))


def factorised(clip: Tensor) -> Tensor:
    return over_time(over_space(tokens(clip)))


def divided(clip: Tensor) -> Tensor:
    return over_space(over_time(tokens(clip)))


def timed(clip: Tensor, time: Tensor) -> Tensor:
    """A step of diffusion, told to every frame, as Latte tells it."""
    x = tokens(clip).flatten(0, 1)
    shift, scale = F.linear(time, TIMES).chunk(2, -1)
    x = x * (1 + scale.repeat_interleave(T, 0)[:, None]) + shift.repeat_interleave(T, 0)[:, None]
    return over_time(over_space(x.unflatten(0, (B, T))))


def joint(clip: Tensor) -> Tensor:
    x = with_class(tokens(clip))
    return x + attend(x)


def turned(clip: Tensor) -> Tensor:
    """Rotary positions along the tokens: a table with zeros."""
    q, k, v = projected(with_class(tokens(clip)))
    angles = torch.arange(1.0 + T * N)[:, None] * torch.ones(C // 2)
    cos, sin = (torch.cat([each, each], -1) for each in (angles.cos(), angles.sin()))
    q, k = (x * cos + torch.cat([-x[..., C // 2 :], x[..., : C // 2]], -1) * sin for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v)


def spelled_out(clip: Tensor) -> tuple[Tensor, Tensor]:
    return spelled(tokens(clip))


def global_class(clip: Tensor) -> Tensor:
    """A class token that attends to all frames; the patches stay in theirs."""
    x = with_class(tokens(clip))
    q, k, v = projected(x)
    asked = x[:, :1] + F.scaled_dot_product_attention(q[:, :1], k, v)
    return torch.cat([asked, over_space(x[:, 1:].unflatten(1, (T, N))).flatten(1, 2)], 1)


def class_of_global(clip: Tensor) -> Tensor:
    return norm(global_class(clip))[:, 0]


def keys_of_class(clip: Tensor) -> Tensor:
    """Patches of a frame attend to a class token that is mixed."""
    x = over_space(tokens(clip))
    mixed = x.mean((1, 2), keepdim=True).expand(-1, T, -1, -1)
    return over_space(torch.cat([mixed, x], 2))


def nested(clip: Tensor) -> Tensor:
    """`b·t·(1 + n)`, flat; the class token is a mean over frames."""
    x = tokens(clip)
    mixed = x.mean((1, 2), keepdim=True).expand(-1, T, -1, -1)
    flat = torch.cat([mixed, x], 2).reshape(B * T * (1 + N), C)
    return (norm(flat) + 1).reshape(B, T, 1 + N, C)


MIXED: list[tuple[Model, tuple[Tensor, ...]]] = [
    (factorised, ()),
    (divided, ()),
    (timed, (number(B, 4),)),
    (joint, ()),
    (turned, ()),
    (spelled_out, ()),
    (class_of_global, ()),
    (keys_of_class, ()),
    (lambda clip: nested(clip)[:, :, 0], ()),
    (lambda clip: over_space(tokens(clip)).mean(1), ()),
    (lambda clip: over_space(tokens(clip)).sum((1, 2)), ()),
    (lambda clip: tokens(clip).flatten(2).transpose(1, 2) @ tokens(clip).flatten(2), ()),
    (lambda clip: (tokens(clip) * tokens(clip).mean(-1, True).softmax(1)).sum(1), ()),
    (lambda clip: tokens(clip) + over_time(tokens(clip)).mean(1, keepdim=True), ()),
    (lambda clip: over_time(over_time(tokens(clip)), LATER), ()),  # mixed before it is causal
    (lambda clip: over_time(tokens(clip), BIAS), ()),  # a bias
    (lambda clip: over_time(tokens(clip) + PLACES), ()),  # positions
    (lambda clip: (F.linear(clip, EMBED).sum((1, 2)), SCALES + 0), ()),  # what no frame reaches is left alone
]


@pytest.mark.parametrize(("model", "inputs"), MIXED)
def test_what_is_mixed_moves_with_every_frame(model: Model, inputs: tuple[Tensor, ...]) -> None:
    assert told(model, *inputs) is None
    outputs = stays(model, (CLIP, *inputs), 1)
    assert not bool(outputs[0].any())


APART: list[tuple[Model, tuple[Tensor, ...], str]] = [
    (lambda clip: over_space(tokens(clip)), (), "t leave one by one"),
    (lambda clip: over_space(tokens(clip).flatten(0, 1)).mean(1), (), "t leave one by one"),
    (lambda clip: (lambda x: (over_time(x), over_space(x)))(tokens(clip)), (), "t leave one by one"),
    (lambda clip: over_time(tokens(clip), is_causal=True), (), "it is causal"),
    (lambda clip: over_time(tokens(clip), LATER), (), "hides some of its tokens"),
    (lambda clip: over_time(tokens(clip), torch.where(LATER, 0.0, -math.inf)), (), "hides some of its tokens"),
    (lambda clip: over_time(tokens(clip), torch.where(LATER, 0.0, -1e9)), (), "hides some of its tokens"),
    (lambda clip, mask: over_time(tokens(clip), mask), (LATER,), "differs by token and by sample"),
    (lambda clip: spelled(tokens(clip), torch.where(LATER, 0.0, -math.inf))[0], (), "hides some of its tokens"),
    (lambda clip: spelled(tokens(clip), torch.where(FRAME, 0.0, -math.inf)), (), ""),
    (lambda clip, mask: spelled(tokens(clip), mask), (torch.where(FRAME, 0.0, -math.inf),), ""),
    (global_class, (), "t leave one by one"),
    (lambda clip: global_class(clip)[:, 1:], (), "t leave one by one"),
    (nested, (), "t leave one by one"),
    (lambda clip: nested(clip)[:, :, 1:].mean(2), (), "t leave one by one"),
    (lambda clip: tokens(clip).cumsum(1), (), "not known to be all"),
    (lambda clip: tokens(clip).transpose(1, 3) @ FRAME.float(), (), "not known to be all"),
    (lambda clip: (tokens(clip) * FRAME.float()[0][:, None, None]).sum(1), (), "not known to be all"),
    (lambda clip, mask: (tokens(clip) * mask[:, :, None, None]).sum(1), (number(B, T).relu(),), "not known to be all"),
    (lambda clip: tokens(clip).masked_fill(FRAME[0][:, None, None], 0.0).sum(1), (), "not known to be all"),
    (lambda clip: (tokens(clip).flatten(2) @ tokens(clip).flatten(2).mT).tril(-1) @ tokens(clip).flatten(2), (), ""),
    (lambda clip: F.conv1d(tokens(clip).flatten(2).mT, KERNEL, padding=1), (), "not known to be all"),
    (lambda clip: tokens(clip)[:, 0], (), "not known to be all"),
    (lambda clip: tokens(clip).flip(1), (), "not known to be all"),
    (lambda clip: tokens(clip).amax(1), (), "not known to be all"),
    (lambda clip: (tokens(clip)[:, :, None] + PLACES).sum(2), (), "t leave one by one"),
    (lambda clip: torch.zeros_like(tokens(clip).mean(1)), (), "not known to be all"),
    (lambda clip: tokens(clip).mean(1, True).repeat(1, T, 1, 1) * tokens(clip).tril(), (), ""),
    (lambda clip: torch.where(FRAME[0][:, None, None], tokens(clip), tokens(clip).mean(1, True)), (), ""),
    (lambda clip: torch.stack([tokens(clip).mean(1), tokens(clip)[:, 0]], 1), (), "not known to be all"),
]


@pytest.mark.parametrize(("model", "inputs", "reason"), APART)
def test_what_does_not_move_with_some_frame_is_kept_apart(
    model: Model, inputs: tuple[Tensor, ...], reason: str
) -> None:
    apart = told(model, *inputs)
    assert apart is not None
    assert reason in apart.reason
    assert not all_move(model, *inputs)


def test_what_the_stream_does_not_reach_does_not_matter() -> None:
    assert told(lambda clip: (over_time(tokens(clip)), over_space(tokens(clip)))) is None


def test_an_attention_that_nobody_told_of_mixes_nothing() -> None:
    fused, _, _ = fuse(canonical(factorised, CLIP))
    typed = infer(fused, clip_inputs(fused))
    stream = named(fused.graph.graph, "linear")[0]
    (time,) = typed.value(stream).axes[1].atoms
    assert Mixing(typed, []).kept_apart(stream, time) is not None


class Frames(nn.Module):
    """An image model on every frame of a clip `[b, t, 3, h, w]`; its frames leave one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.image = case("clip").build()

    def forward(self, clip: Tensor) -> Tensor:
        return self.image(clip.flatten(0, 1)).image_embeds.unflatten(0, clip.shape[:2])


@pytest.mark.parametrize(("name", "mixed"), [("timesformer", True), ("clip", False)])
def test_models_mix_their_frames_or_do_not(name: str, mixed: bool) -> None:
    model = case(name, "eager").build() if mixed else Frames().eval()
    clip = number(2, 3, 3, 24, 24)
    with torch.no_grad():
        captured = passes.from_export(torch.export.export(model, (clip,)))
    analysis = passes.analyse(captured, TokenMerging())
    mixing = Mixing(analysis.typed, analysis.attentions)
    spatial = [each for each in analysis.sites if isinstance(each, Site)]
    assert spatial
    for site in spatial:
        atoms = {atom.role: atom for atom in site.stream.finest.apart.atoms}
        assert set(atoms) == {Role.SAMPLE, Role.TIME}
        assert (mixing.kept_apart(site.stream.node, atoms[Role.TIME]) is None) is mixed
        assert mixing.kept_apart(site.stream.node, atoms[Role.SAMPLE]) is not None
    assert any(bool(each.any()) for each in stays(model, (clip,), 1)) is not mixed
