"""The laws on one generated model; what is raised is the finding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import tldr_compile
from tests.generated.model import Recipe
from tldr_compile.errors import NothingToMerge, OptionError


def check(recipe: Recipe, options: dict[str, Any]) -> str:
    """Zero, Projection, Restore and Twins. Returns the verdict: merged, partly, or refused.

    A refusal is one of a kind that the recipe explains; any other error is a finding.
    """
    model, inputs = recipe.build(), recipe.inputs()
    with torch.no_grad():
        program = torch.export.export(model, inputs)
        expected = program.module()(*inputs)
        zero = tldr_compile.apply(program, schedule=[0])(*inputs)
        _same_structure(zero, expected)
        for one, two in zip(_leaves(zero), _leaves(expected), strict=True):
            assert torch.equal(one, two), "a schedule of zeros changed the numbers"
        try:
            merged = tldr_compile.apply(program, **{**options, "schedule": _fitting(options, program)}, verify=True)
        except (NothingToMerge, OptionError) as reason:
            return f"refused: {reason}"
        result = merged(*inputs)
        twin = tldr_compile.apply(model, inputs, **{**options, "schedule": _fitting(options, program)})(*inputs)
    _same_structure(result, expected)
    for one, two, full in zip(_leaves(result), _leaves(twin), _leaves(expected), strict=True):
        assert torch.equal(one, two), "the module and its export gave different numbers"
        assert one.dtype == full.dtype
        assert options["outputs"] == "merged" or one.shape == full.shape
        assert one.isfinite().all()
    return "partly" if any(r["operator"] != "output" for r in merged.report.restorations) else "merged"


def _fitting(options: dict[str, Any], program: torch.export.ExportedProgram) -> list[int | float]:
    """The schedule, cut to the sites that there are."""
    sites = tldr_compile.explain(program, schedule=[0]).to_dict()["sites"]
    return list(options["schedule"])[: len(sites)] or [1]


def _leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _same_structure(one: Any, two: Any) -> None:
    assert pytree.tree_structure(one) == pytree.tree_structure(two), "the structure of the outputs changed"
