"""Saliency signals and metrics: what is registered from outside is an option like the others."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tldr_compile
from tests.generated.model import build
from tests.generated.recipe import Recipe
from tests.laws.support import graphs_for_inductor
from tldr_compile import OptionError, TokenMerging, VerificationError, ops
from tldr_compile.passes.check import record


def merged(recipe: Recipe | None = None, **options: object) -> tldr_compile.MergedModule:
    recipe = recipe or Recipe()
    return tldr_compile.apply(build(recipe), recipe.inputs(), schedule=[4], verify=True, **options)


def saliency_of(model: tldr_compile.MergedModule) -> Tensor:
    (decision,) = tldr_compile.inspect(model, *Recipe().inputs())
    return decision.saliency


def test_what_each_reads_is_what_a_merge_asks() -> None:
    asks = {
        ("attention", "tokens"): {"sharpness", "tokens"},
        ("shift", "tokens"): {"shift", "before", "tokens"},
        ("mlp shift", "tokens"): {"mlp shift", "tokens"},
        ("uniform", "keys"): {"keys"},
        ("received", "tokens"): {"received", "tokens"},
        ("key norm", "tokens"): {"keys", "tokens"},
        ("change", "keys"): {"tokens", "previous", "keys"},
    }
    for (saliency, metric), wanted in asks.items():
        assert TokenMerging(saliency=saliency, metric=metric).asks == wanted
    assert TokenMerging(saliency="attention", reduction="random").asks == {"tokens"}


@torch.no_grad()
def test_a_signal_from_outside() -> None:
    with pytest.raises(OptionError, match="saliency is one of 'attention', 'shift', 'uniform'"):
        TokenMerging(saliency="norm")
    seen: list[Tensor] = []

    @ops.signal("norm", reads="tokens")
    def norm(tokens: Tensor) -> Tensor:
        seen.append(tokens)
        return ops.saliency(tokens.float().norm(dim=-1))

    known = ", ".join(map(repr, ops.SIGNALS))
    with pytest.raises(OptionError, match=f"saliency is one of {known}; did you mean 'norm'"):
        TokenMerging(saliency="norms")
    found = saliency_of(merged(saliency="norm"))
    torch.testing.assert_close(found, ops.saliency(seen[-1].norm(dim=-1)))
    assert not torch.equal(found, saliency_of(merged()))
    targets = [node.target for node in merged(saliency="norm", reduction="drop").graph_module.graph.nodes]
    assert targets.count(ops.SIGNALS["norm"].function) == 1


@torch.no_grad()
def test_the_stream_before_and_after_tells_what_the_shift_is() -> None:
    @ops.signal("moved", reads=("before", "tokens"))
    def moved(before: Tensor, tokens: Tensor) -> Tensor:
        return ops.saliency((tokens.float() - before.float()).norm(dim=-1))

    torch.testing.assert_close(saliency_of(merged(saliency="moved")), saliency_of(merged(saliency="shift")))


@torch.no_grad()
@pytest.mark.parametrize("recipe", [Recipe(before=1, layout="sequence"), Recipe(attention="matmul")], ids=str)
@pytest.mark.parametrize("reading", list(ops.READINGS))
def test_every_reading_has_the_shape_that_it_promises(recipe: Recipe, reading: str) -> None:
    shapes = []

    @ops.signal("any", reads=reading)
    def any_of(read: Tensor) -> Tensor:
        shapes.append((read.dim(), *read.shape[:2]))
        return ops.saliency(read.float().flatten(2).norm(dim=-1) if read.dim() == 3 else read)

    assert merged(recipe, saliency="any").report.to_dict()["sites"][0]["status"] == "merged"
    promised = ops.READINGS[reading].split("]")[0].count(",") + 1
    assert set(shapes) == {(promised, recipe.batch, recipe.clip_tokens)}


@torch.no_grad()
def test_a_metric_from_outside() -> None:
    with pytest.raises(OptionError, match="metric is one of 'tokens', 'keys'"):
        TokenMerging(metric="both")

    @ops.metric("both", reads=("tokens", "keys"))
    def both(tokens: Tensor, keys: Tensor) -> Tensor:
        return torch.cat((unit(tokens), unit(keys)), -1)

    def assigned(metric: str) -> list[int]:
        (decision,) = tldr_compile.inspect(merged(metric=metric), *Recipe().inputs())
        return decision.assign[0].tolist()

    assert assigned("both") != assigned("tokens")


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


@torch.no_grad()
def test_a_copy_of_the_tokens_is_the_metric_tokens() -> None:
    @ops.metric("copy", reads="tokens")
    def copy(tokens: Tensor) -> Tensor:
        return tokens.clone()

    inputs = Recipe().inputs()
    assert torch.equal(merged(metric="copy")(*inputs), merged()(*inputs))


@torch.no_grad()
def test_a_signal_in_a_graph_with_symbolic_sizes() -> None:
    @ops.signal("norm", reads="tokens")
    def norm(tokens: Tensor) -> Tensor:
        return ops.saliency(tokens.float().norm(dim=-1))

    (clip,) = Recipe(batch=2).inputs()
    program = torch.export.export(build(Recipe()), (clip,), dynamic_shapes=({0: torch.export.Dim("b", min=1, max=9)},))
    model = tldr_compile.apply(program, schedule=[4], saliency="norm", verify=True)
    longer = torch.cat((clip, clip, clip))
    torch.testing.assert_close(model(longer)[:2], model(clip))


@pytest.mark.parametrize("reads", ["stream", (), ("tokens", "value")])
def test_what_is_no_reading_is_refused(reads: str | tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"saliency='mine' reads .* what can be read is 'tokens': \[B, N, C\]"):
        ops.signal("mine", reads=reads)
    with pytest.raises(ValueError, match="metric='mine' reads"):
        ops.metric("mine", reads=reads)


def test_a_result_of_another_shape_is_refused_by_name() -> None:
    @ops.signal("whole", reads="tokens")
    def whole(tokens: Tensor) -> Tensor:
        return tokens

    with pytest.raises(ValueError, match=r"saliency='whole' returned .*\[2, 18, 16\]; it has to be floats \[B, N\],"):
        merged(saliency="whole")

    @ops.metric("narrow", reads="sharpness")
    def narrow(sharpness: Tensor) -> Tensor:
        return sharpness

    with pytest.raises(ValueError, match=r"metric='narrow' returned .* has to be floats \[B, N, C\]"):
        merged(metric="narrow")


def test_a_signal_that_reads_nothing_ranks_nothing() -> None:
    ops.SIGNALS["none"] = ops.Measure(())
    with pytest.raises(OptionError, match="with saliency='none' all are equal"):
        TokenMerging(saliency="none", reduction="drop")


def test_keys_that_are_not_known_are_refused_with_the_option_that_reads_them() -> None:
    @ops.signal("keyed", reads="keys")
    def keyed(keys: Tensor) -> Tensor:
        return ops.saliency(keys.norm(dim=-1))

    with pytest.raises(OptionError, match=r"saliency='keyed' needs the keys of site 0 .*; use saliency='attention'"):
        merged(Recipe(attention="talking"), saliency="keyed")
    with pytest.raises(OptionError, match=r"metric='keys' needs the keys of site 0 .*; use metric='tokens'"):
        merged(Recipe(attention="talking"), metric="keys")


@pytest.mark.parametrize(
    "function",
    [
        lambda tokens: ops.saliency(tokens.float().norm(dim=-1)),
        torch.nn.Sequential(torch.nn.Linear(16, 1), torch.nn.Flatten(1), torch.nn.Sigmoid()),
    ],
    ids=["a lambda", "a module of torch"],
)
@torch.no_grad()
def test_any_callable_is_called_by_a_name_that_can_be_written(function: Any) -> None:
    ops.signal("mine, of tokens", reads="tokens")(function)
    assert "saliency_mine_of_tokens" in merged(saliency="mine, of tokens").graph_module.code


@torch.no_grad()
def test_a_function_of_torch_is_checked_too() -> None:
    ops.metric("unit", reads="tokens")(torch.nn.functional.normalize)
    assert "metric_unit" in merged(metric="unit").graph_module.code


def test_a_name_that_is_given_again_is_compiled_again() -> None:
    """Dynamo keeps what it compiled for options that are equal."""
    recipe, found = Recipe(), []
    for reads in ("tokens", "keys"):
        ops.signal("first", reads=reads)(lambda x: ops.saliency(x.float()[..., 0]))
        compiled = torch.compile(build(recipe), backend="tldr", options={"schedule": [4], "saliency": "first"})
        with torch.no_grad(), graphs_for_inductor():
            found.append(compiled(*recipe.inputs()))
    assert not torch.equal(*found)


@torch.no_grad()
@pytest.mark.parametrize("spoiled", [lambda t: -t.norm(dim=-1), lambda t: t.norm(dim=-1) * float("nan")])
def test_verification_refuses_a_saliency_that_is_no_weight(spoiled: Any) -> None:
    ops.signal("spoiled", reads="tokens")(spoiled)
    with pytest.raises(VerificationError, match=r"saliency='spoiled' gives site 0 .* not finite or below 0"):
        merged(saliency="spoiled")


@torch.no_grad()
def test_a_result_that_is_no_tensor_is_refused() -> None:
    ops.signal("none", reads="tokens")(lambda tokens: None)
    with pytest.raises(TypeError, match="saliency='none' returned NoneType"):
        merged(saliency="none")


# --- the built-in ones, written out ---


class Blocks(nn.Module):
    """Blocks over a class token and a clip of 3 frames of 2 x 2 places; all that a signal reads is at hand.

    `steps` says in which order: attention `a`, the MLP `m`.
    """

    def __init__(self, leading: int = 1, steps: str = "amam") -> None:
        super().__init__()
        self.steps = steps
        self.embed = nn.Conv3d(3, 8, (1, 4, 4), (1, 4, 4))
        self.leading = nn.Parameter(torch.randn(1, leading, 8))
        self.qkv = nn.ModuleList(nn.Linear(8, 24) for _ in range(steps.count("a")))
        self.mlp = nn.Linear(8, 8)

    def begin(self, clip: Tensor) -> Tensor:
        tokens = self.embed(clip).flatten(2).transpose(1, 2)
        return torch.cat((self.leading.expand(clip.shape[0], -1, -1), tokens), 1)

    def heads(self, x: Tensor, number: int) -> Tensor:
        return self.qkv[number](x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)

    def attended(self, x: Tensor, number: int) -> Tensor:
        return x + F.scaled_dot_product_attention(*self.heads(x, number)).transpose(1, 2).flatten(2)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.begin(clip)
        for number, step in enumerate(self.steps):
            x = self.attended(x, self.steps[:number].count("a")) if step == "a" else x + self.moved(x)
        return x

    def moved(self, x: Tensor) -> Tensor:
        return self.mlp(x).tanh()


def scaled(numbers: Tensor) -> Tensor:
    """Steps 3 and 4 of vid-TLDR, one token at a time."""
    rows = []
    for row in numbers.tolist():
        mean = sum(row) / len(row)
        rows.append([max(0.0, each - mean) / (max(row) - mean) for each in row])
    return torch.tensor(rows)


def received_by_hand(model: Blocks, clip: Tensor) -> Tensor:
    q, k, _ = model.heads(model.begin(clip), 0)
    numbers = torch.zeros(len(clip), 13)
    for sample, head, query in product(range(len(clip)), range(2), range(13)):
        scores = [float(q[sample, head, query] @ k[sample, head, key]) / 2 for key in range(13)]
        total = sum(map(math.exp, scores))
        numbers[sample] += torch.tensor([math.exp(score) / total for score in scores])
    return numbers[:, 1:]


def key_norm_by_hand(model: Blocks, clip: Tensor) -> Tensor:
    _, k, _ = model.heads(model.begin(clip), 0)
    return ((k[:, 0] + k[:, 1]) / 2).square().sum(-1).sqrt()[:, 1:]


def change_by_hand(model: Blocks, clip: Tensor) -> Tensor:
    frames = model.attended(model.begin(clip), 0)[:, 1:].unflatten(1, (3, 4))
    later = torch.cat([(frames[:, t] - frames[:, t - 1]).abs().sum(-1) for t in (1, 2)], 1)
    return torch.cat((later.amax(1, keepdim=True).expand(-1, 4), later), 1)


BY_HAND = {"received": received_by_hand, "key norm": key_norm_by_hand, "change": change_by_hand}


@torch.no_grad()
@pytest.mark.parametrize("name", BY_HAND)
def test_a_signal_is_what_is_written_out(name: str) -> None:
    model, clip = Blocks().eval(), torch.randn(2, 3, 3, 8, 8)
    short = tldr_compile.apply(model, (clip,), schedule=[4, 3], saliency=name, verify=True)
    first, _ = tldr_compile.inspect(short, clip)
    torch.testing.assert_close(first.saliency, scaled(BY_HAND[name](model, clip)))


@torch.no_grad()
def test_received_of_a_later_merge_is_of_groups() -> None:
    """Each counts once, as query and as key: `proportional` masses are not of saliency."""
    model, clip = Blocks(0).eval(), torch.randn(2, 3, 3, 8, 8)
    _, (_, seen) = readings_of(model, clip, "received", "before")
    q, k, _ = model.heads(seen["before"], 1)
    assert q.shape == (2, 2, 8, 4)
    torch.testing.assert_close(seen["received"], (q @ k.mT / 2).softmax(-1).mean((1, 2)))


@torch.no_grad()
def test_before_a_group_is_what_holds_the_place_of_its_representative_a_frame_earlier() -> None:
    model, clip = Blocks().eval(), torch.randn(2, 3, 3, 8, 8)
    merged, seen = readings_of(model, clip, "tokens", "previous")
    _, found = record(merged._merged.graph, merged._merged.groupings, merged._flat_inputs((clip,), {}))
    kept, assign = (found[1][name].tolist() for name in ("kept", "assign"))
    tokens, previous = seen[-1]["tokens"], seen[-1]["previous"]
    for sample, group in product(range(2), range(8)):
        place = kept[sample][group]
        held = tokens[sample, assign[sample][place - 4]] if place >= 4 else torch.zeros(8)
        assert torch.equal(previous[sample, group], held)


@torch.no_grad()
def test_the_mlp_of_the_layer_before_moved_what_was_merged_before_it() -> None:
    model, clip = Blocks().eval(), torch.randn(2, 3, 3, 8, 8)
    short = tldr_compile.apply(model, (clip,), schedule=[0, 4], saliency="mlp shift", verify=True)
    (decision,) = tldr_compile.inspect(short, clip)
    moved = model.moved(model.attended(model.begin(clip), 0))[:, 1:]
    torch.testing.assert_close(decision.saliency, scaled(moved.norm(dim=-1)))
    merged, (first, second) = readings_of(model, clip, "tokens", "mlp shift")
    assert torch.equal(first["mlp shift"], torch.zeros(2, 12))
    assert_moved(second["mlp shift"], model.moved(down(merged, 1, clip, first["tokens"])))


@torch.no_grad()
def test_how_far_groups_moved_is_the_mean_where_they_merged_again_since() -> None:
    """An attention with nothing before it but attention asks for the MLP above both, whose stream was finer."""
    model, clip = Blocks(steps="amaa").eval(), torch.randn(2, 3, 3, 8, 8)
    merged, (first, _, third) = readings_of(model, clip, "tokens", "mlp shift", schedule=(4, 3, 2))
    moved = model.moved(down(merged, 1, clip, first["tokens"]))
    assert_moved(third["mlp shift"], down(merged, 2, clip, moved))


def assert_moved(read: Tensor, moved: Tensor) -> None:
    torch.testing.assert_close(read, moved.norm(dim=-1))
    assert read.std() > 0.01


def down(merged: tldr_compile.MergedModule, number: int, clip: Tensor, rows: Tensor) -> Tensor:
    """Rows `[B, N, C]` merged as the merge of this number did it."""
    _, found = record(merged._merged.graph, merged._merged.groupings, merged._flat_inputs((clip,), {}))
    fields = [found[number][name] for name in ("kept", "source", "target", "kept_weight", "source_weight")]
    return ops.down(rows, *(each.unsqueeze(-1) for each in fields), dim=1)


def test_where_no_mlp_is_above_the_report_says_that_tokens_weigh_alike() -> None:
    model, clip = Blocks(steps="aamam").eval(), torch.randn(2, 3, 3, 8, 8)
    told = [
        [note for note in tldr_compile.explain(model, (clip,), schedule=[2, 2, 2], **options).notes if "mlp" in note]
        for options in ({"saliency": "mlp shift"}, {"saliency": "mlp shift", "reduction": "random"}, {})
    ]
    assert told[1:] == [[], []]
    assert len(told[0]) == 1
    assert told[0][0].startswith("'mlp shift' is 0 of all tokens of sites 0-1, above which no MLP lies")


def readings_of(
    model: nn.Module, clip: Tensor, *names: str, schedule: tuple[int, ...] = (4, 3)
) -> tuple[tldr_compile.MergedModule, list[dict[str, Tensor]]]:
    """A model merged, and what its sites were asked, one after the other, when it ran."""
    seen: list[dict[str, Tensor]] = []

    @ops.signal("noted", reads=names)
    def noted(*readings: Tensor) -> Tensor:
        seen.append(dict(zip(names, readings, strict=True)))
        return torch.ones(readings[0].shape[:2])

    merged = tldr_compile.apply(model, (clip,), schedule=schedule, saliency="noted")
    seen.clear()
    merged(clip)
    assert len(seen) == len(schedule)
    return merged, seen


def test_a_signal_in_a_graph_of_any_batch_has_gradients() -> None:
    """Of samples apart, compiled, and as differences say, which masses round: they are float32 in every model."""
    torch.manual_seed(1)  # no other tokens are merged at either end of the step
    model, clip = Blocks().eval().double(), torch.randn(3, 3, 3, 8, 8, dtype=torch.float64)
    program = torch.export.export(model, (clip,), dynamic_shapes=({0: torch.export.Dim("b", min=1, max=9)},))
    short = tldr_compile.apply(program, schedule=[4, 3], saliency="received", reduction="merge")
    torch.testing.assert_close(short(clip[:1]), short(clip)[:1])
    compiled, step = torch.compile(short, backend="aot_eager", fullgraph=True), torch.randn_like(clip)
    slopes = []
    for function in (short, compiled):
        given = clip.clone().requires_grad_()
        slopes.append(torch.autograd.grad(function(given).square().sum(), given)[0])
    torch.testing.assert_close(*slopes)
    above, below = (short(clip + sign * 1e-3 * step).square().sum() for sign in (1, -1))
    torch.testing.assert_close((slopes[0] * step).sum(), (above - below) / 2e-3, rtol=1e-3, atol=0)


def test_change_needs_frames_to_group() -> None:
    reason = r"saliency='change' needs the frame before, .* site 0 \(.*\) groups, h·w, are not .*; use saliency="
    with pytest.raises(OptionError, match=reason):
        merged(Recipe(embed="frames"), saliency="change")


def test_a_first_frame_is_all_new_where_nothing_changes() -> None:
    """Between two equal frames; the third differs at one of two places."""
    frame = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    clip = torch.stack((frame, frame, frame + torch.tensor([[0.0, 0.0], [0.5, -1.5]])))
    previous = torch.cat((torch.zeros(1, 2, 2), clip[:-1])).flatten(0, 1)[None]
    signal = ops.SIGNALS["change"].function
    assert signal(clip.flatten(0, 1)[None], previous).tolist() == [[1, 1, 0, 0, 0, 1]]
    still = torch.cat((frame, frame))[None]
    assert signal(still, torch.cat((0 * frame, frame))[None]).tolist() == [[1, 1, 0, 0]]
