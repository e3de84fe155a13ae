"""The laws on one generated model; what is raised is the finding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.utils import _pytree as pytree

from tests.generated.model import build
from tests.generated.recipe import Recipe
from tests.laws.independence import Apart
from tldr_compile import MergedModule, TokenMerging, ops, passes
from tldr_compile.api import assemble
from tldr_compile.errors import NothingToMerge, OptionError, ScheduleError
from tldr_compile.passes.capture.canonicalize import from_dynamo, from_export
from tldr_compile.passes.sites import Site

BOUND = 2e-5  # of the largest magnitude, for two graphs that sum in another order


@dataclass(frozen=True)
class Traced:
    """A generated model and its capture, which serves any number of options."""

    recipe: Recipe
    model: nn.Module
    program: ExportedProgram
    analysis: passes.Analysis
    dense: Callable[..., Any]

    @classmethod
    def of(cls, recipe: Recipe) -> Traced:
        model, inputs = build(recipe), recipe.inputs()
        with torch.no_grad():
            program = export(model, inputs, dynamic_shapes=_dynamic(recipe, inputs))
            return cls(recipe, model, program, passes.analyse(from_export(program), TokenMerging()), program.module())

    @cached_property
    def apart(self) -> Apart:
        """What the dense model keeps apart along the batch and what follows it, found once for all options."""
        return Apart.of(self.dense, self.calls[0], dims=(0, 1))

    @property
    def calls(self) -> list[tuple[Tensor, ...]]:
        """Inputs to call it with, the traced ones first."""
        recipe = self.recipe
        return [recipe.inputs(), *([recipe.inputs(recipe.batch + 2)] if recipe.dynamic else [])]


def check(recipe: Recipe, options: dict[str, Any]) -> str:
    """All laws on a recipe. Returns the verdict: merged, partly, or refused with the reason."""
    traced = Traced.of(recipe)
    check_model(traced)
    return check_options(traced, options)


@torch.no_grad()
def check_model(traced: Traced) -> None:
    """What does not rest on options: Zero, and where it applies Duplicates."""
    (inputs, *_) = traced.calls
    zero = assemble(traced.program, traced.analysis, TokenMerging(schedule=()))
    _same(zero(*inputs), traced.dense(*inputs), 0)
    if traced.recipe.duplicable:
        _duplicates(traced.recipe, traced.program, traced.analysis)


@torch.no_grad()
def check_options(traced: Traced, options: dict[str, Any]) -> str:
    """Projection, Restore, Samples, Spellings, and that the fused graph is the traced one; on some recipes Twins."""
    config = TokenMerging.from_options(options)
    try:
        merged = fitted(traced.program, traced.analysis, config)
    except (NothingToMerge, OptionError, ScheduleError) as reason:
        return f"refused: {reason}"
    for each in traced.calls:
        merged.verify(each)
        expected = traced.dense(*each)
        _restored(merged(*each), expected, config.outputs)
        fused = merged._merged.plan.typed.captured.graph(*merged._flat_inputs(each, {}))
        _same(list(fused), _leaves(expected), BOUND)
    sites = merged.report.sites
    if not any(site["layout"] == "packed" and "shared" in site["grouping"] for site in sites):  # which is asked for
        assert not (raised := traced.apart.raised(merged)), f"a dependence is raised: {raised[0]}"
    if traced.recipe.tail == "spelled" and (config.pooling == "mass") == config.proportional:
        for first, *others in merged(*traced.calls[0]):
            for other in others:
                _same(other, first, BOUND, "two spellings are ")
    if traced.recipe.seed == 0 and not traced.recipe.dynamic:
        (inputs,) = traced.calls
        _same(_twin(traced.model, merged._merged.options)(*inputs), merged(*inputs), BOUND)
    return "partly" if any(r["operator"] != "output" for r in merged.report.restorations) else "merged"


def fitted(program: ExportedProgram, analysis: passes.Analysis, config: TokenMerging) -> MergedModule:
    """Merged as the options say, with zeros at the sites that cannot merge."""
    try:
        return assemble(program, analysis, config)
    except ScheduleError:
        sites = analysis.sites
        open_sites = [index for index, site in enumerate(sites) if isinstance(site, Site)]
        if not open_sites:
            raise
        schedule = tuple(2 if index in open_sites else 0 for index in range(len(sites)))
        return assemble(program, analysis, replace(config, schedule=schedule))


def _dynamic(recipe: Recipe, inputs: Sequence[Tensor]) -> Any:
    if not recipe.dynamic:
        return None
    clips = {0: Dim("batch", min=2, max=64)}
    batched = (recipe.beside in ("view", "text")) + (recipe.bias == "padding")
    more = [None] * (recipe.position == "ids") + [clips] * batched
    return (clips, tuple(more)) if more else (clips,)


def _duplicates(recipe: Recipe, program: ExportedProgram, analysis: passes.Analysis) -> None:
    """Tokens that are equal in pairs, merged in pairs, change nothing."""
    inputs = recipe.inputs(duplicates=True)
    config = TokenMerging(schedule=(max(1, recipe.clip_tokens // 2),), saliency="uniform")
    try:
        merged: MergedModule = assemble(program, analysis, config)
    except (NothingToMerge, ScheduleError):
        return
    _same(merged(*inputs), program.module()(*inputs), BOUND)


def _twin(model: nn.Module, config: TokenMerging) -> Any:
    """The model as Dynamo captures it, merged; not compiled further."""

    def backend(gm: fx.GraphModule, examples: list[Tensor]) -> Any:
        return passes.merge(passes.analyse(from_dynamo(gm, examples), config), config, ops).graph

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True)


def _restored(actual: Any, dense: Any, outputs: str) -> None:
    assert pytree.tree_structure(actual) == pytree.tree_structure(dense), "the structure of the outputs changed"
    for one, two in _pairs(actual, dense):
        assert one.dtype == two.dtype, "a dtype changed"
        assert outputs == "merged" or one.shape == two.shape, "a shape changed"
        assert one.isfinite().all(), "not finite"


def _same(actual: Any, expected: Any, bound: float, what: str = "") -> None:
    assert pytree.tree_structure(actual) == pytree.tree_structure(expected), "the structure of the outputs changed"
    for one, two in _pairs(actual, expected):
        assert (one.shape, one.dtype) == (two.shape, two.dtype), "a shape or dtype changed"
        apart = (one - two).abs().max() / two.abs().max().clamp_min(1e-30) if two.numel() else 0
        limit = bound * torch.finfo(two.dtype).eps / torch.finfo(torch.float32).eps
        assert apart <= max(bound, limit) if bound else torch.equal(one, two), f"{what}apart by {float(apart):.1e}"


def _pairs(one: Any, two: Any) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(_leaves(one), _leaves(two), strict=True)


def _leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
