"""What the dense model keeps apart, samples, frames or packed rows, the merged model keeps apart: law 8."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import tldr_compile
from tests.laws import frames as zoo
from tests.laws.frames import Masked, Packed, causal, folded, joint, pairs, spatial, temporal
from tests.laws.independence import Apart, raised
from tests.laws.support import assert_same, everywhere
from tldr_compile.errors import NothingToMerge

Model = tuple[Callable[[], nn.Module], Callable[[int], Tensor]]
"""How to make a model, and its input for so many samples."""

HIDING = {"bool": False, "-inf": -torch.inf, "-1e4": -1e4, "-100": -100.0}
STREAMS = {"frames": False, "clip": True}
FOLDED: dict[str, tuple[Any, ...]] = {
    "joint": (joint,),
    "temporal": (temporal,),
    "pairs": (pairs,),
    "space, time": (spatial, temporal),
    "space, causal time": (spatial, causal),
    "space, time, joint": (spatial, temporal, joint),
}

MODELS: dict[str, Model] = {
    **{
        f"folded: {name}; residual by {stream}": (
            lambda along=along, long=long: folded(*along, long=long, tail=zoo.early if along[1:] else zoo.of_clips),
            zoo.frames,
        )
        for name, along in FOLDED.items()
        for stream, long in STREAMS.items()
    },
    "folded: frames leave": (lambda: folded(spatial, tail=zoo.of_frames), zoo.frames),
    "folded: causal tokens leave": (lambda: folded(spatial, causal, tail=zoo.of_tokens), zoo.frames),
    "folded: pairs leave": (lambda: folded(pairs, tail=zoo.of_tokens), zoo.frames),
    "packed: means": (lambda: Packed("means").eval(), zoo.packed),
    "packed: tokens": (lambda: Packed("tokens").eval(), zoo.packed),
    **{
        f"masked: {name}, {spelling}": (
            lambda hidden=hidden, fused=spelling == "fused": Masked(hidden, fused).eval(),
            zoo.video,
        )
        for (name, hidden), spelling in product(HIDING.items(), ("fused", "written out"))
        if (name, spelling) not in (("bool", "written out"), ("-1e4", "written out"))
    },
}

MIXING: dict[str, Model] = {
    "batch norm in training": (lambda: folded(joint, tail=zoo.normed).train(), zoo.frames),
    "contrastive logits": (lambda: folded(joint, tail=zoo.contrasted), zoo.frames),
    "a loss": (lambda: folded(spatial, joint, tail=zoo.with_loss), zoo.frames),
}

MERGE = [name for name in MODELS if "folded: temporal" not in name and "masked" not in name]
"""Those that must merge. Attention over time alone, and what hides other tokens from each, may be left as it is."""

ALONE = [name for name in MODELS if "clip" not in name and "leave" not in name and "masked" not in name]


@cache
def dense(name: str) -> nn.Module:
    torch.manual_seed(0)
    return {**MODELS, **MIXING}[name][0]()


def inputs(name: str, batch: int = zoo.BATCH) -> Tensor:
    return {**MODELS, **MIXING}[name][1](batch)


@cache
def merged(name: str, batch: int = zoo.BATCH) -> Callable[..., Any]:
    """Merged at every site; the dense model where there is nothing to merge."""
    model, x = dense(name), (inputs(name, batch),)
    try:
        return tldr_compile.apply(model, x, schedule=everywhere(0.3, model, x))
    except NothingToMerge:
        return dense(name)


@pytest.mark.parametrize("name", MERGE)
def test_there_is_something_to_merge(name: str) -> None:
    assert isinstance(merged(name), tldr_compile.MergedModule)


@pytest.mark.parametrize("name", [*MODELS, *MIXING])
def test_no_dependence_is_raised(name: str) -> None:
    apart = Apart.of(dense(name), (inputs(name),), dims=(0, 1, 2))
    assert apart.compared, "the model mixes everything: it shows nothing"
    assert apart.raised(merged(name)) == []


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("options", [{"saliency": "uniform"}, {"saliency": "shift"}, {"reduction": "drop"}], ids=str)
def test_nor_with_other_options(stream: str, options: dict[str, Any]) -> None:
    model, x = folded(joint, long=STREAMS[stream]), zoo.frames()
    assert raised(model, tldr_compile.apply(model, (x,), schedule=[0.3], **options), (x,), dims=(0,)) == []


def test_nor_between_the_frames_of_one_sample() -> None:
    """A batch of one: no sample can be compared, but its frames can."""
    model, x = folded(spatial, causal, tail=zoo.of_tokens), zoo.frames(1)
    apart = Apart.of(model, (x,), dims=(0,))
    assert apart.compared == ["input 0, second half of dimension 0: 18 of 36 slices of output 0"]
    assert apart.raised(tldr_compile.apply(model, (x,), schedule=[0.3])) == []


def test_one_sample_has_nothing_to_compare() -> None:
    model, x = folded(joint), zoo.frames(1)
    assert Apart.of(model, (x,)).compared == []


# --- to rounding: samples in another order, and by themselves ---


def by_sample(tree: Any, choose: Callable[[Tensor], Tensor], batch: int) -> Any:
    """The tensors of a tree with some of the samples that their first dimension holds, in some order."""
    return pytree.tree_map(lambda x: choose(x.unflatten(0, (batch, -1))).flatten(0, 1), tree)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_samples_permuted_give_outputs_permuted(name: str) -> None:
    x = inputs(name)
    permuted = merged(name)(by_sample(x, lambda samples: samples.flip(0), zoo.BATCH))
    assert_same(permuted, by_sample(merged(name)(x), lambda samples: samples.flip(0), zoo.BATCH))


@pytest.mark.parametrize("name", [*ALONE, "masked: -inf, fused"])
@torch.no_grad()
def test_a_sample_alone_is_what_it_is_among_others(name: str) -> None:
    x = inputs(name)
    alone = merged(name, 1)(by_sample(x, lambda samples: samples[:1], zoo.BATCH))
    assert_same(alone, by_sample(merged(name)(x), lambda samples: samples[:1], zoo.BATCH))


# --- the helper can fail ---


def squares(x: Tensor) -> Tensor:
    return x.square()


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (lambda x: squares(x), []),
        (lambda x: squares(x) + x.mean(0) * 1e-6, ["input 0, second half of dimension 0: output 0 at [0, 0] moved"]),
        (lambda x: squares(x) + x.mean(1, keepdim=True), ["input 0, second half of dimension 1: output 0 at [0, 0]"]),
        (lambda x: squares(x)[:, :2], []),
        (lambda x: squares(x)[:, :2] + x.sum(0)[:2], ["input 0, second half of dimension 0: output 0 at [0] moved"]),
    ],
)
def test_what_depends_on_others_is_found(broken: Callable[[Tensor], Tensor], found: list[str]) -> None:
    told = raised(squares, broken, (zoo.drawn(4, 3, 5),), dims=(0, 1))
    assert len(told) == len(found)
    assert all(text.startswith(start) for text, start in zip(told, found, strict=True))


def test_what_the_dense_model_mixes_is_free() -> None:
    assert Apart.of(lambda x: x - x.mean(), (zoo.drawn(4, 3),)).compared == []
    assert raised(lambda x: x - x.mean(), lambda x: x + x.sum(), (zoo.drawn(4, 3),)) == []


def test_inputs_are_named_and_not_touched() -> None:
    x, y = zoo.drawn(4, 3), zoo.drawn(4, 3, seed=2)
    apart = Apart.of(lambda x, *, y: x.add_(1) * y, (x,), {"y": y}, dims=(0,))
    assert torch.equal(x, zoo.drawn(4, 3))
    assert len(apart.compared) == 2
    assert [text.split(":")[0] for text in apart.raised(lambda x, *, y: x * y.mean(0))] == [
        "input 1, second half of dimension 0"
    ]
