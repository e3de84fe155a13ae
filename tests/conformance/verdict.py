"""What the pass makes of one encoder: a verdict, the reason, and the laws that it keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isnan
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.utils import _pytree as pytree

from tests.conformance.encoders import VIDEO, Built, Encoder, Unbuildable, build
from tests.conformance.inputs import apart
from tests.laws.independence import Apart
from tldr_compile.api import assemble, capture
from tldr_compile.config import TokenMerging
from tldr_compile.errors import CaptureError, NothingToMerge, OptionError, VerificationError
from tldr_compile.module import MergedModule, Origin
from tldr_compile.passes import Analysis, analyse
from tldr_compile.passes.capture import from_export
from tldr_compile.passes.check.verify import agreement
from tldr_compile.passes.plan import rows_of

LEAST = 0.05  # of the dense operations; a model that saves less is told apart
MERGED, PARTLY, LITTLE, REFUSED = "merged", "partly merged", f"partly merged, saves under {LEAST:.0%}", "refused"
WRONG, CRASHED, NOT_BUILT = "wrong", "crashed", "not built"
COVERED = (MERGED, PARTLY, LITTLE)
VERDICTS = (*COVERED, REFUSED, WRONG, CRASHED, NOT_BUILT)

EVERYWHERE = 0.3  # the schedule that savings are told of: one fraction at all sites where it pays
FRACTION = 0.2
HALF = 0.5  # where that is less than one token
SITE = ("tokens", "batch", "status", "reason", "grouping")  # facts of a site that are kept
NO_RULE = "it has no typing rule"
TORCH, EXPORTER = "torch.export", "transformers' exporter"  # what captured a model

Size: TypeAlias = int | torch.SymInt
Record = dict[str, Any]
"""Plain data, as it is kept as JSON."""


@dataclass(frozen=True)
class Traced:
    """What `capture` gives; all that is made of it is called with the model's own arguments."""

    program: ExportedProgram
    origin: Origin

    @cached_property
    def analysis(self) -> Analysis:
        """One for all schedules."""
        return analyse(from_export(self.program), TokenMerging())

    @property
    def by(self) -> str:
        return EXPORTER if self.origin.preparation else TORCH

    def dense(self) -> Callable[..., Any]:
        """The program as it is."""
        # The guards of torch cannot be asked twice about some models.
        module, preparation = self.program.module(check_guards=False), self.origin.preparation
        return module if preparation is None else lambda **inputs: module(**preparation((), inputs))

    def merged(self, **options: Any) -> MergedModule:
        return assemble(self.program, self.analysis, TokenMerging(**options), self.origin)


def judge(encoder: Encoder, say: Callable[[str], None]) -> Record:
    """The record of one encoder. `say` is told what is being done.

    A model that makes the pass crash raises what the pass raised.
    """
    facts: Record = encoder.facts
    say("building it")
    try:
        built = build(encoder)
    except (Unbuildable, ImportError) as reason:
        return facts | {"verdict": NOT_BUILT, "reason": str(reason)}
    facts |= {"section": VIDEO} if built.video else {}
    facts |= {"sizes": built.sizes, "inputs": {name: list(value.shape) for name, value in built.inputs.items()}}
    say("tracing it")
    try:
        traced = Traced(*capture(built.model, (), built.inputs))
    except CaptureError as reason:
        return facts | {"verdict": REFUSED, "reason": f"does not trace: {_last(reason)}"}
    facts |= {"captured": traced.by, "attends": attends(traced.program)}
    return facts | _merged(built, traced, say)


def verdict(record: Mapping[str, Any]) -> tuple[str, str]:
    """The verdict on a traced model, and the reason for it, from its sites, restorations, laws and saving."""
    broken = [f"{law}: {text}" for law, text in record["laws"].items() if text != "kept"]
    if broken:
        return WRONG, "; ".join(broken)
    refused = Counter(site["reason"] for site in record["sites"] if site["status"] == "refused")
    if not any(site["status"] == "merged" for site in record["sites"]):
        return REFUSED, _why_not(record, refused)
    barriers = Counter[str]()
    for operator, reason, count in record["restorations"]:
        barriers[f"{operator}: {reason}"] += count
    if not barriers and not refused:
        return MERGED, ""
    return LITTLE if saves_little(record) else PARTLY, (barriers or refused).most_common(1)[0][0]


def saved(record: Mapping[str, Any]) -> float | None:
    """The part of the dense operations that `EVERYWHERE` saves; None where it is not known."""
    part: float | None = record.get("saving", {}).get("part")
    return part


def saves_little(record: Mapping[str, Any]) -> bool:
    """Whether it is known that less than `LEAST` is saved."""
    part = saved(record)
    return part is not None and part < LEAST


