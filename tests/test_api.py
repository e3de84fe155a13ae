"""`apply` and `explain`: called like the model, with the model's parameters, and clear about what does not fit."""

from __future__ import annotations

import copy
import inspect
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import tldr_compile
from tests.tiny import TOKENS, WIDTH, Tiny, clip
from tldr_compile import CaptureError, OptionError, ScheduleError, ShapeError, TokenMerging, apply, explain


class Rich(Tiny):
    """Nested arguments, a dictionary of outputs, tied weights, buffers of both kinds, a buffer that is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.tied = self.head
        self.unused = nn.Linear(2, 2)
        self.table = torch.ones(5)
        self.register_buffer("scale", torch.full((5,), 2.0), persistent=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(  # type: ignore[override]
        self, batch: dict[str, Tensor], flag: bool = False, *, bias: Tensor | None = None
    ) -> dict[str, Any]:
        self.calls.add_(1)
        x = self.embed(batch["video"])
        for block in self.blocks:
            x = block(x)
        logits = self.tied(x.mean(1)) * self.scale + self.table + torch.arange(5, device=x.device)
        return {"logits": logits if bias is None else logits + bias, "rest": (x, None, 3), "flag": flag}


def rich(model: Rich, **options: Any) -> tldr_compile.MergedModule:
    return apply(model, ({"video": clip()},), {"flag": True, "bias": torch.ones(5)}, **options)


def test_it_is_called_like_the_model_and_returns_what_the_model_does() -> None:
    model = Rich()
    merged = rich(model, schedule=[0])
    batch, bias = {"video": clip()}, torch.ones(5)
    expected = model(batch, flag=True, bias=bias)
    outputs = merged(batch, bias=bias, flag=True)
    assert list(outputs) == ["logits", "rest", "flag"]
    assert outputs["rest"][1:] == (None, 3)
    assert outputs["flag"] is True
    assert torch.equal(outputs["logits"], expected["logits"])
    assert torch.equal(outputs["rest"][0], expected["rest"][0])
    assert torch.equal(merged(flag=True, bias=bias, batch=batch)["logits"], expected["logits"])


def test_parameters_and_buffers_are_the_models_under_their_names() -> None:
    model = Rich()
    merged = rich(model, schedule=[5])
    assert set(merged.state_dict()) == set(model.state_dict())
    ours = dict(merged.named_parameters(remove_duplicate=False))
    theirs = dict(model.named_parameters(remove_duplicate=False))
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in theirs)
    before = model.calls.clone()
    merged({"video": clip()}, flag=True, bias=torch.ones(5))
    assert torch.equal(model.calls, before + 1)


def test_restored_outputs_have_their_length_and_merged_ones_do_not() -> None:
    model, video = Tiny(), clip()
    for outputs, length in (("restore", TOKENS), ("merged", TOKENS - 8)):
        merged = apply(model, (video,), {"tokens": True}, schedule=[5, 3], outputs=outputs)
        assert merged(video, tokens=True)["tokens"].shape == (2, length, WIDTH)


def test_a_model_output_stays_one() -> None:
    config = T.VideoMAEConfig(
        image_size=24, patch_size=8, num_frames=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    model = T.VideoMAEForVideoClassification(config).eval()
    pixels = torch.randn(2, 4, 3, 24, 24)
    merged = apply(model, (), {"pixel_values": pixels, "output_hidden_states": True}, schedule=[4])
    outputs = merged(output_hidden_states=True, pixel_values=pixels)
    expected = model(pixel_values=pixels, output_hidden_states=True)
    assert type(outputs) is type(expected)
    assert outputs.keys() == expected.keys()
    assert [each.shape for each in outputs.hidden_states] == [each.shape for each in expected.hidden_states]


def test_module_graph_and_program_are_twins() -> None:
    model, video = Tiny().eval(), clip()
    wanted = apply(model, (video,), schedule=[5, 3])(video)
    program = torch.export.export(model, (video,))
    for source in (
        program,
        program.run_decompositions({}),
        fx.symbolic_trace(model, {"tokens": False}),
        make_fx(model, pre_dispatch=True)(video),
    ):
        args: tuple[Any, ...] = () if isinstance(source, torch.export.ExportedProgram) else (video,)
        assert torch.equal(apply(source, args, schedule=[5, 3])(video), wanted)


def test_it_learns() -> None:
    model, video = Tiny(), clip()
    merged = apply(model, (video,), schedule=[5, 3])
    optimizer = torch.optim.SGD(merged.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(merged(video), torch.tensor([0, 1]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_it_moves_with_everything_that_its_graph_makes() -> None:
    merged = rich(Rich(), schedule=()).to("meta")
    outputs = merged({"video": clip().to("meta")}, flag=True, bias=torch.ones(5, device="meta"))
    assert outputs["logits"].device.type == "meta"
    assert {value.device.type for value in (*merged.parameters(), *merged.buffers())} == {"meta"}


def test_it_can_be_copied_compiled_and_exported_again() -> None:
    model, video = Tiny(), clip()
    merged = apply(model, (video,), schedule=[5, 3])
    wanted = merged(video)
    assert torch.equal(copy.deepcopy(merged)(video), wanted)
    assert torch.equal(torch.compile(merged, backend="eager", fullgraph=True)(video), wanted)
    again = torch.export.export(merged, (video,))
    assert torch.equal(again.module()(video), wanted)
    assert set(again.state_dict) == set(model.state_dict())


def test_any_batch_within_the_captured_range() -> None:
    batch = torch.export.Dim("batch", min=2, max=6)
    merged = apply(Tiny(), (clip(),), schedule=0.25, dynamic_shapes=({0: batch},))
    for size in (2, 3, 6):
        assert merged(clip(size)).shape == (size, 5)
    for size in (1, 7):
        with pytest.raises(ShapeError, match=rf"input 'video': expected .* between 2 and 6, got {size}"):
            merged(clip(size))
    exported = torch.export.export(merged, (clip(),), dynamic_shapes={"video": {0: batch}})
    assert exported.module()(clip(5)).shape == (5, 5)


def test_sizes_that_depend_on_each_other() -> None:
    class Join(nn.Module):
        def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            return x + y + z[: x.shape[0]]

    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = ({0: batch}, {0: batch}, {0: 2 * batch})
    merged = apply(Join(), (torch.ones(4), torch.ones(4), torch.ones(8)), schedule=(), dynamic_shapes=shapes)
    assert merged(torch.ones(3), torch.ones(3), torch.ones(6)).shape == (3,)
    with pytest.raises(ShapeError, match=r"input 'y': .* is 3 by the other inputs, got 4"):
        merged(torch.ones(3), torch.ones(4), torch.ones(6))
    with pytest.raises(ShapeError, match=r"input 'z': .* is 6 by the other inputs, got 8"):
        merged(torch.ones(3), torch.ones(3), torch.ones(8))


VIDEO, BIAS = clip(), torch.ones(5)


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        (({"video": VIDEO},), {"flag": True}, "input 'bias': expected a tensor .5., got NoneType"),
        (({"clip": VIDEO},), {"flag": True, "bias": BIAS}, "the arguments are not nested as they were when captured"),
        (({"video": VIDEO},), {"flag": False, "bias": BIAS}, "input 'flag': expected True, got False"),
        (({"video": VIDEO},), {"flag": 1, "bias": BIAS}, "input 'flag': expected True, got 1"),
        (({"video": VIDEO},), {"flag": True, "bias": None}, "input 'bias': expected a tensor .5., got NoneType"),
        (
            ({"video": VIDEO.double()},),
            {"flag": True, "bias": BIAS},
            "'video': expected torch.float32, got torch.float64",
        ),
        (
            ({"video": VIDEO[:1]},),
            {"flag": True, "bias": BIAS},
            r"input 'video': expected \[2, 3, 4, 12, 12\], got \[1, 3, 4, 12, 12\]; .* give it dynamic_shapes=",
        ),
        (({"video": VIDEO[0]},), {"flag": True, "bias": BIAS}, r"got \[3, 4, 12, 12\]"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(args: Any, kwargs: Any, text: str) -> None:
    model = Rich()
    merged = rich(model, schedule=())
    before = model.calls.clone()
    with pytest.raises(ShapeError, match=text):
        merged(*args, **kwargs)
    assert torch.equal(model.calls, before)


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        (({"video": VIDEO},), {"flag": True, "bias": BIAS, "mask": 1}, "unexpected keyword argument 'mask'"),
        (({"video": VIDEO}, True), {"flag": True, "bias": BIAS}, "multiple values for argument 'flag'"),
        ((), {"flag": True, "bias": BIAS}, "missing 1 required positional argument: 'batch'"),
    ],
)
def test_what_the_model_cannot_be_called_with_it_cannot_either(args: Any, kwargs: Any, text: str) -> None:
    model = Rich()
    for called in (model, rich(model, schedule=())):
        with pytest.raises(TypeError, match=text):
            called(*args, **kwargs)


class Optional(Tiny):
    """With arguments that have defaults, and some that it hands on."""

    def forward(self, video: Tensor, scale: Tensor | None = None, *, tokens: bool = False, **more: Tensor) -> Tensor:
        out = super().forward(video if scale is None else video * scale, tokens)
        return out + more["bias"] if "bias" in more else out


def test_it_has_the_signature_of_the_model() -> None:
    model, video = Optional(), clip()
    merged = apply(model, (video,), schedule=[5])
    shown = inspect.signature(merged.forward)
    assert str(shown) == "(video, scale=None, *, tokens=False)"
    for call in (merged(video), merged(video=video), merged(video, None, tokens=False)):
        assert torch.equal(call, merged(video))
    with pytest.raises(ShapeError, match=r"captured with the arguments \(video\); not captured: scale"):
        merged(video, torch.ones(()))
    with pytest.raises(TypeError, match="unexpected keyword argument 'bias'"):
        merged(video, bias=torch.ones(5))
    named = apply(model, (), {"video": video, "bias": torch.ones(5)}, schedule=[5])
    assert str(inspect.signature(named.forward)) == "(video, scale=None, *, tokens=False, **more)"
    torch.testing.assert_close(named(video, bias=torch.ones(5)), merged(video) + 1)
    with pytest.raises(ShapeError, match="missing bias"):
        named(video)
    program = apply(torch.export.export(model, (video,)), schedule=[5])
    assert str(inspect.signature(program.forward)) == "(video)"
    assert torch.equal(program(video=video), merged(video))


def test_what_cannot_be_captured_is_refused_with_the_tracers_reason() -> None:
    class Data(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(
        CaptureError, match=r"torch\.export cannot capture Data as one graph: .*data-dependent"
    ) as caught:
        apply(Data(), (clip(),))
    assert caught.value.__cause__ is not None
    with pytest.raises(CaptureError, match=r"args is Tensor, not a tuple: for one input write \(input,\)"):
        apply(Tiny(), clip())  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match="the model is function"):
        apply(lambda x: x, (clip(),))  # type: ignore[arg-type]

    class Named(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.report = nn.Linear(2, 2)

    with pytest.raises(CaptureError, match="'report' has the name of an attribute that every merged module has"):
        apply(Named(), (clip(),), schedule=[5])


def test_options_come_one_way() -> None:
    args = (Tiny(), (clip(),))
    assert apply(*args, config=TokenMerging(schedule=[5])).report.to_dict()["schedule"] == [5, 0]
    with pytest.raises(OptionError, match="config= is given together with schedule"):
        apply(*args, config=TokenMerging(), schedule=[5])
    with pytest.raises(OptionError, match="config is a TokenMerging"):
        apply(*args, config={"schedule": [5]})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="did you mean 'schedule'"):
        explain(*args, shedule=[5])
    with pytest.raises(OptionError, match="this program is already exported"):
        apply(torch.export.export(*args), dynamic_shapes=({0: torch.export.Dim.AUTO},))


def test_options_come_from_a_file_and_a_name(tmp_path: Path) -> None:
    args = (Tiny(), (clip(),))
    path = tmp_path / "options.json"
    TokenMerging(schedule=[5], outputs="merged", made_for={"sites": 2}).save(path)
    assert apply(*args, config=path).report.to_dict()["schedule"] == [5, 0]
    assert explain(*args, config=str(path), schedule=0.3).to_dict()["schedule"] == [0.3, 0.3]
    with pytest.raises(ScheduleError, match=r"for a model with 12 attention sites .*vid-tldr-umt-b.* this graph has 2"):
        apply(*args, preset="vid-tldr-umt-b")


def test_a_budget_is_kept_and_told() -> None:
    program = torch.export.export(Tiny(), (clip(),))
    told = explain(program, budget=0.8)
    facts = told.to_dict()
    found = facts["budget"]
    assert facts["gflops_after"] / facts["gflops_before"] == pytest.approx(found["part"])
    assert 0.7 < found["part"] <= found["budget"] == 0.8
    assert facts["schedule"] == [found["fraction"]] * 2
    assert f"budget 0.8 of the dense operations: one fraction {found['fraction']:g} at every site" in str(told)
    assert "at video [2, 3, 4, 12, 12]" in str(told)
    with pytest.raises(ScheduleError, match=r"budget=0\.1: .* give 0\.\d+ or more"):
        apply(program, budget=0.1)
    flat = explain(nn.Flatten(), (clip(),), budget=0.8)
    assert "schedule for a budget of 0.8" in str(flat)
    assert flat.to_dict()["budget"] is None


def test_the_default_schedule_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="tldr_compile"):
        merged = apply(Tiny(), (clip(),))
    assert "no schedule is given: the default (0.25, 0.12, 0.06)" in caplog.text
    assert merged.report.to_dict()["default_schedule"] is True


def test_explain_is_what_apply_reports() -> None:
    model, args = Tiny(), (clip(),)
    assert explain(model, args, schedule=[5, 3]).to_dict() == apply(model, args, schedule=[5, 3]).report.to_dict()


def test_an_entry_that_asks_for_more_than_half_is_named() -> None:
    told = explain(Tiny(), (clip(),), schedule=[10, 4])
    assert [site["tokens_out"] for site in told.to_dict()["sites"]] == [9, 5]
    assert "merge to n1; 10 asked, but no more than half can go" in str(told)
    assert str(told).count("asked") == 1
    assert "; 0.9 asked" in str(explain(Tiny(), (clip(),), schedule=[0.9]))


def test_gflops_are_those_of_all_products() -> None:
    def block(tokens: int, left: int) -> int:
        pairs = WIDTH * tokens**2 * 2
        return tokens * (3 + 1) * WIDTH**2 + pairs + left * 2 * 2 * WIDTH**2

    def matching(tokens: int) -> int:
        return WIDTH * (tokens - tokens // 2) * (tokens // 2)

    rest = TOKENS * WIDTH * 3 * 2 * 4 * 4 + 5 * WIDTH
    told = explain(Tiny(), (clip(),), schedule=[5, 3]).to_dict()
    dense = rest + 2 * block(18, 18)
    merged = rest + block(18, 13) + matching(18) + block(13, 10) + matching(13)
    assert (told["gflops_before"], told["gflops_after"]) == pytest.approx((2 * 2 * dense / 1e9, 2 * 2 * merged / 1e9))


def test_nothing_to_merge() -> None:
    model, x = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU()), clip()
    with pytest.raises(tldr_compile.NothingToMerge) as caught:
        apply(model, (x,), schedule=0.1)
    with pytest.warns(UserWarning, match="tldr: .*; the model runs as it is"):
        merged = apply(model, (x,), schedule=0.1, on_nothing="warn")
    assert torch.equal(merged(x), model(x))
    assert merged.report.nothing == explain(model, (x,), schedule=0.1).nothing == str(caught.value)


def test_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    model, video = Tiny(), clip()
    merged = apply(model, (video,), schedule=[5, 3], verify=True)
    merged.verify((clip(2) * 2,))
    with torch.no_grad():
        for node in merged._merged.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default):
            node.target = torch.ops.aten.relu.default
        merged._merged.graph.recompile()
    with pytest.raises(tldr_compile.VerificationError):
        merged.verify((video,))


def test_a_folder_of_the_user_that_is_named_passes_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes" / "__init__.py").write_text("raise RuntimeError('imported in place of ours')")
    program = "import tldr_compile, sys; print('passes' in sys.modules, tldr_compile.passes.__name__)"
    root = {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **root}, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "tldr_compile.passes"], done.stderr


def test_what_the_pass_saw_and_decided_can_be_read() -> None:
    program = (
        "import torch; from tests.tiny import Tiny, clip; import tldr_compile;"
        "tldr_compile.apply(Tiny().eval(), (clip(),), schedule=[5])"
    )
    root = Path(__file__).parents[1]
    environment = {**os.environ, "TORCH_LOGS": "+tldr_compile", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", program]
    told = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True).stderr
    shown = ("the typed graph:", "[b x t·h·w x", "the decisions:", "site 0", "merges 5 of run", "the merged graph:")
    assert [part for part in shown if part not in told] == []
