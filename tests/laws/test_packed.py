"""Frames packed in one row of tokens, as towers of language models have them, are held to the laws.

Blocks of 4 that a merger joins; windows by an index that comes in, put back in order at the end; pictures that are each
embedded whole. The dense model is the judge wherever it can be.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.export import Dim, ExportedProgram, export

import tldr_compile
from tests.laws.accounting import unaccounted
from tests.laws.grouped import MODELS as GROUPED
from tests.laws.independence import Apart
from tests.laws.support import graphs_for_inductor
from tldr_compile import Kept, MergedModule, NothingToMerge, OptionError, passes
from tldr_compile.passes.plan import choice

WIDTH, HEADS, FRAMES, BLOCKS, WINDOWS = 8, 2, 4, 16, 4
TOKENS = FRAMES * BLOCKS * 4
EQUALS: dict[str, Any] = {"saliency": "uniform"}
pytestmark = pytest.mark.filterwarnings("ignore:tldr. the merged graph costs")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        wide = nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), *wide)

    def forward(self, x: Tensor, segments: int) -> Tensor:
        """`x` `[N, C]`; tokens attend within their segment."""
        length = x.shape[0]
        q, k, v = self.qkv(self.norm(x)).reshape(length, 3, HEADS, -1).transpose(0, 1).unbind(0)
        q, k, v = (each.unflatten(0, (segments, length // segments)).transpose(1, 2) for each in (q, k, v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(length, -1))
        return x + self.mlp(x)


class Tower(nn.Module):
    """`rows [N, 12]` -> the tokens, an early and a late feature for every block of 4."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(12, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.merger = nn.Linear(4 * WIDTH, 6)

    def features(self, x: Tensor) -> Tensor:
        return self.merger(x.reshape(-1, 4 * WIDTH))


class Frames(Tower):
    def forward(self, rows: Tensor, bounds: Tensor) -> dict[str, Tensor]:
        x, segments = self.embed(rows), bounds.shape[0] - 1
        first, *rest = self.blocks
        x = first(x, segments)
        early = self.features(x)
        for block in rest:
            x = block(x, segments)
        return {"tokens": x, "early": early, "late": self.features(x)}


class Windows(Tower):
    """All but the second block attend within windows."""

    def forward(self, rows: Tensor, order: Tensor) -> dict[str, Tensor]:
        x = self.embed(rows).reshape(-1, 4, WIDTH)[order].reshape(-1, WIDTH)
        for number, block in enumerate(self.blocks):
            x = block(x, FRAMES if number == 1 else FRAMES * WINDOWS)
        return {"late": self.features(x)[torch.argsort(order)]}


