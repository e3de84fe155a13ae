"""A merged module among other modules: moved, copied, pickled, hooked, quantised, trained."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tldr_compile
from tests.test_api import Rich, rich
from tests.tiny import Tiny, clip
from tldr_compile import CaptureError, MergedModule, OptionError, ShapeError, apply, ops


def merged_tiny(model: nn.Module | None = None, **options: Any) -> MergedModule:
    return apply(Tiny().eval() if model is None else model, (clip(),), **{"schedule": [5, 3], **options})


# --- dtypes ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_it_goes_into_another_dtype(dtype: torch.dtype) -> None:
    model = Tiny().eval()
    wanted = apply(copy.deepcopy(model).to(dtype), (clip().to(dtype),), schedule=[5, 3])(clip().to(dtype))
    merged = merged_tiny(model).to(dtype)
    assert merged(clip().to(dtype)).dtype == dtype
    assert torch.equal(merged(clip().to(dtype)), wanted)
    with pytest.raises(ShapeError, match=f"input 'video': expected {dtype}, got torch.float32"):
        merged(clip())
    merged.verify((clip().to(dtype),))
    assert len(tldr_compile.inspect(merged, clip().to(dtype))) == 2


class Cast(Tiny):
    """In the dtype of its weights when it is captured, whatever comes in."""

    def embed(self, video: Tensor) -> Tensor:
        return super().embed(video) + torch.zeros(1, 18, 16, dtype=self.positions.dtype)


def test_a_dtype_that_its_graph_cannot_follow_is_refused_by_the_move_itself() -> None:
    merged = merged_tiny(Cast().eval())
    with pytest.raises(CaptureError, match=r"does not run when they go from torch.float32 to torch.bfloat16: .*py"):
        merged.to(torch.bfloat16)
    assert {each.dtype for each in merged.parameters()} == {torch.float32}
    assert merged(clip()).dtype == torch.float32


class Table(Tiny):
    """A table in float32 goes with float64, and not with anything narrower."""

    def embed(self, video: Tensor) -> Tensor:
        return super().embed(video) + torch.arange(18.0).view(1, 18, 1)


def test_a_move_is_judged_by_where_the_move_before_it_led() -> None:
    merged = merged_tiny(Table().eval()).double()
    with pytest.raises(CaptureError, match=r"does not run when they go from torch.float64 to torch.float16"):
        merged.half()
    assert merged(clip().double()).dtype == torch.float64


def test_a_portable_graph_stays_in_its_dtypes(caplog: pytest.LogCaptureFixture) -> None:
    moved = merged_tiny().bfloat16()
    with pytest.raises(CaptureError, match=r"from torch.float32 to torch.bfloat16: .*apply tldr_compile to that"):
        tldr_compile.portable(moved)
    assert moved(clip().bfloat16()).dtype == torch.bfloat16
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addHandler(caplog.handler)
    with pytest.raises(CaptureError, match=r"float64: scatter_add.* Expected self.dtype to be equal to src.dtype"):
        merged_tiny(portable=True).double()
    assert not caplog.records
    log.error("still heard")
    log.removeHandler(caplog.handler)
    assert [each.message for each in caplog.records] == ["still heard"]


# --- copies ---


def test_it_is_pickled() -> None:
    merged = rich(Rich(), schedule=[5])
    args, kwargs = ({"video": clip()},), {"flag": True, "bias": torch.ones(5)}
    written = io.BytesIO()
    torch.save(merged, written)
    again = torch.load(io.BytesIO(written.getvalue()), weights_only=False)
    wanted, found = merged(*args, **kwargs), again(*args, **kwargs)
    assert torch.equal(found["logits"], wanted["logits"])
    assert str(again.report) == str(merged.report)
    assert list(again.state_dict()) == list(merged.state_dict())
    assert again.get_parameter("tied.weight") is again.get_parameter("head.weight")
    again.verify(args, kwargs)


def test_a_moved_one_and_a_trained_one_are_pickled_as_they_are() -> None:
    model = Tiny().eval()
    merged = merged_tiny(model)
    with torch.no_grad():
        model.head.weight.add_(1)
    merged.double()
    merged.training = True
    again = pickle.loads(pickle.dumps(merged))
    assert torch.equal(again(clip().double()), merged(clip().double()))
    assert again.training
    assert again.get_parameter("head.weight") is again._facts.origin.model.head.weight


def test_a_signal_that_nobody_registered_here_is_named_when_it_is_loaded() -> None:
    ops.signal("elsewhere", reads="tokens")(lambda tokens: ops.saliency(tokens.float().norm(dim=-1)))
    try:
        written = pickle.dumps(merged_tiny(saliency="elsewhere"))
    finally:
        del ops.SIGNALS["elsewhere"]
    with pytest.raises(OptionError, match="saliency='elsewhere': saliency is one of 'attention', "):
        pickle.loads(written)


SPAWNED = """
import sys, torch
merged, video = torch.load(sys.argv[1], weights_only=False)
torch.save(merged(video), sys.argv[2])
"""


def test_another_process_loads_it(tmp_path: Any) -> None:
    merged = merged_tiny()
    torch.save((merged, clip()), tmp_path / "merged.pt")
    files = tmp_path / "merged.pt", tmp_path / "out.pt"
    subprocess.run([sys.executable, "-c", SPAWNED, *files], check=True, timeout=300)
    assert torch.equal(torch.load(tmp_path / "out.pt"), merged(clip()))


def test_weights_are_given_to_it() -> None:
    merged, other = merged_tiny(), merged_tiny()
    merged.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(merged(clip()), other(clip()))


def test_models_of_one_kind_are_stacked() -> None:
    models, video = [merged_tiny() for _ in range(3)], clip()
    params, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    found = torch.func.vmap(lambda *state: torch.func.functional_call(base, state, (video,)))(params, buffers)
    torch.testing.assert_close(found, torch.stack([model(video) for model in models]))
    with pytest.raises(RuntimeError, match="of the same class"):  # it would take the first one's schedule for all
        torch.func.stack_module_state([models[0], merged_tiny(schedule=[4, 3])])


class Naming(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.model, self.name = Tiny(), name

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        return {self.name: self.model(video)}


def test_models_that_return_other_things_are_of_another_kind() -> None:
    one, same, other = (merged_tiny(Naming(name).eval()) for name in ("a", "a", "b"))
    assert type(one) is type(same) is not type(other)


def test_functions_of_one_name_are_of_another_kind() -> None:
    merged = []
    for scale in (1.0, 2.0):
        ops.SIGNALS.pop("mine", None)
        ops.signal("mine", reads="tokens")(lambda tokens, scale=scale: ops.saliency(scale * tokens.norm(dim=-1)))
        merged += [merged_tiny(saliency="mine"), merged_tiny(saliency="mine")]
    assert type(merged[0]) is type(merged[1]) is not type(merged[2])


# --- hooks, modes, layers ---


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_a_hook_on_a_layer_is_refused(register: str) -> None:
    merged = merged_tiny()
    with pytest.raises(CaptureError, match="would never run: the layer is part of a graph"):
        getattr(merged.get_submodule("blocks.1"), register)(lambda *_: None)
    with pytest.raises(CaptureError, match="call the merged module itself"):
        merged.get_submodule("blocks.1.qkv")(torch.ones(1, 16))


def test_a_hook_on_all_of_it_runs() -> None:
    merged, seen = merged_tiny(), []
    merged.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    merged(clip())
    assert seen == [(2, 5)]


def test_hooks_on_the_model_are_told_of() -> None:
    model, seen = Tiny().eval(), []
    model.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out))
    with pytest.warns(UserWarning, match="there are hooks on blocks.1: they run once, while the model is captured"):
        merged = merged_tiny(model)
    before = len(seen)
    merged(clip())
    assert len(seen) == before


def test_it_is_in_the_mode_of_the_model() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not merged_tiny().training
        merged = merged_tiny(Tiny())
        assert merged.training
        assert merged.train().training
    with pytest.warns(UserWarning, match=r"captured in train mode and stays in it .* apply tldr_compile to model.eval"):
        merged.eval()
    assert not merged.training


def test_its_linear_layers_are_found_and_what_takes_their_place_is_refused() -> None:
    model = Tiny().eval()
    merged = merged_tiny(model)
    found = {name for name, module in merged.named_modules() if isinstance(module, nn.Linear)}
    assert found == {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert list(merged.state_dict()) == list(model.state_dict())
    head = merged.get_submodule("head")
    assert (head.in_features, head.out_features) == (16, 5)
    merged.add_module("head", _Other())
    with pytest.raises(CaptureError, match="head is a _Other now, which a merged module's graph never calls"):
        merged(clip())


class _Other(nn.Module):
    def weight(self) -> None:
        """As `torch.ao.nn.quantized.dynamic.Linear` has one."""

    bias = weight