def attends(program: ExportedProgram) -> bool:
    """Whether a graph has self-attention over tokens, told without the pass: as many keys as queries.

    Learned queries that attend to each other, of objects in a picture, are no tokens of it.
    """
    told: dict[Size, bool] = {}
    for node, queries, keys in _attention(program):
        if guard_or_false(queries == keys):
            told.setdefault(queries, _of_input(node, program))
    return any(told.values())


def _of_input(node: fx.Node, program: ExportedProgram) -> bool:
    """Whether a value is made of what the user gives."""
    given, pending, seen = set(program.graph_signature.user_inputs), [node], {node}
    while pending:
        each = pending.pop()
        if each.op == "placeholder" and each.name in given:
            return True
        pending += [above for above in each.all_input_nodes if above not in seen]
        seen.update(each.all_input_nodes)
    return False


def _attention(program: ExportedProgram) -> Iterator[tuple[fx.Node, Size, Size]]:
    """Fused attention and probabilities, with their queries and keys, in order.

    Probabilities are a softmax over the last dimension of matrices of more than one, in a product with values.
    """
    calls = program.graph.find_nodes
    for node in calls(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default):
        query, key = (argument.meta["val"] for argument in node.args[:2])
        yield node, query.shape[-2], key.shape[-2]
    for node in calls(op="call_function", target=torch.ops.aten.softmax.int):
        scores = node.meta["val"]
        last = scores.ndim >= 3 and node.args[1] in (-1, scores.ndim - 1)
        if last and not guard_or_false(scores.shape[-1] == 1) and _multiplies(node):
            yield node, scores.shape[-2], scores.shape[-1]


def _multiplies(probabilities: fx.Node) -> bool:
    """Whether probabilities go into a product, as they are or only moved."""
    shapes = {"view", "reshape", "expand", "unsqueeze", "slice", "permute", "transpose"}
    moves = {"dropout", "clone", "to", "_to_copy", "contiguous", *shapes}
    for user in probabilities.users:
        name = getattr(user.target, "__name__", "").partition(".")[0]
        if name in ("matmul", "bmm", "baddbmm", "einsum") or (name in moves and _multiplies(user)):
            return True
    return False


def _last(reason: CaptureError) -> str:
    """Why the tracer that was tried last cannot capture a model."""
    tracer = reason.__cause__ or reason
    told, _, _ = str(tracer).partition("\n\n")  # what follows are the paths of this machine
    return f"{type(tracer).__name__}: {told}"


def _leaving(traced: Traced) -> Record:
    """How many tokens of how many leave at `EVERYWHERE` where no output is restored; or why none leaves merged."""
    try:
        report = traced.merged(schedule=EVERYWHERE, outputs="merged").report
    except NothingToMerge as reason:
        return {"reason": str(reason).partition(":")[0]}
    plan = report.plan
    if not plan.leaving:
        inside = [each for each in report.restorations if each["operator"] != "output"]
        needed = [f"{each['operator']}: {each['reason']}" for each in inside]
        return {"reason": needed[-1] if needed else "no output is over tokens"}
    try:
        rows = rows_of(plan)
    except OptionError as reason:
        return {"reason": str(reason)}
    return {"tokens": [str(rows.left), str(rows.tokens.size)]}


def _merged(built: Built, traced: Traced, say: Callable[[str], None]) -> Record:
    say("a schedule of zeros")
    zero = traced.merged(schedule=())
    eager, dense = _run(built.model, built.inputs), _run(traced.dense(), built.inputs)
    laws = {"Zero": _same(dense, _run(zero, built.inputs))}
    report, nothing, rounding, saving = zero.report, None, "", {}
    if any(site["status"] != "refused" for site in report.sites):
        say(f"counting what schedule={EVERYWHERE} saves")
        saving = {"saving": _saving(traced)}
        say("asking which outputs leave merged")
        saving |= {"leaving": _leaving(traced)}
    if report.sites:
        say("merging it")
        try:
            merged = _everywhere(traced, report.sites)
        except NothingToMerge as reason:
            nothing = str(reason)
        else:
            report = merged.report
            say("running it merged")
            laws["Restore"] = _restored(eager, _run(merged, built.inputs))
            say("looking for what samples know of each other")
            samples = _samples(merged, traced, built)
            say("comparing it with its meaning")  # last: it may turn the parameters, which all share, to float64
            projection, rounding = _projected(merged, built)
            laws |= {"Projection": projection} if projection else {}
            laws |= samples
    facts = reported(report.to_dict()) | {"nothing": nothing, "laws": laws, "trace": _same(eager, dense)}
    facts |= {"softmax": any(True for _ in _attention(traced.program)), "rounding": rounding} | saving
    return facts | dict(zip(("verdict", "reason"), verdict(facts), strict=True))


def _everywhere(traced: Traced, sites: Sequence[Mapping[str, Any]]) -> MergedModule:
    """Merged at every site that can, whether it pays or not: tiny models rarely gain anything."""
    able = [site["status"] != "refused" for site in sites]
    try:
        return traced.merged(schedule=[FRACTION if each else 0 for each in able])
    except NothingToMerge:
        return traced.merged(schedule=[HALF if each else 0 for each in able])