class Pictures(Tower):
    """`rows [N, 3, 2, 2]`, each embedded whole."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 2, 2)

    def forward(self, rows: Tensor) -> Tensor:
        x = self.patch(rows.reshape(-1, 3, 2, 2)).flatten(1)
        for block in self.blocks:
            x = block(x, FRAMES)
        return x


def drawn(tokens: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randn(tokens, 12, generator=torch.Generator().manual_seed(seed))


def order() -> Tensor:
    """Frame by frame, the blocks of each in windows."""
    frame = torch.arange(BLOCKS).reshape(2, 2, 2, 2).transpose(1, 2).flatten()
    return torch.cat([frame + at * BLOCKS for at in range(FRAMES)])


BOUNDS = torch.arange(FRAMES + 1) * BLOCKS * 4
MODELS: dict[str, tuple[type[nn.Module], tuple[Tensor, ...]]] = {
    "frames": (Frames, (drawn(), BOUNDS)),
    "windows": (Windows, (drawn(), order())),
    "pictures": (Pictures, (drawn().reshape(-1, 3, 2, 2),)),
}


@cache
def program(name: str) -> ExportedProgram:
    model, inputs = MODELS[name]
    return export(model().eval(), inputs)


@cache
def merged(name: str, outputs: str = "restore", **options: Any) -> MergedModule:
    return tldr_compile.apply(program(name), schedule=0.3, outputs=outputs, **options)


every_model = pytest.mark.parametrize("name", MODELS)


@every_model
@pytest.mark.parametrize("outputs", ["restore", "merged"])
def test_every_site_merges_and_means_what_it_says(name: str, outputs: str) -> None:
    _, inputs = MODELS[name]
    found = merged(name, outputs)
    statuses = [site["status"] for site in found.report.sites]
    assert statuses[::2] == ["merged"] * 2
    assert statuses[1] in ("merged", "left")  # where few blocks round to nothing, the next site makes up for it
    assert {site["layout"] for site in found.report.sites} == {"packed"}
    assert unaccounted(found) == []
    found.verify(inputs)
    others = (drawn(seed=1).reshape(inputs[0].shape), *inputs[1:])
    found.verify(others)


@every_model
def test_frames_stay_apart(name: str) -> None:
    """Bit for bit, as in the dense model; and they are compared."""
    dense, inputs = program(name).module(), MODELS[name][1]
    apart = Apart.of(dense, inputs, dims=(0,))
    assert apart.compared
    assert apart.raised(merged(name)) == []


@pytest.mark.parametrize("name", ["frames", "windows"])
@pytest.mark.parametrize("outputs", ["restore", "merged"])
def test_equal_blocks_merge_without_a_trace(name: str, outputs: str) -> None:
    """Every block has an equal one beside it: the dense model's numbers, at the places that are left."""
    _, (rows, *tables) = MODELS[name]
    blocks = rows.reshape(FRAMES, WINDOWS, -1, *rows.shape[1:])
    half = blocks[:, :, : blocks.shape[2] // 2]
    rows = torch.stack([half, half], 2).reshape(FRAMES, WINDOWS, 2, -1, 4, *rows.shape[1:])
    rows = rows.transpose(2, 3).reshape(-1, *rows.shape[5:])
    if name == "windows":  # the halves of a window are equal, wherever they lie
        rows = rows.reshape(-1, 4, 12)[torch.argsort(tables[0])].reshape(-1, 12)
    places = {"outputs": outputs, "return_places": outputs == "merged"}
    found = tldr_compile.apply(program(name), schedule=[0.25, 0, 0], grouping="blocks", **places, **EQUALS)
    with torch.no_grad():
        dense, actual = program(name).module()(rows, *tables), found(rows, *tables)
    actual, kept = actual if outputs == "merged" else (actual, None)
    assert actual.keys() == dense.keys()
    for key, full in dense.items():
        expected = full if kept is None else _at(full, kept, key)
        assert torch.allclose(actual[key], expected, atol=1e-5), key


def _at(full: Tensor, kept: Kept, key: str) -> Tensor:
    """Blocks at their places; tokens four by four."""
    blocks = full.reshape(FRAMES * BLOCKS, -1)[kept.places[0]]
    return blocks.reshape(-1, full.shape[1]) if key == "tokens" else blocks


def test_equal_pictures_merge_without_a_trace() -> None:
    """Every picture has an equal one beside it."""
    rows = drawn(TOKENS // 2).reshape(-1, 3, 2, 2).repeat_interleave(2, 0)
    options = {"schedule": [0.25, 0, 0], **EQUALS}
    with torch.no_grad():
        dense = program("pictures").module()(rows)
        restored = tldr_compile.apply(program("pictures"), **options)(rows)
        short, kept = tldr_compile.apply(program("pictures"), outputs="merged", return_places=True, **options)(rows)
    assert len(short) == 0.75 * TOKENS
    assert torch.allclose(restored, dense, atol=1e-5)
    assert torch.allclose(short, dense[kept.places[0]], atol=1e-5)


@pytest.mark.parametrize("name", ["frames", "windows"])
def test_what_leaves_is_sorted_and_of_one_length(name: str) -> None:
    _, inputs = MODELS[name]
    found = merged(name, "merged", return_places=True, grouping="blocks")
    with torch.no_grad():
        outputs, kept = found(*inputs)
        restored = merged(name, grouping="blocks")(*inputs)
    places = kept.places[0]
    assert kept.places.shape == kept.weights.shape == (1, found.tokens_out)
    assert bool((places.diff() > 0).all())
    assert torch.equal((places // BLOCKS).bincount(), torch.full((FRAMES,), int(found.tokens_out) // FRAMES))
    assert {len(each) for key, each in outputs.items() if key != "tokens"} == {found.tokens_out}
    assert torch.allclose(outputs["late"], restored["late"][places], atol=1e-5)


def test_an_earlier_output_is_merged_to_the_length_of_the_last() -> None:
    """Uniform saliency: a block that leaves is the mean of what it stands for, of the early features too."""
    _, inputs = MODELS["frames"]
    found = tldr_compile.apply(
        program("frames"), schedule=[0, 0, 0.3], grouping="blocks", outputs="merged", return_places=True, **EQUALS
    )
    with torch.no_grad():
        outputs, kept = found(*inputs)
        dense = program("frames").module()(*inputs)
    total = (outputs["early"] * kept.weights[0, :, None]).sum(0)
    assert torch.allclose(total, dense["early"].sum(0), atol=1e-4)
    assert kept.weights.sum() == FRAMES * BLOCKS


def test_the_numbers_of_what_is_left_put_it_back_in_order() -> None:
    """Another order that comes in: the same program, and its own places."""
    rows, other = drawn(), torch.cat([torch.randperm(BLOCKS) + at * BLOCKS for at in range(FRAMES)])
    found = merged("windows", "merged", return_places=True)
    found.verify((rows, other))
    with torch.no_grad():
        _, kept = found(rows, other)
    assert bool((kept.places[0].diff() > 0).all())


def test_what_is_sorted_downwards_is_not_put_back() -> None:
    """No order of the places: it leaves at full length."""

    class Downwards(Windows):
        def forward(self, rows: Tensor, order: Tensor) -> dict[str, Tensor]:
            return {"late": super().forward(rows, order)["late"][torch.argsort(order, descending=True)]}

    found = tldr_compile.apply(Downwards().eval(), (drawn(), order()), schedule=0.3, outputs="merged", verify=True)
    with torch.no_grad():
        assert found(drawn(), order())["late"].shape == (FRAMES * BLOCKS, 6)


def test_entries_in_another_order_lie_along_another_axis() -> None:
    analysis = passes.analyse(passes.from_export(program("windows")), tldr_compile.TokenMerging())
    typed = analysis.typed
    (sort,) = (node for node in typed.values if "argsort" in str(node.target))
    (axis,) = typed.value(sort).axes
    (key,) = typed.value(sort.args[0]).axes
    assert axis.size == key.size
    assert not axis.atoms & key.atoms


def test_who_asks_for_short_outputs_gets_them_at_any_price(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.cost, "of", lambda plan: len(plan.leaving))
    found = tldr_compile.explain(program("frames"), schedule=[0.3, 0, 0], outputs="merged")
    assert len(found.plan.leaving) == 3


def test_a_number_of_frames_may_be_left_open() -> None:
    frames = Dim("frames", min=2, max=64)
    dynamic = {"rows": {0: BLOCKS * 4 * frames}, "bounds": {0: frames + 1}}
    exported = export(Frames().eval(), (drawn(), BOUNDS), dynamic_shapes=dynamic)
    found = tldr_compile.apply(exported, schedule=0.3, outputs="merged", return_places=True)
    inputs = drawn(5 * BLOCKS * 4), torch.arange(6) * BLOCKS * 4
    found.verify(inputs)
    with torch.no_grad():
        outputs, kept = found(*inputs)
    (symbol,) = found.tokens_out.free_symbols
    assert kept.places.shape[1] == len(outputs["late"]) == found.tokens_out.subs(symbol, 5)


# --- which tokens are left, of other models ---


class Samples(nn.Module):
    """`[b, 3, t, H, W]` -> the tokens of every sample, with a class token or without."""

    def __init__(self, lead: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv3d(3, WIDTH, (1, 2, 2), (1, 2, 2))
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH)) if lead else None
        self.block = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, 0.0, batch_first=True, norm_first=True)

    def forward(self, video: Tensor) -> Tensor:
        x = self.stem(video).flatten(2).mT
        x = x if self.cls is None else torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        return self.block(x)


@pytest.mark.parametrize("lead", [False, True])
def test_places_are_told_of_every_sample_without_protected_tokens(lead: bool) -> None:
    video = torch.randn(2, 3, 2, 8, 8)
    model = Samples(lead).eval()
    found = tldr_compile.apply(model, (video,), schedule=[6], outputs="merged", return_places=True)
    assert found.tokens_out == 26
    with torch.no_grad():
        tokens, kept = found(video)
        restored = tldr_compile.apply(model, (video,), schedule=[6])(video)
    assert tokens.shape[1] == 26 + lead
    assert kept.places.shape == (2, 26)
    for short, full, places in zip(tokens, restored, kept.places, strict=True):
        assert torch.equal(short[lead:], full[lead:][places])


def test_nothing_merged_leaves_everything() -> None:
    video = torch.randn(2, 3, 2, 8, 8)
    model = Samples(False).eval()
    found = tldr_compile.apply(model, (video,), schedule=(), outputs="merged", return_places=True)
    with torch.no_grad():
        tokens, kept = found(video)
        assert torch.allclose(tokens, model(video), atol=1e-6)
    assert kept is None


def test_places_need_outputs_that_leave_merged() -> None:
    model, video = Samples(False).eval(), torch.randn(2, 3, 2, 8, 8)
    with pytest.raises(OptionError, match=r"needs outputs='merged'"):
        tldr_compile.apply(model, (video,), schedule=[6], return_places=True)
    with pytest.raises(OptionError, match="no output leaves merged"):
        _ = tldr_compile.apply(model, (video,), schedule=[6]).tokens_out
    with pytest.raises(BackendCompilerFailed, match=r"use tldr_compile\.apply"):
        torch.compile(model, backend="tldr", options={"outputs": "merged", "return_places": True})(video)


def test_attention_over_whole_frames_is_no_row_of_patches() -> None:
    """Frames that a network has looked at, place by place, are frames still: time alone is not merged."""

    class Looked(Pictures):
        def forward(self, rows: Tensor) -> Tensor:
            x = self.patch(rows).mean((2, 3))
            for block in self.blocks:
                x = block(x, FRAMES)
            return x

    with pytest.raises(NothingToMerge, match="temporal"):
        tldr_compile.apply(Looked().eval(), (torch.randn(12, 3, 8, 8),), schedule=0.3)


def test_frames_of_a_row_share_a_grouping_where_that_is_asked_for() -> None:
    """And nowhere else: the groups of a frame then depend on the others."""
    found = tldr_compile.apply(
        program("frames"), schedule=[0.25, 0, 0], grouping="shared", outputs="merged", return_places=True, verify=True
    )
    assert all("shared" in site["grouping"] for site in found.report.sites)
    with torch.no_grad():
        outputs, kept = found(*MODELS["frames"][1])
    places = kept.places[0].reshape(FRAMES, -1)
    assert len(outputs["late"]) == found.tokens_out == kept.places.numel() == kept.weights.numel()
    first, *others = places % BLOCKS
    assert all(torch.equal(first, each) for each in others)
    assert torch.equal(places // BLOCKS, torch.arange(FRAMES)[:, None].expand_as(places))


def test_places_are_told_of_all_frames_that_share_a_grouping() -> None:
    model = GROUPED["divided: whole blocks, a video leaves"]
    video = model.noise().float()
    options = {"schedule": 0.3, "grouping": "shared"}
    dense = model.build(torch.float32)
    found = tldr_compile.apply(dense, (video,), outputs="merged", return_places=True, **options)
    with torch.no_grad():
        _, kept = found(video)
    assert kept.places.shape == (len(video), found.tokens_out)
    assert bool((kept.places.diff() > 0).all())


def test_an_output_that_stays_long_says_so() -> None:
    """Entries that are no whole blocks: tokens merge one by one, and the merger needs all of them."""
    with pytest.warns(UserWarning, match=r"output linear\S* .* does not leave merged: aten.linear"):
        found = tldr_compile.apply(program("frames"), schedule=[0, 0, 6], outputs="merged")
    with torch.no_grad():
        outputs = found(*MODELS["frames"][1])
    assert len(outputs["late"]) == FRAMES * BLOCKS
    assert len(outputs["tokens"]) == TOKENS - 6 * FRAMES


def test_what_is_merged_already_is_compiled_as_it_is() -> None:
    found, inputs = merged("frames"), MODELS["frames"][1]
    torch._dynamo.reset()
    with graphs_for_inductor(), pytest.warns(UserWarning, match="merged already"), torch.no_grad():
        actual = torch.compile(found, backend="tldr", options={"schedule": 0.2})(*inputs)
    torch.testing.assert_close(actual, found(*inputs), rtol=0, atol=0)


# --- what has no places, or other ones ---


def test_an_order_of_fewer_than_all_dimensions_puts_nothing_back() -> None:
    """Blocks in order, tokens merged one by one: there is no key for each group, and the output has its length back."""

    class Apart(Windows):
        def forward(self, rows: Tensor, order: Tensor) -> dict[str, Tensor]:
            x = self.embed(rows).reshape(-1, 4, WIDTH)[order].reshape(-1, WIDTH)
            for block in self.blocks:
                x = block(x, FRAMES)
            return {"late": x.reshape(-1, 4, WIDTH)[torch.argsort(order)]}

    found = tldr_compile.apply(Apart().eval(), (drawn(), order()), schedule=[4], outputs="merged", verify=True)
    with torch.no_grad():
        assert found(drawn(), order())["late"].shape == (FRAMES * BLOCKS, 4, WIDTH)
    with pytest.raises(OptionError, match=r"no output leaves merged: aten.index.Tensor .*test_packed.py"):
        _ = found.tokens_out


class Timed(Tower):
    """Tokens in the order of times that come in."""

    def forward(self, rows: Tensor, times: Tensor) -> Tensor:
        x = self.embed(rows)
        for block in self.blocks:
            x = block(x, FRAMES)
        return x[torch.argsort(times)]


@pytest.mark.parametrize("scale", [10, -3])
def test_places_are_ranks_whatever_puts_tokens_in_order(scale: int) -> None:
    times = torch.arange(TOKENS) * scale + 5
    options = {"schedule": [8], "outputs": "merged", "return_places": True, "verify": True}
    found = tldr_compile.apply(Timed().eval(), (drawn(), times), **options)
    restored = tldr_compile.apply(Timed().eval(), (drawn(), times), schedule=[8])
    with torch.no_grad():
        tokens, kept = found(drawn(), times)
        full = restored(drawn(), times)
    assert kept.places.dtype == torch.int64
    assert bool((kept.places.diff() > 0).all())
    assert torch.allclose(tokens, full[kept.places[0]], atol=1e-6)


def test_a_row_of_which_only_a_part_is_grouped_has_no_places() -> None:
    class Part(Tower):
        def forward(self, rows: Tensor) -> Tensor:
            x = self.embed(rows)
            first, second = x.split(TOKENS // 2)
            return torch.cat([self.blocks[0](first, 1), self.blocks[1](second * 2, 2)])

    found = tldr_compile.apply(Part().eval(), (drawn(),), schedule=[4], outputs="merged")
    with pytest.raises(OptionError, match=r"leaves merged, and only a part of its row|grouped differently"):
        _ = found.tokens_out


def test_a_stream_that_holds_its_tokens_twice_is_not_merged() -> None:
    class Swapped(Tower):
        def forward(self, rows: Tensor) -> Tensor:
            x = self.embed(rows)
            for block in self.blocks:
                halves = block.qkv(x).reshape(TOKENS, 3, HEADS, -1).permute(1, 2, 0, 3).chunk(2, 2)
                one, two = (F.scaled_dot_product_attention(*half.unsqueeze(1).unbind()) for half in halves)
                x = x + torch.cat([two, one], 2)[0].transpose(0, 1).reshape(TOKENS, -1)
            return x

    with pytest.raises(NothingToMerge, match="more than once"):
        tldr_compile.apply(Swapped().eval(), (drawn(),), schedule=0.2)


def test_all_of_a_dimension_of_time_are_frames_however_they_are_embedded() -> None:
    class Whole(Pictures):
        def forward(self, rows: Tensor) -> Tensor:
            x = self.patch(rows.flatten(0, 1)).flatten(1)
            for block in self.blocks:
                x = block(x, rows.shape[0])
            return x

    with pytest.raises(NothingToMerge, match="temporal"):
        tldr_compile.apply(Whole().eval(), (torch.randn(2, 12, 3, 2, 2),), schedule=0.3)


def test_a_program_that_tells_places_can_be_saved(tmp_path: Any) -> None:
    found = merged("frames", "merged", return_places=True)
    program = export(found, MODELS["frames"][1])
    torch.export.save(program, tmp_path / "merged.pt2")
    loaded = torch.export.load(tmp_path / "merged.pt2").module()
    with torch.no_grad():
        (_, one), (_, two) = found(*MODELS["frames"][1]), loaded(*MODELS["frames"][1])
    assert torch.equal(one.places, two.places)
