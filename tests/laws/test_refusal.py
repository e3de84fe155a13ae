"""What cannot be done is refused before anything runs, by a text that says what, where, why, and what to do instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import tldr_compile
from tests.laws.support import assert_same, compiled, every_case, graphs_for_inductor, program, tensors
from tests.zoo import FAMILIES, Case, case
from tldr_compile import (
    CaptureError,
    NothingToMerge,
    OptionError,
    ScheduleError,
    ShapeError,
)

TOKENS, WIDTH = 18, 8


class Masked(nn.Module):
    """Two blocks of attention over 18 tokens with what a user may add to it: a mask, causality, an odd activation."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind = kind
        self.patches = nn.Conv3d(3, WIDTH, (2, 4, 4), (2, 4, 4))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.ran = 0

    def attend(self, qkv: Tensor, keep: Tensor | None) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in qkv.chunk(3, -1))
        if self.kind == "peak":
            return ((q @ k.mT).softmax(-1).amax(-1, keepdim=True) * v).squeeze(1)
        mask = None if keep is None else keep[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.kind == "causal").squeeze(1)

    def forward(self, video: Tensor, keep: Tensor | None = None) -> Tensor:
        if not torch.compiler.is_compiling():
            self.ran += 1
        x = self.patches(video).flatten(2).transpose(1, 2)
        if self.kind == "branch" and x.sum() > 0:
            x = x + 1
        for qkv in self.qkv:
            x = x + (qkv(x)[..., :WIDTH].sigmoid() if self.kind == "none" else self.attend(qkv(x), keep))
        return x.mean(1)


def video(batch: int = 2, frames: int = 4) -> Tensor:
    return torch.randn(batch, 3, frames, 12, 12, generator=torch.Generator().manual_seed(4))


def assert_refused(
    model: nn.Module, inputs: tuple[Any, ...], error: type[Exception], *words: str, **options: Any
) -> None:
    """By `apply` and by the backend, with the same words, and before the model or its graph ran."""
    with pytest.raises(error) as applied:
        tldr_compile.apply(model, inputs, **options)
    with graphs_for_inductor() as graphs, pytest.raises(BackendCompilerFailed) as wrapped:
        compiled(model, **options)(*inputs)
    assert isinstance(wrapped.value.inner_exception, error)
    for word in words:
        assert word in str(applied.value)
        assert word in str(wrapped.value)
    assert graphs == []
    assert getattr(model, "ran", 0) == 0


# --- schedules ---

SCHEDULES: dict[str, tuple[Any, ...]] = {
    "negative": ([3, -1], "schedule[1]=-1: a number of tokens to remove cannot be negative"),
    "negative fraction": ([-0.25], "schedule[0]=-0.25: a fraction of the tokens cannot be negative"),
    "one": ([1.0], "schedule[0]=1.0: a fraction of the tokens is below 1; for a number of tokens write the int 1"),
    "above one": (1.5, "schedule=1.5: a fraction of the tokens is below 1"),
    "NaN": ([float("nan")], "schedule[0]=nan: a fraction of the tokens cannot be NaN"),
    "string": ("600", "schedule='600' is a str; a schedule is a sequence with one entry per site"),
    "string inside": (["600"], "schedule[0]='600' is a str; an entry is an int"),
    "too long": ([3, 2, 1], "[3, 2, 1] has 3 entries, but the graph has 2 attention sites", "Give at most 2"),
    "rounds to nothing": ([0.01, 0.01], "the schedule [0.01, 0.01] removes no token", "rounds down to 0"),
}


@pytest.mark.parametrize("wrong", SCHEDULES)
def test_schedules(wrong: str) -> None:
    schedule, *words = SCHEDULES[wrong]
    error = NothingToMerge if wrong == "rounds to nothing" else ScheduleError
    assert_refused(Masked(), (video(),), error, *words, schedule=schedule)


@every_case
def test_a_schedule_longer_than_the_sites_of_every_model(case: Case) -> None:
    sites = len(tldr_compile.explain(program(case, 2), schedule=0.0).sites)
    with pytest.raises(ScheduleError, match=rf"has {sites + 1} entries, but the graph has {sites} attention sites"):
        tldr_compile.apply(program(case, 2), schedule=[*case.schedule, *[0] * (sites - len(case.schedule)), 1])


def test_a_temporal_site_has_no_tokens_of_its_own() -> None:
    divided = case("timesformer", "eager")
    words = ("schedule[2] = 4, but site 2", "tokens t)", "it is temporal", "Give it 0; sites that can: [1, 3, 5]")
    assert_refused(divided.build(), divided.inputs(), ScheduleError, *words, schedule=[0, 9, 4])


# --- options ---

OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "nearest": ({"shedule": [3]}, "unknown option 'shedule': the options of tldr are"),
    "said": ({"pool": "mass"}, "did you mean 'pooling'?"),
    "inductor's": ({"max_autotune": True}, "write inductor={'max_autotune': ...}"),
    "value": ({"reduction": "mergee"}, "'random', 'slice'; did you mean 'merge'?"),
    "no input": ({"clip": "vidoe"}, "clip='vidoe' is no tensor input of the model; they are ['video']"),
}


