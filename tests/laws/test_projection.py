"""A rewritten graph is the original at full length with its streams projected: for any input and any plan.

The second half shows that the law can fail: every way in which an operator or the rewriter could be wrong is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import tldr_compile
from tests.laws.support import but, check, every_case, flat_inputs, merge, program
from tests.tiny import clip
from tests.zoo import CASES, FAMILIES, Attn, Case, case
from tldr_compile import VerificationError, ops, passes
from tldr_compile.passes.emit import merging
from tldr_compile.passes.emit.mass import Weigher
from tldr_compile.passes.emit.resample import Converter
from tldr_compile.passes.emit.views import Laid
from tldr_compile.passes.plan.plan import How, Weighing, Weight

SITES = {"umt": 3, "videomae": 3, "videomae-tokens": 3, "vivit": 3, "clip": 3, "vjepa2": 4, "timesformer": 6}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"outputs": "merged"},
    *({"saliency": name} for name in ops.SIGNALS if name != "attention"),
    {"metric": "keys"},
    {"pooling": "plain", "proportional": False},
    {"reduction": "drop", "outputs": "merged"},
    {"reduction": "random", "metric": "keys"},
    {"reduction": "slice", "proportional": False},
]


def can(name: str, saliency: str) -> bool:
    """What compares frames needs several in a group of tokens, and these attend within one."""
    return name not in ("clip", "timesformer") or "previous" not in ops.SIGNALS[saliency].reads


# Every model as it comes, and with every fourth of the others: the fuzzer draws the rest of the table.
PAIRS = [
    pytest.param(each, options, id=f"{each}-{options}")
    for place, each in enumerate(CASES)
    for number, options in enumerate(OPTIONS)
    if not options or ((place + number) % 4 == 0 and can(each.name, options.get("saliency", "attention")))
]


@pytest.mark.parametrize(("case", "options"), PAIRS)
def test_every_model_and_every_option(case: Case, options: dict[str, Any]) -> None:
    merged = check(case, **options)
    assert [merge.count for merge in merged.plan.merges] == [entry for entry in case.schedule if entry]


def drawn_entry(random: Random) -> int | float:
    return random.choice([7, 0.5, 0, random.randint(0, 40), random.uniform(0, 0.9)])


def drawn_model(random: Random, name: str, attn: Attn) -> tuple[Case, int]:
    """The model at another size, and a batch. Attention over one frame is no attention over frames: at least two."""
    frames = [6, 2] if FAMILIES[name].frames == 6 else [3, 2 if name == "timesformer" else 1]
    sized = case(name, attn, image=random.choice([24, 16, 32]), frames=random.choice(frames))
    return sized, random.randint(1, 3)


def drawn_plan(random: Random, name: str) -> dict[str, Any]:
    """Options with a schedule that can be followed: every other site of TimeSformer is temporal, and cannot merge."""
    able = [site % 2 == 1 or name != "timesformer" for site in range(SITES[name])]
    some = able[: random.randint(2, SITES[name])]
    schedule = tuple(drawn_entry(random) if merges else 0 for merges in some)
    saliency = random.choice([each for each in ops.SIGNALS if can("clip", each)])  # of sizes with one frame, too
    return {
        "schedule": random.choice([schedule, random.uniform(0.3, 0.7)]),
        "saliency": saliency,
        "reduction": random.choice(["merge", "random", "slice", *["drop"] * bool(ops.SIGNALS[saliency].reads)]),
        "metric": random.choice(["tokens", "keys"]),
        "pooling": random.choice(["mass", "plain"]),
        "proportional": random.choice([True, False]),
        "outputs": random.choice(["restore", "merged"]),
    }


@every_case
def test_any_plan(case: Case) -> None:
    random = Random(str(case))
    sized, batch = drawn_model(random, case.name, case.attn)
    for _ in range(5):  # a capture takes longer than a plan
        merged = check_any(sized, batch, drawn_plan(random, case.name))
        assert merged is None or len(merged.plan.sites) == SITES[case.name]


def check_any(sized: Case, batch: int, options: dict[str, Any]) -> passes.Merged | None:
    try:
        return check(sized, batch, **options)
    except tldr_compile.NothingToMerge:
        assert not any(entry for entry in options["schedule"] if isinstance(entry, int))  # fractions may round to 0
        return None


@every_case
def test_other_inputs_than_those_of_the_capture(case: Case) -> None:
    merged = tldr_compile.apply(program(case, 2), schedule=case.schedule)
    (video,) = case.inputs()
    for other in (video.flip(0) * 2, torch.zeros_like(video), video[:1].expand_as(video)):
        merged.verify((other,))


def test_verify_at_compile_time_runs_the_law() -> None:
    umt = case("umt")
    with (
        mock.patch.object(Weigher, "_weight", return_value=None),
        pytest.raises(VerificationError, match=r"output 0 \(\w+\) differs from its meaning by .* report the model"),
    ):
        tldr_compile.apply(umt.build(), umt.inputs(), schedule=umt.schedule, verify=True)


# --- the law can fail ---


def no_log_mass(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **{**kwargs, "log_mass": None})


def neighbour(function: Callable[..., Any]) -> Callable[..., Any]:
    """An index operator that is off by one group."""
    return lambda x, index, *, dim: function(x, index.roll(1, dim), dim=dim)


def evenly(x: Tensor, kept: Tensor, source: Tensor, target: Tensor, *weights: Tensor, dim: int) -> Tensor:
    return ops.down(x, kept, source, target, *(torch.full_like(weight, 0.5) for weight in weights), dim=dim)


def heavier(*args: Any, **kwargs: Any) -> ops.Grouping:
    grouping = ops.group(*args, **kwargs)
    return grouping._replace(mass=grouping.mass + 0.1)


def elsewhere(*args: Any, **kwargs: Any) -> ops.Grouping:
    """Sources go to one group and come back from another."""
    grouping = ops.group(*args, **kwargs)
    others = (grouping.target + 1) % grouping.kept.shape[1]
    return grouping._replace(assign=grouping.assign.scatter(1, grouping.source, others))


def unweighted(function: str) -> dict[str, Callable[..., Tensor]]:
    return {function: lambda x, weight, **options: getattr(ops, function)(x, torch.ones_like(weight), **options)}


ATTEND = {name: no_log_mass(getattr(ops, name)) for name in ("attend", "attend_and_sharpness")}
WRONG_OPERATORS = {
    "attention without log-mass": ("umt", ATTEND),
    "log-mass only where no saliency is found": ("umt", {"attend": ATTEND["attend"]}),
    "attention over eager scores without log-mass": ("vivit", ATTEND),
    "merge that ignores mass": ("umt", {"down": evenly}),
    "merge that drops its sources": (
        "umt",
        {"down": lambda x, kept, *_, dim: ops.pick(x, kept, dim=dim)},
    ),
    "mean that ignores mass": ("videomae", unweighted("mean")),
    "restore from the wrong group": ("clip", {"up": neighbour(ops.up)}),
    "tables of the wrong token": ("vjepa2", {"pick": neighbour(ops.pick)}),
    "mass of a group": ("umt", {"group": heavier}),
    "assignment of the sources": ("videomae-tokens", {"group": elsewhere}),
    "assignment at a barrier": ("timesformer", {"group": elsewhere}),
}


@pytest.mark.parametrize("wrong", WRONG_OPERATORS)
def test_a_wrong_operator_is_refused(wrong: str) -> None:
    name, changed = WRONG_OPERATORS[wrong]
    model = case(name, FAMILIES[name].attns[-1])
    check(model)
    with pytest.raises(VerificationError):
        check(model, operators=but(**changed))


def always(how: How) -> Callable[..., Any]:
    down = Converter.down
    return lambda self, laid, target, _: down(self, laid, target, how)


def ones(converter: Converter, source: Any, like: fx.Node, axes: Any) -> tuple[fx.Node, fx.Node]:
    return COUNTS(converter, None, like, axes)


def plain_share(self: Weigher, weight: Weight, mass: bool) -> Laid:
    return TOKENS(self, weight, not mass)


def unheld(self: Weigher, weighing: Weighing, operands: Any) -> fx.Node | None:
    return WEIGHT(self, weighing, operands) if weighing.weight.held else None


def shifted(self: Converter, resolution: Any) -> fx.Node:
    return self.layout.call(torch.ops.aten.roll.default, ASSIGN(self, resolution), [1], [1])


ASSIGN, COUNTS, TOKENS, WEIGHT = Converter.assign, merging.counts, Weigher._of_tokens, Weigher._weight
WRONG_REWRITERS: dict[str, tuple[str, Any, str, Any]] = {
    "no sum is weighed": ("umt", Weigher, "_weight", lambda *_: None),
    "the mass of the merge before is forgotten": ("umt", merging, "counts", ones),
    "tables are averaged": ("vjepa2", Converter, "down", always(How.MERGE)),
    "the stream is picked": ("umt", Converter, "down", always(How.PICK)),
    "restored tokens are off by one": ("umt", Converter, "assign", shifted),
}


class CausalLater(nn.Module):
    """Tokens merge, and a later attention needs all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.qkv = nn.Conv3d(3, 16, (2, 4, 4), (2, 4, 4)), nn.Linear(16, 48)

    def forward(self, video: Tensor) -> Tensor:
        x = self.patches(video).flatten(2).transpose(1, 2)
        for causal in (False, True):
            q, k, v = (each.unsqueeze(1) for each in self.qkv(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=causal).squeeze(1)
        return x


@pytest.mark.parametrize(("method", "changed"), [("_weight", unheld), ("_of_tokens", plain_share)])
def test_restored_keys_that_weigh_otherwise_are_refused(method: str, changed: Any) -> None:
    torch.manual_seed(0)
    model = CausalLater().eval()
    tldr_compile.apply(model, (clip(),), schedule=[6], verify=True)
    with mock.patch.object(Weigher, method, changed), pytest.raises(VerificationError):
        tldr_compile.apply(model, (clip(),), schedule=[6], verify=True)


@pytest.mark.parametrize("wrong", WRONG_REWRITERS)
def test_a_wrong_rewriter_is_refused(wrong: str) -> None:
    name, owner, method, changed = WRONG_REWRITERS[wrong]
    model = case(name, FAMILIES[name].attns[-1])
    check(model)
    with mock.patch.object(owner, method, changed):
        merged = merge(model)
    with pytest.raises(VerificationError):
        passes.verify(merged, flat_inputs(model))
