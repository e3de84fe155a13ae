"""Check a rewritten graph against the meaning of its plan, on real inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from tldr_compile.passes.axes import Role
from tldr_compile.passes.capture import SDPA
from tldr_compile.passes.check.independence import raised, runs
from tldr_compile.passes.check.projection import Projection, full_length
from tldr_compile.passes.errors import OptionError, VerificationError
from tldr_compile.passes.fx_utils import Alike, call_key, named, operands
from tldr_compile.passes.options import Policy
from tldr_compile.passes.plan import Plan
from tldr_compile.passes.sizes import is_open, size


def agreement(graph: fx.Graph) -> float:
    """How far two results may be apart, as a part of the largest magnitude: the rounding of some layers' sums.

    What counts is the coarsest dtype on the way, not that of the result; saliency and weights are float32 at best.
    """
    traced = [node.meta["val"].dtype for node in graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    dtypes = {torch.float32, *traced}
    return 128 * max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)


def verify(
    plan: Plan, graph: fx.GraphModule, groupings: Mapping[int, fx.Node], policy: Policy, inputs: Sequence[Any]
) -> None:
    """Compare a rewritten graph with the projection, output by output, with the same groupings; and see that nothing
    depends on what it did not depend on, and that saliencies are weights.

    Raises:
        VerificationError: an output differs or moves, naming which and by how much.
        OptionError: an output differs, and the model draws at random for tokens that the merged graph has not.
    """
    with torch.random.fork_rng(), torch.no_grad():  # what the model draws at random, both draw alike
        actual, found = record(graph, groupings, inputs)
    _sane(plan, found, policy)
    _independent(plan, graph, inputs)
    meaning = Projection(plan, full_length(plan, found), policy)
    with torch.random.fork_rng(), torch.no_grad():
        expected = meaning.run(*inputs)
    old = plan.typed.captured.graph.graph
    (output,) = old.find_nodes(op="output")
    results = _tensors(expected)
    pairs = zip(plan.typed.operands(output), _tensors(actual)[: len(results)], results, strict=True)
    for number, (node, one, two) in enumerate(pairs):
        try:
            _compare(f"output {number} ({node.name})", one, two, agreement(old))
        except VerificationError as difference:
            if (random := _draws_after_merge(plan)) is None:
                raise
            raise OptionError(
                f"verify=True cannot compare: {random.target} ({random.name}) draws at random for every token after a "
                "merge, and a merged graph has other tokens. Call model.eval() first."
            ) from difference


def _sane(plan: Plan, found: Mapping[int, Mapping[str, Tensor]], policy: Policy) -> None:
    """A saliency is a number for every token, and none is below 0."""
    for merge in plan.merges:
        saliency = found[merge.target.index].get("saliency")
        if saliency is not None and not bool((saliency.isfinite() & (saliency >= 0)).all()):
            raise VerificationError(
                f"saliency={policy.saliency!r} gives {merge.site.name} numbers that are not finite or below 0; "
                "ops.saliency makes weights of numbers of any scale"
            )


def _independent(plan: Plan, graph: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Law Samples, as far as the inputs tell; frames of a packed row share a grouping only where a user asks for it."""
    if any(atom.role is Role.TOKEN for merge in plan.merges for atom in merge.grouping.shared.atoms):
        return
    dense = plan.typed.captured.graph
    on_cpu = all(value.device.type == "cpu" for value in inputs if isinstance(value, Tensor))
    bound = 0.0 if on_cpu else agreement(dense.graph)
    for each in raised(plan.typed, runs(dense), runs(graph), inputs, bound):
        raise VerificationError(f"{each}: a merge mixes what the model keeps apart; please report the model")


def _draws_after_merge(plan: Plan) -> fx.Node | None:
    for node, step in plan.steps.items():
        tags = getattr(node.target, "tags", ())
        if step.held and torch.Tag.nondeterministic_seeded in tags:
            given = named(node)
            draws = given.get("dropout_p", 0.0) != 0.0 if node.target is SDPA else given.get("train", True)
            if draws:
                return node
    return None


