"""`torch.compile(model, backend="tldr")`: options, graph breaks, static inputs, no stale code."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

import tldr_compile
from tests.laws import frames
from tests.tiny import Tiny, clip
from tldr_compile import backend as module
from tldr_compile.config import TokenMerging


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="tldr", options=options)


class Widths(fx.Interpreter):
    """Runs a graph and keeps how many tokens each of its normalizations read."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.seen: list[int] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten.layer_norm.default:
            self.seen.append(args[0].shape[1])
        return super().call_function(target, args, kwargs)


def inputs(graph: fx.GraphModule, model: nn.Module, video: Tensor) -> list[Tensor]:
    """What Dynamo calls the graph with: the values of its placeholders' sources."""
    placeholders = graph.graph.find_nodes(op="placeholder")
    return [eval(node._dynamo_source.name, {}, {"L": {"self": model, "video": video}}) for node in placeholders]


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> list[tuple[fx.GraphModule, Any]]:
    """The graphs and the options that Inductor is given; it runs the graphs as they are, which takes no time."""
    seen: list[tuple[fx.GraphModule, Any]] = []

    def compile_nothing(graph: fx.GraphModule, inputs: Any, config_patches: Any = None) -> Callable[..., Any]:
        seen.append((graph, config_patches))
        return graph

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_nothing)
    return seen


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.usefixtures("eager")
def test_backend_and_apply_are_twins(mode: Callable[[], Any]) -> None:
    model, video = Tiny(), clip()
    with mode():
        merged = tldr_compile.apply(model, (video,), schedule=[5, 3])
        assert torch.equal(compiled(model, schedule=[5, 3])(video), merged(video))
        assert not torch.allclose(merged(video), model(video), atol=1e-3)


def test_different_options_in_one_process_are_different_code(eager: list[tuple[fx.GraphModule, Any]]) -> None:
    model, video = Tiny(), clip()
    wanted: dict[Any, list[int]] = {(5,): [13, 13, 13], (4,): [14, 14, 14], (0, 5): [18, 18, 13], 0.25: [14, 14, 11]}
    with torch.no_grad():
        for _ in range(2):  # the second time nothing is compiled
            for schedule in wanted:
                merged = tldr_compile.apply(model, (video,), schedule=schedule)
                assert torch.equal(compiled(model, schedule=schedule)(video), merged(video))
    for (graph, _), (_, tokens) in zip(eager, wanted.items(), strict=True):
        run = Widths(graph)
        run.run(*inputs(graph, model, video))
        assert run.seen == [18, *tokens]


class AnyLength(Tiny):
    """Without positions, for clips of any number of frames."""

    def embed(self, video: Tensor) -> Tensor:
        return self.patches(video).flatten(2).transpose(1, 2)


@pytest.mark.usefixtures("eager")
def test_a_budget_is_solved_for_once(caplog: pytest.LogCaptureFixture) -> None:
    """Code that is compiled again for other sizes keeps its fraction."""
    model, short = AnyLength(depth=1), clip()
    long = short.repeat(1, 1, 3, 1, 1)
    with torch.no_grad(), caplog.at_level("INFO", logger="tldr_compile"):
        run = compiled(model, budget=0.95)
        run(short)
        run(long)
    told = [line for line in caplog.text.splitlines() if line.startswith("budget 0.95")]
    assert len(told) == 2
    assert told[0] == told[1]
    assert told[0].endswith("at video [2, 3, 4, 12, 12]")
    alone = tldr_compile.explain(model, (long,), budget=0.95).to_dict()["budget"]
    assert f"one fraction {alone['fraction']:g} " not in told[0]


def test_options_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "options.json"
    TokenMerging(schedule=[5], made_for={"sites": 3}).save(path)
    with pytest.raises(BackendCompilerFailed, match=r"for a model with 3 attention sites.*this graph has 2"):
        compiled(Tiny(), config=path)(clip())
    with pytest.raises(BackendCompilerFailed, match=r"config='none\.json' cannot be read"):
        compiled(Tiny(), config="none.json")(clip())


