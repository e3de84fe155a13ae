"""Models that Dynamo breaks into several graphs: what a sequence may be bound to, and that nothing happens silently."""

from __future__ import annotations

import os
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.parallel import DistributedDataParallel

import tldr_compile
from tests.laws.support import compiled, graphs_for_inductor
from tests.tiny import Block, Tiny, clip
from tldr_compile import GraphBreakError, NothingToMerge

pytestmark = pytest.mark.filterwarnings("ignore:tldr. the clip comes as tokens")


@pytest.fixture(autouse=True)
def graphs() -> Iterator[list[fx.GraphModule]]:
    with graphs_for_inductor() as seen, torch.no_grad():
        yield seen


class Video(Tiny):
    """`Tiny`, broken before, between, or after its blocks, or run by Python: around it, or block by block."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, video: Tensor, tokens: bool = False) -> Any:
        if self.where == "before":
            video = video * 2
            torch._dynamo.graph_break()
        if self.where == "around":
            return in_python(lambda: super(Video, self).forward(video))
        if self.where == "each":
            x = self.embed(video)
            for block in self.blocks:
                x = call(block, x)
            return self.head(x.mean(1))
        first, second = self.blocks
        x = first(self.embed(video))
        if self.where == "between":
            torch._dynamo.graph_break()
        x = second(x)
        if self.where == "after":
            torch._dynamo.graph_break()
        return self.head(x.mean(1))


@torch._dynamo.disable(recursive=False)
def in_python(run: Callable[[], Any]) -> Any:
    return run()


@torch._dynamo.disable(recursive=False)
def call(block: Callable[[Tensor], Any], x: Tensor) -> Any:
    return block(x)


class Blind(nn.Module):
    """No attention at all: in one graph, in two with a break, or in what Python calls."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.lin = where, nn.Linear(12, 12)
        self.inner = Blind("whole") if where == "python" else None

    def forward(self, video: Tensor) -> Tensor:
        if self.where == "python":
            return call(self.inner, video)
        x = self.lin(video)
        if self.where == "broken":
            torch._dynamo.graph_break()
        return x + 1


def refusal(run: Callable[[], Any], kind: type[Exception]) -> str:
    """What it raises, as itself or wrapped by `torch.compile`."""
    with pytest.raises((kind, BackendCompilerFailed)) as caught:
        run()
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), kind)
    return str(caught.value)


@pytest.mark.parametrize("where", ["before", "after", "around"])
def test_a_graph_with_all_the_attention_is_the_model(where: str) -> None:
    model, whole = Video(where), Tiny()
    whole.load_state_dict(model.state_dict())
    run = compiled(model, schedule=[5, 3])
    for batch in (2, 3, 5):  # recompiled for another batch, and then for any
        merged = tldr_compile.apply(whole, (clip(batch),), {"tokens": True}, schedule=[5, 3])(clip(batch), tokens=True)
        # Masses end at a break: the head after it takes the plain mean of all tokens.
        expected = model.head(merged["tokens"].mean(1)) if where == "after" else merged["logits"]
        video = clip(batch) / 2 if where == "before" else clip(batch)
        torch.testing.assert_close(run(video), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"schedule": [5, 3]}, "the schedule [5, 3]"),
        ({}, "the default schedule"),
        ({"budget": 0.9}, "budget=0.9 is a part of what one graph costs"),
        ({"schedule": 0.2, "made_for": {"sites": 2}}, "made_for says 2 attention sites, of one graph"),
    ],
)
@pytest.mark.parametrize("where", ["between", "each"])
def test_a_sequence_is_refused_where_attention_is_spread(where: str, options: dict[str, Any], name: str) -> None:
    model = Video(where)
    for _ in range(2):  # the second time, what could be compiled comes from the cache
        run = compiled(model, **options)
        for _ in range(2):
            text = refusal(lambda: run(clip()), GraphBreakError)  # noqa: B023 - run at once
            for part in (name, "piece of the model", "fullgraph=True", 'options={"schedule": 0.1}'):
                assert part in text
            reason = "graph_break()" if where == "between" else "Dynamo did not capture"
            assert reason in text
            assert __file__ in text