def record(
    graph: fx.GraphModule, groupings: Mapping[int, fx.Node], inputs: Sequence[Any]
) -> tuple[Any, dict[int, dict[str, Tensor]]]:
    """Run a rewritten graph: its outputs, and for each resolution the grouping by field, with the saliency if any."""
    recorder = _Recorder(graph, groupings)
    return recorder.run(*inputs), recorder.found


class _Recorder(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, groupings: Mapping[int, fx.Node]) -> None:
        super().__init__(graph)
        self.names = {node.name: index for index, node in groupings.items()}
        self.found: dict[int, dict[str, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.names:
            fields = dict(result._asdict())
            if isinstance(saliency := n.args[1], fx.Node):
                fields["saliency"] = self.env[saliency]
            self.found[self.names[n.name]] = {field: value.cpu() for field, value in fields.items()}
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(tree) if isinstance(each, Tensor)]


def _compare(name: str, actual: Tensor, expected: Tensor, bound: float) -> None:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise VerificationError(
            f"{name} is {actual.dtype} {tuple(actual.shape)}, but its meaning {expected.dtype} {tuple(expected.shape)}"
        )
    if not actual.is_floating_point():
        if not torch.equal(actual, expected):
            raise VerificationError(f"{name} differs from its meaning in {int((actual != expected).sum())} entries")
        return
    finite = expected.isfinite()
    largest = float(expected[finite].abs().max()) if finite.any() else 0.0
    error = float((actual - expected)[finite].abs().max()) if finite.any() else 0.0
    same = torch.allclose(actual[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True)
    if not error <= bound * max(largest, bound) or not same:  # what cancels to nothing leaves its rounding
        raise VerificationError(
            f"{name} differs from its meaning by {error:.3g} where the largest magnitude is {largest:.3g}: a rule of "
            "the table or the rewriter is wrong. Without verify=True the graph runs all the same; please report "
            "the model."
        )


def _follows_from_data(length: int | torch.SymInt) -> bool:
    """A length that only running tells: every tracing gives it another name."""
    return isinstance(length, torch.SymInt) and bool(free_unbacked_symbols(length))


class _Shapes(fx.Interpreter):
    """Runs a graph whose sizes are known on traced values, and a call once on operands of one kind.

    Open sizes would be taken for one another: a traced tensor keeps the size of its `nonzero`.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.alike = Alike()
        self.found: dict[Any, tuple[Any, Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        arguments = self.fetch_args_kwargs_from_env(n)
        key = (n.op, n.target, call_key(arguments, id))
        if key not in self.found:
            result = pytree.tree_map_only(Tensor, self.alike, super().run_node(n))
            self.found[key] = arguments, result  # what lives keeps its id
        return self.found[key][1]


def check_shapes(before: fx.GraphModule, after: fx.GraphModule, *, restored: bool) -> None:
    """Run a rewritten graph on its traced values: it is well formed, and its outputs have the shapes they had.

    Raises:
        VerificationError: the graph does not run, or an output has another dtype, or another shape though `restored`.
    """
    after.graph.lint()
    values = [node.meta["val"] for node in after.graph.find_nodes(op="placeholder")]
    mode = detect_fake_mode(values)
    # Sizes that follow from data get names once more, which nobody has to find in a graph.
    symbols = mode.shape_env.ignore_fresh_unbacked_symbols() if mode and mode.shape_env else nullcontext()
    # Without Python's dispatcher an older torch makes numbers of the symbolic sizes in composite operators.
    with mode or nullcontext(), symbols, enable_python_dispatcher(), torch.no_grad():
        is_known = not any(map(is_open, pytree.tree_leaves([node.meta.get("val") for node in before.graph.nodes])))
        results = _tensors((_Shapes if is_known else fx.Interpreter)(after).run(*values))
    (output,) = before.graph.find_nodes(op="output")
    for node, result in zip(operands(output), results, strict=False):  # what is told of places comes after them
        traced = node.meta["val"]
        same = len(traced.shape) == len(result.shape) and all(
            size(one) == size(two) or _follows_from_data(one)
            for one, two in zip(traced.shape, result.shape, strict=True)
        )
        if traced.dtype != result.dtype or (restored and not same):
            raise VerificationError(
                f"{node.target} ({node.name}) was {traced.dtype} {tuple(traced.shape)} and would become {result.dtype} "
                f"{tuple(result.shape)}: a rule of the table or the rewriter is wrong; please report the model."
            )