def test_a_schedule_of_zeros_hands_on_dynamos_own_graph() -> None:
    handed: list[bool] = []

    def check(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        handed.append(module.merged_graph(gm, inputs, TokenMerging(schedule=[0, 0])) is gm)
        return gm

    torch.compile(Tiny(), backend=check)(clip())
    assert handed == [True]


def test_parameters_stay_static_inputs() -> None:
    static: list[tuple[int, int]] = []

    def inner(graph: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        static.append((len(kwargs["static_input_idxs"]), len(inputs)))
        return compile_fx_inner(graph, inputs, **kwargs)

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        merged = module.merged_graph(gm, inputs, TokenMerging(schedule=[5]))
        assert merged is not gm
        return compile_fx(merged, inputs, inner_compile=inner)

    model = Tiny(depth=1)
    with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False):
        torch.compile(model, backend=backend)(clip())
    count = len(list(model.parameters()))
    assert static == [(count, count + 1)]


def test_gradients_flow_and_deterministic_algorithms_give_the_same_bits() -> None:
    """What joins a group is summed in one order then, whichever thread comes first."""
    model, video, threads = Tiny(depth=1), clip(64), torch.get_num_threads()
    inputs = [video.requires_grad_(), *model.parameters()]
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(3)
    try:
        fast, results = compiled(model, schedule=[9]), []
        for _ in range(3):
            loss = fast(video).square().sum()
            results.append((loss, *torch.autograd.grad(loss, inputs)))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    for again in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], again, strict=True))
    loss = tldr_compile.apply(model, (video,), schedule=[9])(video).square().sum()
    torch.testing.assert_close(results[0], (loss, *torch.autograd.grad(loss, inputs)), rtol=1e-4, atol=1e-5)
    assert all(found.abs().sum() > 0 for found in results[0])


def test_a_batch_of_any_size() -> None:
    model = Tiny(depth=1)
    run = compiled(model, schedule=0.25)
    with torch.no_grad():
        for batch in (2, 3, 5):
            video = clip(batch)
            torch.testing.assert_close(run(video), tldr_compile.apply(model, (video,), schedule=0.25)(video))


def test_mode_is_inductors(eager: list[tuple[fx.GraphModule, Any]]) -> None:
    torch.compile(Tiny(), backend="tldr", mode="max-autotune-no-cudagraphs")(clip())
    compiled(Tiny(), schedule=[5], inductor={"max-autotune": True})(clip())
    compiled(Tiny(), schedule=[4])(clip())
    patches = [patch for _, patch in eager]
    assert patches == [{"max_autotune": True, "coordinate_descent_tuning": True}, {"max_autotune": True}, None]


def test_mode_together_with_options_is_refused_by_torch() -> None:
    with pytest.raises(RuntimeError, match="Either mode or options can be specified"):
        torch.compile(Tiny(), backend="tldr", mode="default", options={"schedule": [5]})


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(BackendCompilerFailed, match="Unrecognized mode=fastest, should be one of"):
        torch.compile(Tiny(), backend="tldr", mode="fastest")(clip())


def test_the_text_of_a_refusal_says_everything() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"unknown option 'shedule': .*; did you mean 'schedule'") as caught:
        compiled(Tiny(), shedule=[5])(clip())
    assert isinstance(caught.value.inner_exception, tldr_compile.OptionError)
    with pytest.raises(BackendCompilerFailed, match=r"schedule\[0\]=-5: a number of tokens to remove cannot be neg"):
        compiled(Tiny(), schedule=[-5])(clip())


@pytest.mark.usefixtures("eager")
def test_a_whole_model_without_attention_is_refused_or_warned_about() -> None:
    model, x = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU()), clip()
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(model, schedule=0.1)(x)
    assert isinstance(caught.value.inner_exception, tldr_compile.NothingToMerge)
    torch.compiler.reset()
    with pytest.warns(UserWarning, match="tldr: .*; the model runs as it is"):
        y = compiled(model, schedule=0.1, on_nothing="warn")(x)
    torch.testing.assert_close(y, model(x))


@pytest.mark.usefixtures("eager")
def test_verification_runs_while_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    video = clip(3)
    torch._dynamo.mark_dynamic(video, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(Tiny(), schedule=[5], verify=True)(video)

    def differs(*_: Any) -> None:
        raise tldr_compile.VerificationError("x differs")

    monkeypatch.setattr("tldr_compile.passes._verify", differs)
    with pytest.raises(BackendCompilerFailed, match="x differs"):
        compiled(Tiny(), schedule=[4], verify=True)(video)


def test_the_backend_is_known_by_name_once() -> None:
    module.register()
    module.register()
    assert "tldr" in torch._dynamo.list_backends()


def test_importing_the_package_is_enough() -> None:
    code = (
        "import torch, tldr_compile; print(torch.compile(lambda x: x + 1, backend='tldr', options={'schedule': 0.0}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "function" in result.stdout


def test_frames_folded_into_a_batch_of_any_size(eager: list[tuple[fx.GraphModule, Any]]) -> None:
    """A second number of samples makes the batch symbolic; it merges what it merges at the first."""
    model, schedule = frames.folded(frames.pairs, frames.joint), [0.25, 0.25]
    merging = compiled(model, schedule=schedule)
    for batch in (2, 3, 4):
        video = frames.frames(batch)
        with torch.no_grad():
            torch.testing.assert_close(merging(video), tldr_compile.apply(model, (video,), schedule=schedule)(video))
    assert len(eager) == 2
