"""Where all tokens of each group are equal wherever they are read, merging changes nothing.

It holds for uniform saliency, proportional attention and pooling by mass. Models without positions, on a video whose
frames repeat and whose patches are of two kinds, have such tokens: equal in, equal after every layer. V-JEPA 2 has
none: it turns queries and keys by their places, which no two tokens share.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import tldr_compile
from tests.laws.support import assert_same, compiled, distance, graphs_for_inductor, tensors
from tests.zoo import CASES, Case
from tldr_compile import MergedModule
from tldr_compile.inspection import Decision, inspect
from tldr_compile.passes.plan.planner import _Walk

PATCH = 8
KINDS = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0, 1], [1, 1, 0, 0, 1, 1, 0, 1, 0]])
"""The kind of every patch of a frame, by sample. At every merge both are among the destinations."""
LAW: dict[str, Any] = {"saliency": "uniform", "proportional": True, "pooling": "mass"}

every_case = pytest.mark.parametrize("case", [case for case in CASES if case.name != "vjepa2"], ids=str)


def without_positions(case: Case) -> nn.Module:
    """The case, its tables of positions and times set to zero."""
    model = case.build()
    tables = [
        value
        for module in model.modules()
        for name, value in {**vars(module), **module._parameters, **module._buffers, **module._modules}.items()
        if any(word in name for word in ("position_embedding", "time_embeddings", "pos_embed"))
    ]
    for table in tables:
        with torch.no_grad():
            (table.weight if isinstance(table, nn.Embedding) else table).zero_()
    assert tables
    return model


def repeating(case: Case) -> Tensor:
    """A video `[2, ...]` with the same frame at all times, made of two patches."""
    patches = torch.randn(2, 3, PATCH, PATCH, generator=torch.Generator().manual_seed(3))
    side = case.image // PATCH
    frame = patches[KINDS].unflatten(1, (side, side)).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, case.image, case.image)
    (like,) = case.inputs()
    if like.ndim == 4:  # the model of an image
        return frame
    return frame.unsqueeze(1 if like.shape[2] == 3 else 2).expand_as(like).contiguous()


def kinds_of_tokens(decision: Decision, side: int) -> Tensor:
    """The kind of every token of a merge, `[2, N]`, from how its run is laid: `t·h·w`, `h·w·t` or `h·w`."""
    laid = KINDS.reshape([2, *(1 if label[0] == "t" else side for label in decision.labels)])
    return laid.expand(2, *decision.grid).flatten(1)


def assert_groups_are_pure(case: Case, merged: MergedModule, video: Tensor) -> None:
    """The premise: no group holds tokens of two kinds."""
    for decision in inspect(merged, video):
        tokens = kinds_of_tokens(decision, case.image // PATCH)
        frames = len(decision.assign) // 2  # a merge per frame groups every frame by itself
        for kind, groups in zip(tokens.repeat_interleave(frames, 0), decision.assign, strict=True):
            assert len(groups.unique()) < len(groups)
            assert all(len(kind[groups == group].unique()) == 1 for group in groups.unique())


@cache
def traced(case: Case) -> tuple[nn.Module, ExportedProgram]:
    model = without_positions(case)
    return model, torch.export.export(model, case.inputs())


def pair(case: Case, **options: Any) -> tuple[Any, Any]:
    """The merged and the dense outputs on a repeating video, and the premise checked."""
    (model, program), video = traced(case), repeating(case)
    merged = tldr_compile.apply(program, schedule=case.schedule, **options)
    assert_groups_are_pure(case, merged, video)
    with torch.no_grad():
        return merged(video), model(video)


@every_case
def test_merging_duplicates_changes_nothing(case: Case) -> None:
    for metric in ("tokens", "keys"):
        assert_same(*pair(case, metric=metric, **LAW))


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("vivit", "timesformer")], ids=str)
def test_nor_in_the_graph_for_inductor(case: Case) -> None:
    model, video = without_positions(case), repeating(case)
    with graphs_for_inductor(), torch.no_grad():
        assert_same(compiled(model, schedule=case.schedule, **LAW)(video), model(video))


# --- the law can fail ---


def off_by(merged: Any, dense: Any) -> float:
    return max(distance(one, two) for one, two in zip(tensors(merged), tensors(dense), strict=True))


@every_case
def test_attention_without_mass_shows(case: Case) -> None:
    assert off_by(*pair(case, **{**LAW, "proportional": False})) > 1e-3


@pytest.mark.parametrize("case", [case for case in CASES if case.name == "videomae"], ids=str)
def test_a_mean_without_mass_shows(case: Case) -> None:
    assert off_by(*pair(case, **{**LAW, "pooling": "plain"})) > 1e-3


# All attention of TimeSformer is restored, and there a token of an unsalient merge weighs one.
@pytest.mark.parametrize("case", [case for case in CASES if case.name not in ("vjepa2", "timesformer")], ids=str)
def test_a_plan_that_forgets_its_sums_shows(case: Case) -> None:
    with mock.patch.object(_Walk, "_weighings", return_value=iter(())):
        assert off_by(*pair(case, **LAW)) > 1e-3