def test_a_sequence_is_refused_where_one_graph_runs_twice() -> None:
    """The second time, nothing comes to the backend."""
    block = Block()

    @torch._dynamo.disable(recursive=False)
    def twice(x: Tensor) -> Tensor:
        return call(block, call(block, x).clone())

    run = compiled(lambda x: twice(x) + 1, schedule=[5])
    assert "Dynamo did not capture" in refusal(lambda: run(torch.randn(2, 18, 16)), GraphBreakError)


def test_a_sequence_is_the_second_call_s_too() -> None:
    """Attention in one graph per call, whichever graph: each call has a whole model."""

    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Tiny(), Tiny()

        def forward(self, video: Tensor, first: bool) -> Any:
            return in_python(lambda: self.one(video) if first else self.two(video))

    run = compiled(Either(), schedule=[5])
    for first in (True, False, True):
        run(clip(), first)


@pytest.mark.parametrize("where", ["between", "each"])
def test_one_fraction_holds_everywhere_and_says_that_the_breaks_matter(where: str) -> None:
    model = Video(where)
    run = compiled(model, schedule=0.25)
    with pytest.warns(UserWarning, match="tokens are merged in 2 graphs of one call"):
        merged = run(clip())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run(clip()), merged)
    assert not torch.allclose(merged, model(clip()), atol=1e-3)


@pytest.mark.parametrize("where", ["whole", "broken", "python"])
def test_a_model_that_merges_nothing_says_so(where: str) -> None:
    model, video = Blind(where), clip()
    for _ in range(2):
        run = compiled(model, schedule=[5])
        for _ in range(2):
            text = refusal(lambda: run(video), NothingToMerge)  # noqa: B023 - run at once
    assert "attention" in text
    if where == "broken":
        assert "graph_break()" in text
    torch.compiler.reset()
    run = compiled(model, schedule=[5], on_nothing="warn")
    with pytest.warns(UserWarning, match="runs as it is"):
        torch.testing.assert_close(run(video), model(video))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(video)


class Sized(nn.Module):
    """Sizes that come out of tensors, read one by one: a piece for each, and no attention over the clip."""

    def forward(self, video: Tensor, sizes: Tensor) -> Tensor:
        x = video + 1
        a = sizes[0].item()
        x = x * a
        b = sizes[1].item()
        x = x * b
        c = sizes[2].item()
        x = x * c
        d = sizes[3].item()
        return x * d


