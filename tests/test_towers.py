"""Towers of video language models: captured by transformers' exporter, called like the model, put in its place."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.exporters.utils import precompute_export_inputs

import tldr_compile
from tests.laws.support import compiled, graphs_for_inductor
from tldr_compile import CaptureError, MergedModule, ShapeError, apply, explain

GRID = torch.tensor([[2, 8, 8]])
OTHER = torch.tensor([[2, 4, 16]])  # as many frames and tokens, other tables
WIDE = {"hidden_size": 32, "intermediate_size": 64}
SMALL = {**WIDE, "depth": 2, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4}
WINDOWS = {**SMALL, "window_size": 16, "fullatt_block_indexes": [1]}
STACKED = {**SMALL, "num_position_embeddings": 16, "deepstack_visual_indexes": [1]}
TEXT = {
    **WIDE, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 100,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}  # fmt: skip
TOKENS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
CLIP = 91


def windows() -> nn.Module:
    return T.Qwen2_5_VLForConditionalGeneration(
        T.Qwen2_5_VLConfig(text_config=TEXT, vision_config=WINDOWS, **TOKENS)
    ).eval()


def stacked() -> nn.Module:
    return T.Qwen3VLForConditionalGeneration(T.Qwen3VLConfig(text_config=TEXT, vision_config=STACKED, **TOKENS)).eval()


MODELS = pytest.mark.parametrize("make", [windows, stacked])


def pixels(tokens: int = 128) -> Tensor:
    """`[tokens, 3 * 2 * 4 * 4]`: the patches of a clip, packed in one row; the same at every call."""
    return torch.randn(tokens, 96, generator=torch.Generator().manual_seed(1))


def tower(make: Callable[[], Any] = stacked) -> Any:
    return make().model.visual


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def assert_same(one: Any, two: Any) -> None:
    assert type(one) is type(two)
    assert len(tensors(one)) == len(tensors(two)) > 0
    assert all(map(torch.equal, tensors(one), tensors(two)))


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


@MODELS
def test_it_is_called_like_the_tower(make: Callable[[], Any]) -> None:
    model, clip = tower(make), pixels()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    settings, wanted = model.config.to_dict(), model(clip, GRID)
    merged = apply(model, (clip, GRID), schedule=())
    assert_same(merged(clip, GRID), wanted)
    assert_same(merged(grid_thw=GRID, hidden_states=clip), wanted)
    assert_same(merged(clip, grid_thw=GRID, return_dict=True, output_hidden_states=None), wanted)
    assert_same(merged(clip, OTHER), model(clip, OTHER))
    assert_same(
        merged(clip, OTHER), apply(model, kwargs={"hidden_states": clip, "grid_thw": OTHER}, schedule=())(clip, OTHER)
    )
    assert not torch.equal(merged(clip, OTHER).pooler_output, wanted.pooler_output)
    # A table that is given counts, there as here.
    given = {"position_ids": torch.zeros(128, 2, dtype=torch.long)}
    assert_same(merged(clip, GRID, **given), model(clip, GRID, **given))
    assert not torch.equal(merged(clip, GRID, **given).pooler_output, wanted.pooler_output)
    # The exporter leaves nothing behind.
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert model.config.to_dict() == settings
    assert_same(model(clip, GRID), wanted)


def test_it_has_the_outputs_that_it_was_captured_with() -> None:
    model, flags = tower(), {"return_dict": False, "output_hidden_states": True}
    merged = apply(model, (pixels(), GRID), flags, schedule=())
    assert_same(merged(pixels(), GRID, **flags), model(pixels(), GRID, **flags))
    with pytest.raises(ShapeError, match="return_dict=True: the model was captured with False"):
        merged(pixels(), GRID, return_dict=True)


def test_its_parameters_are_the_towers_and_its_values_can_be_read() -> None:
    model = tower()
    merged = apply(model, (pixels(), GRID), schedule=())
    assert set(merged.state_dict()) == set(model.state_dict())
    theirs = dict(model.named_parameters())
    assert all(theirs[name] is value for name, value in merged.named_parameters())
    assert model not in set(merged.modules())
    assert merged.config is model.config
    assert (merged.spatial_merge_size, merged.dtype, merged.device) == (2, torch.float32, torch.device("cpu"))
    for name in ("blocks_", "get_input_embeddings", "post_init", "_no_split_modules"):  # no method, nothing private
        assert not hasattr(merged, name)
    with pytest.raises(AttributeError, match="'MergedModule' object has no attribute 'nothing'"):
        _ = merged.nothing


def test_copies_move_with_their_tables() -> None:
    model, clip = tower(), pixels()
    merged = apply(model, (clip, GRID), schedule=())
    other = copy.deepcopy(merged)
    assert_same(other(clip, OTHER), merged(clip, OTHER))
    other.to("meta")
    assert (other.device.type, merged.device.type, model.device.type) == ("meta", "cpu", "cpu")
    inputs = other._inputs((clip.to("meta"), GRID), {})
    assert {value.device.type for value in tensors(inputs) if value is not GRID} == {"meta"}
    assert_same(torch.compile(merged, backend="eager")(clip, OTHER), merged(clip, OTHER))


def test_it_takes_pixels_of_another_precision_as_the_tower_does() -> None:
    model, clip = tower().bfloat16(), pixels()
    merged = apply(model, (clip, GRID), schedule=())
    assert merged.dtype == torch.bfloat16
    assert_same(merged(clip, GRID), merged(clip.bfloat16(), GRID))
    # The exporter rounds tables, too, such as the weights of interpolated positions.
    torch.testing.assert_close(tensors(merged(clip, GRID)), tensors(model(clip, GRID)), rtol=1.6e-2, atol=1.6e-2)


def test_tokens_are_merged_and_tables_of_another_clip_hold(caplog: pytest.LogCaptureFixture) -> None:
    model, clip = tower(), pixels()
    options: dict[str, Any] = {"schedule": 0.3, "clip": "hidden_states"}
    with caplog.at_level(logging.INFO, logger="tldr_compile"):
        merged = apply(model, (clip, GRID), verify=True, **options)
    line = (
        "captured by transformers' DynamoExporter, which takes the tables (cu_seqlens, position_ids, interp_indices, "
        "interp_weights) as inputs; they are computed from grid_thw at every call"
    )
    assert line in str(merged.report).splitlines()
    assert line in caplog.text
    assert str(explain(model, (clip, GRID), **options)) == str(merged.report)
    assert [site["status"] for site in merged.report.sites] == ["merged", "merged"]
    assert_same(merged(clip, OTHER), apply(model, (clip, OTHER), **options)(clip, OTHER))
    merged.verify((clip, OTHER))
    outputs = merged(clip, GRID)
    assert [value.shape for value in tensors(outputs)] == [value.shape for value in tensors(model(clip, GRID))]
    assert not torch.allclose(outputs.pooler_output, model(clip, GRID).pooler_output, atol=1e-3)


@MODELS
@pytest.mark.filterwarnings("ignore:tldr. this graph has no attention site")
def test_a_language_model_takes_it_for_its_tower(make: Callable[[], Any]) -> None:
    whole, clip = make(), pixels()
    # The second model has a timestamp before every frame.
    frames = [[92, *[CLIP] * 32, 93]] if make is windows else [[92, *[CLIP] * 16, 93]] * 2
    ids = torch.tensor([[1, *(number for frame in frames for number in (2, *frame)), 3]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == CLIP).long() * 2,
        "pixel_values_videos": clip,
        "video_grid_thw": GRID,
    }

    def told() -> tuple[Tensor, Tensor]:
        return whole(**inputs).logits, whole.generate(**inputs, max_new_tokens=3, do_sample=False)

    dense, (logits, tokens), names = whole.model.visual, told(), list(whole.state_dict())
    kwargs = {"hidden_states": clip, "grid_thw": GRID}
    whole.model.visual = apply(dense, kwargs=kwargs, schedule=())
    assert all(map(torch.equal, told(), (logits, tokens)))
    assert list(whole.state_dict()) == names
    whole.model.visual = apply(dense, kwargs=kwargs, schedule=0.3)
    merged, _ = told()
    assert merged.shape == logits.shape
    assert torch.equal(merged, logits) == (whole.model.visual.report.nothing is not None)


@pytest.fixture(scope="module")
def captured() -> MergedModule:
    return apply(tower(), (pixels(), GRID), schedule=())


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        (
            (pixels(256), torch.tensor([[4, 8, 8]])),
            {},
            r"captured with grid_thw = \[\[2, 8, 8\]\] \(hidden_states \[128, 96\], cu_seqlens \[3\], .*\), and is "
            r"called with grid_thw = \[\[4, 8, 8\]\] \(hidden_states \[256, 96\], cu_seqlens \[5\], .*\): apply "
            "tldr_compile to the model again",
        ),
        ((pixels(64), GRID), {}, r"\(hidden_states \[128, 96\]\), and is called with .* \(hidden_states \[64, 96\]\)"),
        (
            (pixels(96), torch.tensor([[1, 8, 8], [1, 4, 8]])),
            {},
            r"grid_thw = \[\[1, 8, 8\], \[1, 4, 8\]\]: the segments .* are 64, 32 tokens long by cu_seqlens",
        ),
        ((pixels(), torch.tensor([[2, 7, 8]])), {}, r"transformers computes no tables from grid_thw = \[\[2, 7, 8\]\]"),
        ((pixels(), GRID), {"mask": 1}, "not captured: mask"),
        ((pixels(), GRID), {"return_dict": False}, "return_dict=False: the model was captured with True"),
        ((pixels(), GRID), {"output_hidden_states": True}, "output_hidden_states=True: .* captured with False"),
        ((pixels(), GRID), {"cu_seqlens": torch.tensor([0, 96, 128])}, "segments .* 96, 32 tokens long by cu_seqlens"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    captured: MergedModule, args: Any, kwargs: Any, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured.graph_module, "forward", lambda *inputs: pytest.fail("it ran"))
    with pytest.raises(ShapeError, match=text):
        captured(*args, **kwargs)


def test_what_the_tower_cannot_be_called_with_it_cannot_either(captured: MergedModule) -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'grid_thw'"):
        captured(pixels())
    with pytest.raises(TypeError, match="takes 3 positional arguments but 4 were given"):
        captured(pixels(), GRID, GRID)


def test_sizes_that_cannot_be_captured() -> None:
    model = tower()
    with pytest.raises(CaptureError, match="the segments that attend apart are 64, 32 tokens long by cu_seqlens"):
        apply(model, (pixels(96), torch.tensor([[1, 8, 8], [1, 4, 8]])))
    with pytest.raises(CaptureError, match=r"transformers computes no tables from grid_thw = \[\[2, 7, 8\]\]"):
        apply(model, (pixels(), torch.tensor([[2, 7, 8]])))
    with pytest.raises(CaptureError, match="by cu_window_seqlens"):  # two windows and a half, by two and a half
        apply(tower(windows), (pixels(200), torch.tensor([[2, 10, 10]])))
    shapes = {"hidden_states": {0: torch.export.Dim.AUTO}, "grid_thw": None}
    with pytest.raises(CaptureError, match="leave dynamic_shapes= out, and apply tldr_compile once for each size"):
        apply(model, (pixels(), GRID), dynamic_shapes=shapes)


def test_nothing_is_printed_of_a_graph_that_was_given_up(capfd: pytest.CaptureFixture[str]) -> None:
    apply(tower(), (pixels(), GRID), schedule=())
    assert "torch.ops.aten" not in capfd.readouterr().err


def test_without_the_exporter_it_is_said_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.exporters.exporter_dynamo", None)
    with pytest.raises(CaptureError) as caught:
        apply(tower(), (pixels(), GRID))
    text = str(caught.value)
    for part in (
        "torch.export cannot capture Qwen3VLVisionModel as one graph: GuardOnDataDependentSymNode",
        "transformers 5.23 or newer",
        "tldr-compile[towers]",
        "from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter\n",
        "program = DynamoExporter().export(model, inputs, config=DynamoConfig(dynamic=False)).program",
    ):
        assert part in text
    assert caught.value.__cause__ is not None


def test_where_the_exporter_fails_both_reasons_are_given() -> None:
    class Odd(T.PreTrainedModel):
        config_class = T.PreTrainedConfig

        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(CaptureError, match=r"torch\.export cannot capture Odd") as caught:
        apply(Odd(T.PreTrainedConfig()), (pixels(),))
    assert "transformers' exporter cannot, either: " in str(caught.value)
    assert "DynamoExporter().export(model, inputs" in str(caught.value)


def test_a_compiled_tower_says_how_to_do_it() -> None:
    run = compiled(tower(), schedule=0.2)
    with (
        graphs_for_inductor(),
        pytest.warns(UserWarning, match="a piece of the model merges nothing") as said,
        pytest.raises(tldr_compile.NothingToMerge) as caught,
    ):
        run(pixels(), GRID)
    text = str(caught.value)
    assert "model.model.visual = tldr_compile.apply(model.model.visual, kwargs=inputs, schedule=0.2)" in text
    assert "The vision tower of a language model of transformers is merged ahead of time" in text
    assert len(text.splitlines()) < 16
    pieces = [str(each.message) for each in said if "a piece of the model" in str(each.message)]
    assert len(pieces) <= 2  # one for each reason, of which there are more places


def exported(make: Callable[[], Any], **options: Any) -> torch.export.ExportedProgram:
    inputs = {"hidden_states": pixels(), "grid_thw": GRID}
    return DynamoExporter().export(tower(make), inputs, config=DynamoConfig(**options)).program


@MODELS
def test_a_program_of_the_exporter_is_taken_as_it_is(make: Callable[[], Any]) -> None:
    """The rows are found beside tables of the same rank, and assertions about segments cost nothing."""
    report = explain(exported(make, dynamic=False), schedule=0.3)
    before, after = report.gflops
    assert after < before
    assert {site["layout"] for site in report.sites} == {"packed"}
    assert all(site["status"] in ("merged", "left") for site in report.sites)


def test_a_number_of_frames_may_be_left_open() -> None:
    frames = torch.export.Dim("frames", min=2, max=64)
    tables = ("position_ids", "interp_indices", "interp_weights")
    rows = {name: {0: 64 * frames} for name in ("hidden_states", *tables)}
    dynamic = {**rows, "cu_seqlens": {0: frames + 1}, "grid_thw": None, "max_seqlen": None}
    program = exported(stacked, dynamic=True, dynamic_shapes=dynamic)
    merged = apply(program, schedule=0.3, outputs="merged", return_places=True)
    inputs = {"hidden_states": pixels(5 * 64), "grid_thw": torch.tensor([[5, 8, 8]])}
    precompute_export_inputs(tower(), inputs)
    outputs, kept = merged(**inputs)
    assert len(outputs.pooler_output) == kept.places.numel() == 5 * (kept.places.numel() // 5) < 5 * 16
    merged.verify((), inputs)
