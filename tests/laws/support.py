"""What the laws share: one capture of every case, operators with one thing wrong, and how far two results are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_flatten, tree_leaves

import tldr_compile
from tests.zoo import CASES, FAMILIES, Case, case
from tldr_compile import TokenMerging, ops, passes

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_family = pytest.mark.parametrize("case", [case(name, each.attns[0]) for name, each in FAMILIES.items()], ids=str)


@cache
def program(case: Case, batch: int) -> ExportedProgram:
    """The case as `torch.export` gives it, with its inputs as example inputs."""
    return torch.export.export(case.build(), case.inputs(batch))


@cache
def captured(case: Case, batch: int) -> passes.Captured:
    return passes.from_export(program(case, batch))


def flat_inputs(case: Case, batch: int = 2) -> list[Any]:
    """What the captured graph is called with: parameters, buffers, constants and inputs."""
    exported = program(case, batch)
    tensors, users = {**exported.state_dict, **exported.constants}, iter(case.inputs(batch))
    return [
        next(users) if spec.target is None else tensors[spec.target] for spec in exported.graph_signature.input_specs
    ]


def merge(case: Case, batch: int = 2, operators: ModuleType = ops, **options: Any) -> passes.Merged:
    """The case with its own schedule, if the options give none."""
    config = TokenMerging(**{"schedule": case.schedule, **options})
    return passes.merge(passes.analyse(captured(case, batch), config), config, operators)


def check(case: Case, batch: int = 2, operators: ModuleType = ops, **options: Any) -> passes.Merged:
    """Law 2 on a case and its inputs. Raises `VerificationError`."""
    merged = merge(case, batch, operators, **options)
    passes.verify(merged, flat_inputs(case, batch))
    return merged


def everywhere(fraction: float, model: Any, args: tuple[Any, ...] = (), **options: Any) -> list[float]:
    """A schedule that somebody wrote down, so that it need not pay: a fraction at every site that can merge."""
    sites = tldr_compile.explain(model, args, schedule=(), **options).sites
    return [0 if site["status"] == "refused" else fraction for site in sites]


def but(**changed: Callable[..., Any]) -> ModuleType:
    """The operators, with some of them replaced."""
    module = ModuleType("but")
    module.__dict__.update({name: getattr(ops, name) for name in ops.__all__}, **changed)
    return module


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="tldr", options=options)


def assert_same(actual: Any, expected: Any, bound: float = 1e-5) -> None:
    """Equal structure, shapes, dtypes and devices; equal values to `bound` of the largest magnitude."""
    (leaves, structure), (wanted, wanted_structure) = tree_flatten(actual), tree_flatten(expected)
    assert structure == wanted_structure
    for number, (one, two) in enumerate(zip(leaves, wanted, strict=True)):
        if not isinstance(two, Tensor):
            assert one == two
            continue
        assert (one.shape, one.dtype, one.device) == (two.shape, two.dtype, two.device)
        error = distance(one, two)
        assert error <= bound, f"output {number} is off by {error:.2e} of the largest magnitude"


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def distance(one: Tensor, two: Tensor) -> float:
    """The largest difference, as a part of the largest magnitude."""
    return float((one - two).abs().max() / two.abs().max())


@contextmanager
def graphs_for_inductor() -> Iterator[list[fx.GraphModule]]:
    """Inductor replaced by an interpreter; yields the list of the graphs that reach it."""
    graphs: list[fx.GraphModule] = []

    def compile_fx(graph: fx.GraphModule, inputs: Any, **_: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    with mock.patch("torch._inductor.compile_fx.compile_fx", compile_fx):
        yield graphs
