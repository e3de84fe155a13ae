"""Every model that needs a grouping of its own is held to the laws, whatever the pass decides about it.

Left alone, with a mix of fractions at all sites that can merge, in float64; and where a coarser grouping fits, with
that and with the finest one, by one fraction in float32, where only what pays is merged.
"""

from __future__ import annotations

from functools import cache
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, export
from torch.utils._pytree import tree_flatten

import tldr_compile
from tests.laws.accounting import dearer, miscounted, unaccounted
from tests.laws.grouped import MODELS
from tests.laws.independence import Apart
from tests.laws.support import assert_same, distance, tensors
from tldr_compile import MergedModule, NothingToMerge, OptionError, ops
from tldr_compile.errors import VerificationError
from tldr_compile.inspection import Decision, inspect
from tldr_compile.passes.axes import Axis
from tldr_compile.passes.emit.resample import Converter, holding
from tldr_compile.passes.emit.views import Laid
from tldr_compile.passes.sites.dependence import Mixing

ONE, MIX = "one fraction", "a mix"
DTYPES = {ONE: torch.float32, MIX: torch.float64}
FRACTIONS = (0.3, 0.1, 0.45, 0.2)
FEW = (0.15, 0.0)
"""So few that each token that goes has an equal among those that stay."""
EQUALS: dict[str, Any] = {"saliency": "uniform", "proportional": True, "pooling": "mass"}

ALONE = [(name, "auto", MIX) for name in MODELS]
COARSE = [(name, model.takes, ONE) for name, model in MODELS.items() if model.takes]
FINE = [(name, "each", ONE) for name, _, _ in COARSE]
EQUAL = [each for each in ALONE + COARSE + FINE if MODELS[each[0]].equal]
pytestmark = pytest.mark.filterwarnings("ignore:tldr. the merged graph costs")  # these models are small


@cache
def dense(name: str, schedule: str = ONE) -> nn.Module:
    return MODELS[name].build(DTYPES[schedule])


def noise(name: str, schedule: str) -> Tensor:
    return MODELS[name].noise().to(DTYPES[schedule])


@cache
def program(name: str, schedule: str) -> ExportedProgram:
    return export(dense(name, schedule), (noise(name, schedule),))


@cache
def able(name: str, grouping: str) -> list[bool]:
    """Which sites can merge."""
    sites = tldr_compile.explain(program(name, MIX), schedule=(), grouping=grouping).sites
    return [site["status"] != "refused" for site in sites]


def mixed(name: str, grouping: str, amounts: tuple[float, ...]) -> float | list[float]:
    """The mix, none where nothing can merge; where that is everywhere, one fraction, so that a text says why."""
    rest = cycle(amounts)
    found = [next(rest) if merges else 0 for merges in able(name, grouping)]
    return found if any(found) else amounts[0]


def allowed(name: str, grouping: str, text: str) -> bool:
    """Whether the table says that this may be refused."""
    coarser = grouping in ("shared", "blocks") and grouping != MODELS[name].takes
    return (coarser and "grouping" in text) or any(words in text for words in MODELS[name].refused)


def attempt(name: str, grouping: str, schedule: str, amounts: tuple[float, ...], **options: Any) -> MergedModule | None:
    """The model merged; None where the table says that it may be refused."""
    try:
        entries = mixed(name, grouping, amounts) if schedule == MIX else amounts[0]
        return tldr_compile.apply(program(name, schedule), schedule=entries, grouping=grouping, **options)
    except (NothingToMerge, OptionError) as refusal:
        if not allowed(name, grouping, str(refusal)):
            raise
        return None


@cache
def merged(name: str, grouping: str, schedule: str) -> MergedModule | None:
    """With the options that nobody gave."""
    return attempt(name, grouping, schedule, FRACTIONS)


def look(tree: Any) -> Any:
    leaves, structure = tree_flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def off_by(outputs: Any, expected: Any) -> float:
    return max(distance(one, two) for one, two in zip(tensors(outputs), tensors(expected), strict=True))