def _saving(traced: Traced) -> Record:
    """The part of the operations that is saved, None where sizes depend on the data; and why nothing is merged."""
    report = traced.merged(schedule=EVERYWHERE, on_nothing="warn").report
    if report.nothing:
        return {"part": 0.0, "nothing": report.nothing}
    before, after = report.gflops
    return {"part": None if isnan(before) or isnan(after) else 1 - after / before, "nothing": None}


def reported(report: Mapping[str, Any]) -> Record:
    """The facts of a report that are kept."""
    forced = Counter((each["operator"], each["reason"]) for each in report["restorations"])
    return {
        "sites": [{key: site[key] for key in SITE if key in site} for site in report["sites"]],
        "restorations": [
            [operator, reason, count] for (operator, reason), count in forced.most_common() if operator != "output"
        ],
        "misses": [[miss["operator"], miss["reason"]] for miss in report["not_attention"]],
        "gflops": [report["gflops_before"], report["gflops_after"]],
    }


def _why_not(record: Mapping[str, Any], refused: Counter[str]) -> str:
    if refused:
        return refused.most_common(1)[0][0]
    if record["sites"]:
        return record["nothing"] or "the schedule removes no token"
    if record["misses"]:
        operator, reason = record["misses"][0]
        return f"no attention site; nearest: {operator}: {reason}"
    return "its attentions have other keys than queries, or no run of tokens" if record["softmax"] else "no attention"


def _run(module: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Any:
    torch.manual_seed(0)  # some encoders draw at random
    with torch.no_grad():
        return module(**inputs)


def _same(expected: Any, actual: Any) -> str:
    """ "kept" where all tensors are equal, bit for bit."""
    ones, others = _tensors(expected), _tensors(actual)
    if len(ones) != len(others):
        return f"{len(others)} tensors instead of {len(ones)}"
    for number, (one, other) in enumerate(zip(ones, others, strict=True)):
        if one.shape != other.shape or not torch.equal(_bits(one), _bits(other)):
            return f"output {number} differs"
    return "kept"


def _restored(expected: Any, actual: Any) -> str:
    if pytree.tree_structure(expected) != pytree.tree_structure(actual):
        return "the outputs have another structure"
    for number, (one, other) in enumerate(zip(_tensors(expected), _tensors(actual), strict=True)):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return f"output {number} was {one.dtype} {list(one.shape)} and is {other.dtype} {list(other.shape)}"
    return "kept"


def _samples(merged: Callable[..., Any], traced: Traced, built: Built) -> dict[str, str]:
    """Whether what the traced model keeps apart is apart when merged; nothing where it keeps nothing apart.

    A batch of one, or a model that mixes its samples, has nothing to compare.
    """
    dense = Apart.of(traced.dense(), (), built.inputs, apart(built.kind, built.inputs))
    if not dense.compared:
        return {}
    raised = dense.raised(merged)
    return {"Samples": raised[0] if raised else "kept"}


def _projected(merged: MergedModule, built: Built) -> tuple[str, str]:
    """Whether Projection is kept ("" where no number can tell), and what rounding has to do with it.

    The activations of random weights can grow so large that float32 cannot tell rounding from a wrong rule. Weights of
    groups are float32 at best: where the dense model makes much of so little, float64 cannot either.
    """
    single = _verified(merged, built.inputs)
    if single == "kept":
        return single, ""
    model, inputs = built.model.double(), {name: _double(value) for name, value in built.inputs.items()}
    traced = Traced(*capture(model, (), inputs))
    double = _verified(_everywhere(traced, merged.report.sites), inputs)
    if double == "kept":
        return double, "Projection is told in float64: float32 rounds too much"
    moved = _moved(model, inputs)
    if moved > agreement(traced.program.graph):
        return "", f"Projection cannot be told: rounding the inputs moves the dense model by {moved:.0e} of its size"
    return double, ""


def _moved(model: torch.nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """How far a step of float32's rounding in all inputs moves an output, as a part of its largest magnitude."""
    step = 1 + torch.finfo(torch.float32).eps
    moved = {name: value * step if value.is_floating_point() else value for name, value in inputs.items()}
    pairs = zip(_tensors(_run(model, inputs)), _tensors(_run(model, moved)), strict=True)
    return max(float((one - other).abs().max() / one.abs().max()) for one, other in pairs if one.is_floating_point())


def _verified(merged: MergedModule, inputs: dict[str, Tensor]) -> str:
    try:
        merged.verify((), inputs)
    except VerificationError as reason:
        return str(reason)
    return "kept"


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _tensors(tree: Any) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(tree) if isinstance(each, Tensor)]


def _bits(value: Tensor) -> Tensor:
    return value.nan_to_num() if value.is_floating_point() else value