def test_each_reason_is_given_once_and_how_a_tower_is_taken() -> None:
    run, sizes = compiled(Sized(), schedule=0.2), torch.ones(4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        text = refusal(lambda: run(clip(), sizes), NothingToMerge)
    assert text.count("Dynamo broke it") == 1
    assert text.count("in forward") == 3
    assert "and 1 more" in text
    assert "model.model.visual = tldr_compile.apply(model.model.visual, kwargs=inputs, schedule=0.2)" in text
    assert sum("a piece of the model merges nothing" in str(each.message) for each in caught) == 1
    # A break of another kind needs no tower.
    assert "tldr_compile.apply" not in refusal(lambda: compiled(Blind("broken"), schedule=[5])(clip()), NothingToMerge)


def test_after_a_reset_it_is_said_again() -> None:
    run = compiled(Blind("python"), schedule=0.2)
    refusal(lambda: run(clip()), NothingToMerge)
    torch.compiler.reset()
    refusal(lambda: run(clip()), NothingToMerge)


def test_a_piece_that_ends_in_a_break_warns_at_once() -> None:
    said: list[str] = []

    class Stopped(Blind):
        def forward(self, video: Tensor) -> Tensor:
            self.kept = self.lin(video)
            torch._dynamo.graph_break()
            said.extend(str(each.message) for each in caught)
            raise KeyError("user")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(KeyError, match="user"):  # and that nothing was merged does not hide it
            compiled(Stopped("broken"), schedule=[5])(clip())
    assert "a piece of the model merges nothing" in said[-1]
    assert "graph_break()" in said[-1]
    assert __file__ in said[-1]


def test_a_call_that_skips_the_encoder_is_no_news() -> None:
    class Cached(Video):
        def skip(self, video: Tensor) -> Tensor:
            return video + 1

        def forward(self, video: Tensor, tokens: bool = False) -> Any:
            return call(self.skip, video) if tokens else call(super().forward, video)

    run = compiled(Cached("none"), schedule=[5])
    run(clip())
    run(clip(), tokens=True)


def test_a_schedule_of_zeros_asks_for_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for where in ("broken", "python"):
            compiled(Blind(where), schedule=0.0)(clip())


def test_models_do_not_speak_for_each_other() -> None:
    """Of one class, with equal options: one merges, the other has nothing to merge; also from two threads."""

    class Holder(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, video: Tensor) -> Any:
            return call(self.inner, video)

    good, bad = compiled(Holder(Tiny()), schedule=[5]), compiled(Holder(Blind("whole")), schedule=[5])
    for _ in range(2):
        good(clip())
        refusal(lambda: bad(clip()), NothingToMerge)
    raised: list[str] = []

    def other() -> None:
        with torch.no_grad():
            raised.append(refusal(lambda: bad(clip()), NothingToMerge))

    thread = threading.Thread(target=other)
    thread.start()
    good(clip())
    thread.join()
    assert len(raised) == 1


def test_an_error_that_the_caller_handles_hides_nothing() -> None:
    run = compiled(Blind("python"), schedule=[5])
    try:
        raise KeyError("handled")
    except KeyError:
        refusal(lambda: run(clip()), NothingToMerge)


def test_blocks_compiled_one_by_one_are_models_of_their_own(graphs: list[fx.GraphModule]) -> None:
    model, video = Tiny(3), clip()
    x = model.embed(video)
    for block in model.blocks:
        x = tldr_compile.apply(block, (x,), schedule=[5], protect=0)(x)
    expected = model.head(x.mean(1))
    for block in model.blocks:
        block.compile(backend="tldr", options={"schedule": [5], "protect": 0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(model(video), expected)
    assert len(graphs) < 3  # their code is the same


@pytest.mark.filterwarnings("default")
def test_a_block_says_that_it_cannot_see_a_class_token() -> None:
    block, x = Block(), torch.randn(2, 18, 16)
    note = "no class token could be seen: protect= says how many tokens lead"
    with pytest.warns(UserWarning, match=note):
        compiled(block, schedule=[5])(x)
    report = tldr_compile.explain(block, (x,), schedule=[5])
    assert note in str(report)
    assert note in report.to_dict()["notes"][0]
    for quiet in (
        tldr_compile.explain(block, (x,), schedule=[5], protect=0),
        tldr_compile.explain(Tiny(), (clip(),), schedule=[5]),
    ):
        assert quiet.notes == []


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    dist.init_process_group("gloo", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("outside", [True, False])
def test_ddp(outside: bool) -> None:
    """In one bucket it is the model; in many, none of them silently takes the schedule."""
    model, split = Tiny(), 0.0067  # in megabytes: a block for each bucket
    expected = tldr_compile.apply(model, (clip(),), schedule=[5, 3])(clip())

    def wrapped(megabytes: float, schedule: Any) -> Any:
        torch.compiler.reset()
        if outside:
            return compiled(DistributedDataParallel(model, bucket_cap_mb=megabytes), schedule=schedule)
        return DistributedDataParallel(compiled(model, schedule=schedule), bucket_cap_mb=megabytes)

    torch.testing.assert_close(wrapped(25, [5, 3])(clip()), expected)
    with pytest.raises(BackendCompilerFailed) as caught:  # before any of it runs
        wrapped(split, [5])(clip())
    assert isinstance(caught.value.inner_exception, GraphBreakError)
    text = str(caught.value)
    assert "DDPOptimizer" in text
    assert "optimize_ddp = False" in text
    with pytest.warns(UserWarning, match="tokens are merged in 2 graphs"):
        wrapped(split, 0.25)(clip())
    with torch._dynamo.config.patch(optimize_ddp=False):
        torch.testing.assert_close(wrapped(split, [5, 3])(clip()), expected)