@cache
def kept_apart(name: str, schedule: str) -> Apart:
    """Of samples, frames, rows and columns; channels of pixels are nothing that attention keeps apart."""
    return Apart.of(dense(name, schedule), (noise(name, schedule),), dims=(0, 2, 3, 4))


@pytest.mark.parametrize(("name", "grouping", "schedule"), ALONE + COARSE)
def test_the_laws_hold(name: str, grouping: str, schedule: str) -> None:
    found, model, video = merged(name, grouping, schedule), dense(name, schedule), noise(name, schedule)
    if found is None:
        return
    for each in (video, MODELS[name].rows().to(DTYPES[schedule])):
        found.verify((each,))
    apart = kept_apart(name, schedule)
    assert any("dimension 0" in line for line in apart.compared), "every model keeps samples apart"
    assert apart.raised(found) == []
    with torch.no_grad():
        outputs, expected = found(video), model(video)
    assert look(outputs) == look(expected)
    assert all(each.isfinite().all() for each in tensors(outputs))
    assert off_by(outputs, expected) > 1e-6, "it says that it merged, and changed nothing"
    assert unaccounted(found) == []
    assert miscounted(model, found, (video,)) == []
    assert schedule == MIX or list(dearer(found)) == []


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.takes])
def test_the_coarser_grouping_that_fits_is_taken(name: str) -> None:
    report = tldr_compile.explain(program(name, ONE), schedule=0.3)
    joined = {"shared": "shared", "blocks": "carried"}[MODELS[name].takes]
    assert any(joined in site["grouping"] for site in report.sites), report
    assert any("removes a barrier" in reason or "its keys are one" in reason for reason in report.groupings)
    inside = [each for each in report.restorations if each["operator"] != "output"]
    assert inside == []


@pytest.mark.parametrize(("name", "grouping", "schedule"), EQUAL)
@torch.no_grad()
def test_merging_equal_tokens_changes_nothing(name: str, grouping: str, schedule: str) -> None:
    if (found := attempt(name, grouping, schedule, FEW, **EQUALS)) is not None:
        video = MODELS[name].rows().to(DTYPES[schedule])
        assert all(is_pure(decision) for decision in inspect(found, video)), "the premise does not hold"
        assert_same(found(video), dense(name, schedule)(video))


def is_pure(decision: Decision) -> bool:
    """Whether no group holds tokens of two rows. Rows are told by all parts of the height, in whatever order."""
    run = torch.arange(decision.assign.shape[1]).reshape(decision.grid)
    high = [label.startswith("h") for label in decision.labels]
    for dim, size in enumerate(decision.grid):
        if not high[dim]:
            run = run.narrow(dim, 0, 1).expand(*run.shape[:dim], size, *run.shape[dim + 1 :])
    rows = run.flatten()
    return all(len(rows[groups == group].unique()) == 1 for groups in decision.assign for group in groups.unique())


# --- what is joined is told on average ---


def told(name: str, grouping: str, **options: Any) -> tuple[dict[str, Tensor], Decision]:
    """What the first merge of a model read, by name, and what it decided."""
    read: dict[str, Tensor] = {}

    def noted(which: str) -> Any:
        def note(reading: Tensor) -> Tensor:
            read[which] = reading
            return ops.saliency(reading) if which == "sharpness" else reading

        return note

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ops.SIGNALS, "noted", ops.Measure(("sharpness",), noted("sharpness")))
        patch.setitem(ops.METRICS, "noted", ops.Measure(("tokens",), noted("tokens")))
        schedule = [
            0.4 if merges and not any(able(name, grouping)[:k]) else 0 for k, merges in enumerate(able(name, grouping))
        ]
        found = tldr_compile.apply(
            program(name, MIX), schedule=schedule, grouping=grouping, saliency="noted", metric="noted", **options
        )
        (decision,) = inspect(found, noise(name, MIX))
    return read, decision


