"""Shapes, dtypes, devices and structure of all outputs are those of the original.

`apply` against the model; that the backend's outputs are those of `apply` is a law of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import tldr_compile
from tests.laws.support import every_case, every_family, program, tensors
from tests.zoo import FAMILIES, Attn, Case, case


def look(tree: Any) -> Any:
    """The structure of a result, and of each tensor in it what can be said without its values."""
    leaves, structure = tree_flatten(tree)
    return structure, [
        (leaf.shape, leaf.dtype, leaf.device, leaf.layout) if isinstance(leaf, Tensor) else leaf for leaf in leaves
    ]


def assert_restored(model: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> Any:
    """Returns the outputs of the merged model."""
    merged = tldr_compile.apply(model, inputs, **options)
    with torch.no_grad():
        outputs, expected = merged(*inputs), model(*inputs)
    assert type(outputs) is type(expected)
    assert look(outputs) == look(expected)
    assert all(leaf.isfinite().all() for leaf in tensors(outputs))
    return outputs


@every_case
def test_outputs_look_as_they_did(case: Case) -> None:
    assert_restored(case.build(), case.inputs(), schedule=case.schedule)


@every_family
def test_outputs_keep_the_precision_of_the_model(case: Case) -> None:
    (video,) = case.inputs()
    assert_restored(case.build().bfloat16(), (video.bfloat16(),), schedule=case.schedule)


def telling(case: Case, **told: bool) -> nn.Module:
    """A model that returns more: `output_hidden_states`, `output_attentions`, `return_dict`."""
    model = case.build()
    for name, value in told.items():
        setattr(model.config, name, value)
    return model


def of_transformers(attn: Attn) -> pytest.MarkDecorator:
    """The models of transformers, with this attention where they have it."""
    cases = [case(name, attn if attn in each.attns else each.attns[0]) for name, each in FAMILIES.items()]
    return pytest.mark.parametrize("case", [case for case in cases if case.name != "umt"], ids=str)


@of_transformers("sdpa")
def test_hidden_states_are_restored(case: Case) -> None:
    model = telling(case, output_hidden_states=True)
    states = assert_restored(model, case.inputs(), schedule=case.schedule, verify=True).hidden_states
    assert len({state.shape for state in states}) == 1
    assert len(states) >= 4


@of_transformers("eager")
def test_attentions_are_restored(case: Case) -> None:
    model = telling(case, output_attentions=True)
    outputs = assert_restored(model, case.inputs(), schedule=case.schedule, verify=True)
    assert len(outputs.attentions) >= 3


@of_transformers("sdpa")
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
    merged = tldr_compile.apply(program(case, 2), schedule=case.schedule, outputs="merged")
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


@of_transformers("eager")
def test_states_leave_at_one_length_and_probabilities_at_their_own(case: Case) -> None:
    """A row of probabilities is of the tokens that it was of: it is not merged later on."""
    model = telling(case, output_attentions=True, output_hidden_states=True)
    schedule = [*case.schedule, 2] if len(case.schedule) == 1 else case.schedule
    merged = tldr_compile.apply(model, case.inputs(), schedule=schedule, outputs="merged", verify=True)
    with torch.no_grad():
        outputs, expected = merged(*case.inputs()), model(*case.inputs())
    assert len({state.shape for state in outputs.hidden_states}) == 1
    assert outputs.hidden_states[0].shape != expected.hidden_states[0].shape
    assert outputs.attentions[0].shape == expected.attentions[0].shape
    lengths = [each.shape[-1] for each in outputs.attentions]
    assert lengths == sorted(lengths, reverse=True)
    for each in outputs.attentions:
        assert torch.allclose(each.sum(-1), torch.ones(()), atol=1e-5)