@pytest.mark.parametrize("wrong", OPTIONS)
def test_options(wrong: str) -> None:
    options, words = OPTIONS[wrong]
    assert_refused(Masked(), (video(),), OptionError, words, **options)


def test_mode_together_with_options() -> None:
    with pytest.raises(RuntimeError, match="mode or options"):
        torch.compile(Masked(), backend="tldr", mode="default", options={"verify": True})


# --- nothing to merge ---

SEARCHED = "searched for scaled_dot_product_attention and for product - softmax - product over the tokens of a clip"


@pytest.mark.parametrize("schedule", [0.2, [3, 2]], ids=str)
def test_a_model_without_attention(schedule: Any) -> None:
    words = (SEARCHED, "it has no softmax over tokens either", "on_nothing='warn'")
    assert_refused(Masked("none"), (video(),), NothingToMerge, *words, schedule=schedule)


def test_a_near_miss_is_named() -> None:
    words = (
        SEARCHED,
        'Nearest miss: aten.softmax.int softmax ("',
        ": the probabilities (softmax)",
        "not multiplied with values but read by aten.amax",
    )
    assert_refused(Masked("peak"), (video(),), NothingToMerge, *words, schedule=[3])


def test_causal_attention() -> None:
    words = (
        "no attention site of this graph can merge tokens",
        "it is causal: the order of its tokens carries meaning",
    )
    assert_refused(Masked("causal"), (video(),), NothingToMerge, *words, schedule=[3])


def test_a_padding_mask_of_every_sample() -> None:
    keep = torch.arange(TOKENS) < torch.tensor([[TOKENS], [10]])
    words = ("site 0", "differs by token and by sample: a masked token must not merge with another")
    assert_refused(Masked(), (video(), keep), NothingToMerge, *words, schedule=[3])


def test_nothing_is_a_warning_where_the_user_says_so() -> None:
    for kind in ("none", "peak", "causal"):
        model = Masked(kind)
        with pytest.warns(UserWarning, match="tldr: .*; the model runs as it is"):
            merged = tldr_compile.apply(model, (video(),), schedule=[3], on_nothing="warn")
        assert torch.equal(merged(video()), model(video()))


def test_one_that_cannot_beside_one_that_can() -> None:
    """Only the entry of the site that cannot merge is refused; a fraction passes over it."""

    class Half(Masked):
        def attend(self, qkv: Tensor, keep: Tensor | None) -> Tensor:
            self.kind = {"": "causal", "causal": ""}[self.kind]
            return super().attend(qkv, keep)

    words = ("schedule[0] = 3, but site 0", "it is causal", "Give it 0; sites that can: [1]")
    assert_refused(Half(), (video(),), ScheduleError, *words, schedule=[3])
    report = tldr_compile.apply(Half(), (video(),), schedule=0.3, verify=True).report
    assert [site["status"] for site in report.sites] == ["refused", "merged"]


# --- tracing ---


def test_a_model_that_does_not_trace_keeps_the_reason_of_the_tracer() -> None:
    with pytest.raises(CaptureError, match=r"cannot capture Masked as one graph: .*data-dependent") as caught:
        tldr_compile.apply(Masked("branch"), (video(),), schedule=[3])
    assert caught.value.__cause__ is not None
    assert str(caught.value.__cause__) in str(caught.value)


# --- shapes ---


@every_case
def test_apply_refuses_other_shapes(case: Case) -> None:
    merged = tldr_compile.apply(program(case, 2), schedule=case.schedule)
    (clip,) = case.inputs()
    for other in (clip[:1], clip[..., :-8], clip.double(), clip.flatten()):
        with pytest.raises(ShapeError, match=r"^input '(video|pixel_values|pixel_values_videos)': expected"):
            merged(other)
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        merged(clip, clip)


@pytest.mark.parametrize("name", ["vivit", "timesformer", "vjepa2"])
@torch.no_grad()
def test_the_backend_serves_every_batch(name: str) -> None:
    """At the second batch the graph is captured anew with a symbolic one, which then serves every other.

    With class tokens, divided, and over positions that are made in the graph.
    """
    model = case(name, FAMILIES[name].attns[0])
    (videos,) = model.inputs(6)
    merged = tldr_compile.apply(program(model, 2), schedule=model.schedule)
    pairs = [merged(pair) for pair in videos.split(2)]
    with graphs_for_inductor() as graphs:
        run = compiled(model.build(), schedule=model.schedule)
        for batch in (2, 4, 6):
            outputs, expected = run(videos[:batch]), pairs[: batch // 2]
            for actual, *parts in zip(tensors(outputs), *map(tensors, expected), strict=True):
                assert_same(actual, torch.cat(parts))
    assert len(graphs) == 2


@torch.no_grad()
def test_the_backend_captures_other_clips_anew() -> None:
    model = Masked().eval()
    run = compiled(model, schedule=[0.2, 3])
    with graphs_for_inductor() as graphs:
        for frames in (4, 6, 8):
            clip = video(frames=frames)
            assert_same(run(clip), tldr_compile.apply(model, (clip,), schedule=[0.2, 3])(clip))
    assert len(graphs) >= 2