@pytest.mark.parametrize(
    ("name", "grouping", "joined"),
    [("divided: factorised", "shared", (2, 3, 15)), ("blocks: in order", "blocks", (2, 15, 4))],
)
def test_joined_tokens_say_what_they_say_on_average(name: str, grouping: str, joined: tuple[int, ...]) -> None:
    """Sharpness is the mean of theirs, and two groups are as alike as their tokens are on average."""
    (each, _), (one, decision) = told(name, "each"), told(name, grouping)
    along = 1 if grouping == "shared" else 2
    torch.testing.assert_close(one["sharpness"], each["sharpness"].reshape(joined).mean(along))
    tokens = each["tokens"].reshape(*joined, -1).movedim(along, 1)  # [B, J, N, C]
    alike = torch.stack([(ops.unit(row) @ ops.unit(row).mT) for row in tokens.unbind(1)]).mean(0)
    best = alike[:, ::2, 1::2].max(-1)
    for b, assign in enumerate(decision.assign):
        gone = best.values[b].topk(int(0.4 * joined[2 if along == 1 else 1])).indices
        assert all(assign[2 * k] == assign[2 * best.indices[b, k] + 1] for k in gone)


# --- the laws can fail ---


def test_a_grouping_that_frames_must_not_share_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mixing, "kept_apart", lambda mixing, stream, atom: None)
    name = "divided: causal"
    found = tldr_compile.apply(program(name, ONE), schedule=0.3, grouping="shared")
    assert any("dimension 2" in line for line in kept_apart(name, ONE).raised(found))
    with pytest.raises(VerificationError, match="mixes what the model keeps apart"):
        found.verify((noise(name, ONE),))


@pytest.mark.parametrize("name", ["windows: no shift", "blocks: pixel shuffle"])
def test_tokens_that_are_laid_in_another_order_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Converter.together

    def backwards(converter: Converter, laid: Laid, tokens: Axis) -> Laid:
        laid = real(converter, laid, tokens)
        dims = holding(laid.axes, tokens)
        return Laid(converter.layout.call(torch.ops.aten.flip.default, laid.node, dims), laid.axes)

    monkeypatch.setattr(Converter, "together", backwards)
    with pytest.raises(VerificationError, match="differs from its meaning"):
        tldr_compile.apply(program(name, ONE), schedule=0.3).verify((noise(name, ONE),))


def test_a_group_of_two_rows_is_not_pure() -> None:
    def grouped(*assign: int) -> Decision:
        groups = torch.tensor([assign])
        return Decision(0, ("t", "h", "w"), (1, 2, 2), ("b",), (1,), (), (), groups, groups, groups)

    assert is_pure(grouped(0, 0, 1, 1))
    assert is_pure(grouped(0, 1, 2, 2))
    assert not is_pure(grouped(0, 1, 0, 1))


@pytest.mark.parametrize(
    "name", ["divided: frames leave one by one", "blocks: in order", "windows: then all", "keys: memory"]
)
@torch.no_grad()
def test_attention_without_mass_shows(name: str) -> None:
    video = MODELS[name].rows().to(DTYPES[MIX])
    found = attempt(name, "auto", MIX, FEW, **{**EQUALS, "proportional": False})
    assert found is not None
    assert off_by(found(video), dense(name, MIX)(video)) > 1e-3


def test_one_grouping_for_frames_that_are_apart_shows() -> None:
    """A merge that asks the frames after it is what the law of samples sees."""
    name = "divided: causal"

    def asking(video: Tensor) -> Tensor:
        frames: Tensor = dense(name)(video)
        return frames + 1e-6 * frames.mean(1, keepdim=True)

    assert any("dimension 2" in line for line in kept_apart(name, ONE).raised(asking))


def test_a_refusal_that_is_not_listed_shows() -> None:
    assert allowed("windows: padded", "auto", "its tokens 3·3 are not those of the residual stream b x h x w x 8")
    assert not allowed("windows: padded", "auto", "it is temporal")
    assert not allowed("keys: memory", "auto", "no merge pays")
    assert allowed("keys: memory", "blocks", "grouping='blocks': no operator joins blocks")
    assert not allowed("blocks: in order", "blocks", "grouping='blocks': no operator joins blocks")
