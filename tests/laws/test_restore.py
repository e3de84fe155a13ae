"""Shapes, dtypes, devices and structure of all outputs are those of the original."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

import tldr_compile
from tests.laws.support import every_case, graphs_for_inductor
from tests.zoo import CASES, Case


def look(tree: Any) -> Any:
    """The structure of a result, and of each tensor in it what can be said without its values."""
    leaves, structure = tree_flatten(tree)
    return structure, [
        (leaf.shape, leaf.dtype, leaf.device, leaf.layout) if isinstance(leaf, Tensor) else leaf for leaf in leaves
    ]


def assert_restored(model: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> tldr_compile.MergedModule:
    merged = tldr_compile.apply(model, inputs, **options)
    with torch.no_grad():
        outputs, expected = merged(*inputs), model(*inputs)
    assert type(outputs) is type(expected)
    assert look(outputs) == look(expected)
    assert all(leaf.isfinite().all() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
    return merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@every_case
def test_outputs_look_as_they_did(case: Case, dtype: torch.dtype) -> None:
    inputs = tree_map(lambda x: x.to(dtype), case.inputs())
    assert_restored(case.build().to(dtype), inputs, schedule=case.schedule)


@every_case
def test_compiled_outputs_look_as_they_did(case: Case) -> None:
    model, inputs = case.build(), case.inputs()
    with graphs_for_inductor(), torch.no_grad():
        outputs = torch.compile(model, backend="tldr", options={"schedule": case.schedule})(*inputs)
        expected = model(*inputs)
    assert type(outputs) is type(expected)
    assert look(outputs) == look(expected)


def telling(case: Case, **told: bool) -> nn.Module:
    """A model that returns more: `output_hidden_states`, `output_attentions`, `return_dict`."""
    model = case.build()
    for name, value in told.items():
        setattr(model.config, name, value)
    return model


def of_transformers(*attns: str) -> Any:
    cases = [case for case in CASES if case.name != "umt" and case.attn in attns]
    return pytest.mark.parametrize("case", cases, ids=str)


@of_transformers("sdpa", "eager")
def test_hidden_states_are_restored(case: Case) -> None:
    model = telling(case, output_hidden_states=True)
    merged = assert_restored(model, case.inputs(), schedule=case.schedule, verify=True)
    with torch.no_grad():
        states = merged(*case.inputs()).hidden_states
    assert len({state.shape for state in states}) == 1
    assert len(states) >= 4


@of_transformers("eager")
def test_attentions_are_restored(case: Case) -> None:
    model = telling(case, output_attentions=True)
    merged = assert_restored(model, case.inputs(), schedule=case.schedule, verify=True)
    with torch.no_grad():
        assert len(merged(*case.inputs()).attentions) >= 3


@of_transformers("sdpa", "eager")
def test_tuples_stay_tuples(case: Case) -> None:
    model, plain = case.build(), {"return_dict": False}
    merged = tldr_compile.apply(model, case.inputs(), plain, schedule=case.schedule)
    with torch.no_grad():
        outputs, expected = merged(*case.inputs(), **plain), model(*case.inputs(), **plain)
    assert type(outputs) is tuple
    assert look(outputs) == look(expected)


@every_case
def test_merged_outputs_are_short_only_along_tokens(case: Case) -> None:
    model, inputs = case.build(), case.inputs()
    merged = tldr_compile.apply(model, inputs, schedule=case.schedule, outputs="merged")
    with torch.no_grad():
        (outputs, structure), (expected, same) = tree_flatten(merged(*inputs)), tree_flatten(model(*inputs))
    assert structure == same
    lost = sum(int(entry) for entry in case.schedule)
    shortened = 0
    for short, full in zip(outputs, expected, strict=True):
        assert (short.dtype, short.device, short.ndim) == (full.dtype, full.device, full.ndim)
        differences = [b - a for a, b in zip(short.shape, full.shape, strict=True)]
        assert sorted(differences) in ([0] * full.ndim, [0] * (full.ndim - 1) + [lost])
        shortened += short.shape != full.shape
    assert (shortened > 0) == (case.name in ("umt", "videomae-tokens", "clip"))
