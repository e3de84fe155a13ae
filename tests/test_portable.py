"""Portable programs: the same numbers, in torch's own operators, where this package is not."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch._inductor.exc import InductorError, InvalidCxxCompiler
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_leaves

import tldr_compile
from benchmarks.roads import readers
from tests.tiny import Tiny, clip
from tldr_compile import CaptureError, MergedModule, OptionError, WriteError, apply, ops, writing
from tldr_compile.module import Kept

SHAPES = {"video": {0: Dim("clips", min=1, max=16)}}
WAYS = [
    {},
    {"saliency": "shift", "metric": "keys"},
    {"saliency": "uniform", "pooling": "plain", "proportional": False},
    {"saliency": "received"},
    {"saliency": "change"},
    {"reduction": "drop"},
    {"reduction": "random"},
    {"reduction": "slice"},
    {"reduction": "energy", "margin": 0.2},
    {"reduction": "affinity"},
]


def both(model: nn.Module, example: Tensor, **options: object) -> tuple[MergedModule, MergedModule]:
    merged = apply(model, (example,), **{"schedule": 0.3, **options})
    return merged, tldr_compile.portable(merged)


def namespaces(program: ExportedProgram | MergedModule) -> set[str]:
    graph = program.graph if isinstance(program, ExportedProgram) else program.graph_module.graph
    return {n.target.namespace for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)}


def loaded(script: str, *arguments: object) -> list[float]:
    """The numbers that a script prints in another process, in which this package cannot be imported."""
    alone = "import sys\nsys.modules['tldr_compile'] = None\n"
    command = [sys.executable, "-c", alone + script, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return [float(line) for line in run.stdout.split()]


def assert_printed(numbers: Sequence[float], wanted: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(numbers), wanted.flatten(), rtol=1e-5, atol=1e-5)


# --- the graph ---


@pytest.mark.parametrize("options", WAYS, ids=str)
@torch.no_grad()
def test_it_computes_the_same_in_torchs_own_operators(options: dict[str, object]) -> None:
    merged, portable = both(Tiny().eval(), clip(), **options)
    assert namespaces(portable) == {"aten"}
    assert not any("tldr" in str(node.target) for node in portable.graph_module.graph.nodes)
    torch.testing.assert_close(portable(clip()), merged(clip()), rtol=1e-5, atol=1e-5)
    assert str(portable.report) == str(merged.report)
    assert portable.get_parameter("head.weight") is merged.get_parameter("head.weight")


@torch.no_grad()
def test_any_number_of_clips_and_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.blocked, "DECOMPOSED_BYTES", 4096)
    merged = apply(Tiny().eval(), (clip(),), schedule=[5, 3], dynamic_shapes=SHAPES)
    portable = tldr_compile.portable(merged)
    once = tldr_compile.apply(Tiny().eval(), (clip(),), schedule=[5, 3], portable=True)
    monkeypatch.undo()
    whole = apply(Tiny().eval(), (clip(),), schedule=[5, 3], portable=True)
    assert len(once.graph_module.graph.nodes) > len(whole.graph_module.graph.nodes)
    for count in (1, 2, 7):
        torch.testing.assert_close(portable(clip(count)), merged(clip(count)), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_merged_module() -> None:
    merged, portable = both(Tiny().eval(), clip())
    grads = []
    for module in (merged, portable):
        module.zero_grad()
        module(clip()).square().sum().backward()
        grads.append([each.grad.clone() for each in module.parameters()])
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@torch.library.custom_op("tests_portable::length", mutates_args=())
def length(tokens: Tensor) -> Tensor:
    return tokens.float().norm(dim=-1)


@length.register_fake
def _(tokens: Tensor) -> Tensor:
    return tokens.new_empty(tokens.shape[:-1], dtype=torch.float32)


def test_an_operator_that_has_no_decomposition_is_named() -> None:
    ops.signal("opaque length", reads="tokens")(lambda tokens: ops.saliency(length(tokens)))
    try:
        with pytest.raises(OptionError, match=r"portable=True: .* calls tests_portable::length, which is no"):
            apply(Tiny().eval(), (clip(),), schedule=[5], saliency="opaque length", portable=True)
    finally:
        del ops.SIGNALS["opaque length"]


def test_torch_compile_has_no_use_for_it() -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="portable=True: a compiled model stays in this"):
        torch.compile(Tiny().eval(), backend="tldr", options={"portable": True})(clip())


class Tokens(Tiny):
    def forward(self, video: Tensor) -> Tensor:
        tokens: Tensor = super().forward(video, tokens=True)["tokens"]
        return tokens


@torch.no_grad()
def test_what_is_exported_needs_no_class_of_this_package() -> None:
    options = {"outputs": "merged", "return_places": True}
    merged, portable = both(Tokens(1).eval(), clip(), **options)
    found, wanted = torch.export.export(portable, (clip(),)).module()(clip()), merged(clip())
    assert type(found[1]) is tuple
    assert type(portable(clip())[1]) is type(wanted[1]) is Kept
    torch.testing.assert_close((found[0], *found[1]), (wanted[0], *wanted[1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("portable", [True, False])
@torch.no_grad()
def test_what_is_exported_is_not_merged_once_more(portable: bool, tmp_path: Path) -> None:
    program = torch.export.export(apply(Tiny(1).eval(), (clip(),), schedule=[5], portable=portable), (clip(),))
    torch.export.save(program, tmp_path / "tiny.pt2")
    for each in (program, torch.export.load(tmp_path / "tiny.pt2")):
        with pytest.raises(CaptureError, match="merged already: apply tldr_compile to the model that it was made of"):
            apply(each, schedule=[5])


# --- the formats, each read where this package is not ---

PT2 = """
import torch
out = torch.export.load(sys.argv[1]).module()(torch.load(sys.argv[2]))
print(*out.flatten().tolist())
"""

AOTI = """
import os, torch
os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"
clip, portable, library, native = sys.argv[1:]
run = torch._inductor.aoti_load_package(portable)
print(*run(torch.load(clip)).flatten().tolist())
try:
    run(torch.load(clip).double())
except RuntimeError:
    pass
else:
    raise SystemExit("a package that was told to check took float64")
torch.ops.load_library(library)
print(*torch._inductor.aoti_load_package(native)(torch.load(clip)).flatten().tolist())
"""


@pytest.fixture(scope="module")
def tiny() -> tuple[MergedModule, ExportedProgram]:
    with torch.no_grad():
        merged = apply(Tiny(1).eval(), (clip(),), schedule=[5], dynamic_shapes=SHAPES)
        return merged, torch.export.export(tldr_compile.portable(merged), (clip(),), dynamic_shapes=SHAPES)


@torch.no_grad()
def test_torch_export(tiny: tuple[MergedModule, ExportedProgram], tmp_path: Path) -> None:
    merged, program = tiny
    assert namespaces(program) == {"aten"}
    writing.write(program, "pt2", tmp_path / "tiny.pt2")
    torch.save(clip(1), tmp_path / "clip.pt")
    assert_printed(loaded(PT2, tmp_path / "tiny.pt2", tmp_path / "clip.pt"), merged(clip(1)))


@torch.no_grad()
def test_aot_inductor_in_python_and_in_cpp(tiny: tuple[MergedModule, ExportedProgram], tmp_path: Path) -> None:
    merged, program = tiny
    module = tldr_compile.portable(merged, native=True)
    torch.testing.assert_close(module(clip(5)), merged(clip(5)), rtol=1e-5, atol=1e-5)
    native = torch.export.export(module, (clip(),), dynamic_shapes=SHAPES)
    assert namespaces(native) == {"aten", "tldr_native"}
    packages = tmp_path / "tiny.pt2", tmp_path / "native.pt2"
    library = tldr_compile.write_library(tmp_path)
    assert library.name == "libtldr_native.so"
    with inductor.patch({"cpp.simdlen": 1}):  # C++ without vectors compiles in a fraction of the time
        for each, package in zip((program, native), packages, strict=True):
            writing.write(each, "aoti", package)
    torch.save(clip(5), tmp_path / "clip.pt")
    printed = loaded(AOTI, tmp_path / "clip.pt", packages[0], library, packages[1])
    assert_printed(printed, torch.stack([merged(clip(5))] * 2))

    readers.build(tmp_path / "reader")
    for package, needed in zip(packages, (None, library), strict=True):
        found = readers.run(tmp_path / "reader", package, clip(2), needed)
        torch.testing.assert_close(found, merged(clip(2)).flatten(), rtol=1e-5, atol=1e-5)
    with pytest.raises(subprocess.CalledProcessError) as without:
        readers.run(tmp_path / "reader", packages[1], clip(2))
    assert "tldr_native::attend" in without.value.stderr

    torch.ops.load_library(str(library))  # in this process they are registered already
    torch.testing.assert_close(module(clip(5)), merged(clip(5)), rtol=1e-5, atol=1e-5)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="derivative for tldr_native::attend_and_sharpness is"):
        module(clip()).sum().backward()
    q, k, v = torch.randn(3, 2, 2, 5, 4).double()
    with pytest.raises(RuntimeError, match="tldr_native computes in float32, and the queries are Double: write the"):
        torch.ops.tldr_native.attend_and_sharpness(q, k, v, 0.5, None, None)
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    for mask, log_mass in itertools.product((torch.randn(5, 5), torch.rand(5, 5) < 0.8), torch.rand(2, 1, 1, 5)):
        arguments = q, k, v, 0.5, mask, log_mass
        found = torch.ops.tldr_native.attend(*arguments), *torch.ops.tldr_native.attend_and_sharpness(*arguments)
        out, sharpness = ops.reference.attention_with_sharpness(q, k, v, scale=0.5, mask=mask, log_mass=log_mass)
        torch.testing.assert_close(found, (out, out, sharpness), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"tldr_native takes masses that only differ by key, not \[5, 5\]"):
        torch.ops.tldr_native.attend(q, k, v, 0.5, None, torch.rand(5, 5))


def test_what_native_operators_cannot_compute_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    like = {"attend_and_sharpness": torch.ops.tldr.attend_and_sharpness.default}
    monkeypatch.setattr(ops.native, "operators", lambda: like)
    with pytest.raises(OptionError, match=r"native': the operator in C\+\+ cannot compute .*: it computes in float32"):
        apply(Tiny(1).eval().double(), (clip().double(),), schedule=[5], portable="native")

    monkeypatch.setattr(ops.native, "operators_library", lambda: Path(__file__))
    with pytest.raises(WriteError, match=r"missing/libtldr_native.so cannot be written: .*No such file"):
        tldr_compile.write_library(tmp_path / "missing")

    def no_compiler() -> None:
        raise InvalidCxxCompiler("/bin/false")

    monkeypatch.setattr(ops.native, "operators", no_compiler)
    for call in (
        lambda: apply(Tiny(1).eval(), (clip(),), schedule=[5], portable="native"),
        lambda: tldr_compile.write_library(tmp_path),
    ):
        with pytest.raises(WriteError, match=r"portable='native' needs a C\+\+ compiler that works: .* variable CXX"):
            call()


@pytest.mark.parametrize("options", [WAYS[1]], ids=str)
@torch.no_grad()
def test_onnx(options: dict[str, object], tmp_path: Path) -> None:
    merged, portable = both(Tiny().eval(), clip(), **options, dynamic_shapes=SHAPES)
    program = torch.export.export(portable, (clip(),), dynamic_shapes=SHAPES)
    writing.write(program, "onnx", tmp_path / "tiny.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "tiny.onnx")
    assert [each.name for each in session.get_outputs()] == ["output"]
    for count in (1, 2, 5):
        (out,) = session.run(None, {"video": clip(count).numpy()})
        torch.testing.assert_close(torch.from_numpy(out), merged(clip(count)), rtol=1e-5, atol=1e-5)


class Several(nn.Module):
    """Several outputs, under names that others have: `video` an input, `positions` a parameter, `add` a value."""

    def __init__(self, structure: Callable[..., object]) -> None:
        super().__init__()
        self.structure, self.positions = structure, nn.Parameter(torch.randn(3))

    def forward(self, video: Tensor) -> object:
        return self.structure(video, video + self.positions)


class Named(NamedTuple):
    logits: Tensor
    layers: tuple[Tensor, ...]


NAMES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "output_0_0 output_2_tokens": lambda x, y: ([y], None, {"tokens": x}),
    "logits layers_0 layers_1": lambda x, y: Named(y, (y + 1, y + 2)),
    "positions video_1 add": lambda x, y: {"positions": y.sin(), "video": y.cos(), "add": y.exp()},
}


@pytest.mark.parametrize("names", NAMES)
@torch.no_grad()
def test_onnx_outputs_have_the_names_that_the_model_gives_them(names: str, tmp_path: Path) -> None:
    model, path, video = Several(NAMES[names]), str(tmp_path / "several.onnx"), torch.randn(2, 3)
    writing.write(torch.export.export(model, (video,)), "onnx", path)
    session = onnxruntime.InferenceSession(path)
    assert [each.name for each in session.get_inputs()] == ["video"]
    assert [each.name for each in session.get_outputs()] == names.split()
    wanted = [each for each in tree_leaves(model(video)) if each is not None]
    for out, each in zip(session.run(None, {"video": video.numpy()}), wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(out), each)


class Measuring(nn.Module):
    def forward(self, video: Tensor) -> Tensor:
        return length(video.flatten(2))


def test_what_cannot_be_written_is_said(
    tiny: tuple[MergedModule, ExportedProgram], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, program = tiny
    with pytest.raises(OptionError, match="format 'tflite': there are pt2, aoti, onnx"):
        writing.write(program, "tflite", tmp_path / "tiny.tflite")
    with pytest.raises(OptionError, match=r"tiny.pt: a file in the format pt2 has to end in .pt2"):
        writing.write(program, "pt2", tmp_path / "tiny.pt")
    for form, (suffix, _) in writing.FORMATS.items():
        with pytest.raises(WriteError, match=f"cannot be written in the format {form}: .*No such file or directory"):
            writing.write(program, form, tmp_path / "missing" / f"tiny{suffix}")
    foreign = torch.export.export(Measuring(), (clip(),))
    with pytest.raises(WriteError, match=r"torch.onnx.export cannot write this program: .*length"):
        writing.write(foreign, "onnx", tmp_path / "tiny.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(WriteError, match=r"needs the package 'onnxscript': pip install 'tldr-compile\[onnx\]'"):
        writing.write(program, "onnx", tmp_path / "tiny.onnx")


def test_a_program_that_needs_this_package_is_not_written(tmp_path: Path) -> None:
    program = torch.export.export(apply(Tiny().eval(), (clip(),), schedule=0.3), (clip(),))
    for form, name in (("pt2", "tiny.pt2"), ("onnx", "tiny.onnx")):
        with pytest.raises(OptionError, match=r"calls tldr\..*: export tldr_compile\.portable\(merged\)"):
            writing.write(program, form, tmp_path / name)
        assert not (tmp_path / name).exists()


class Counting(Tiny):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__(1)
        self.register_buffer("calls", torch.zeros(()))

    def embed(self, video: Tensor) -> Tensor:
        return super().embed(video) + self.calls.add_(1)


@torch.no_grad()
def test_buffers_that_change_stay_out_of_onnx(tmp_path: Path) -> None:
    _, portable = both(Counting().eval(), clip())
    program = torch.export.export(portable, (clip(),))
    with pytest.raises(WriteError, match="a call changes the buffers calls, which an ONNX file cannot hold"):
        writing.write(program, "onnx", tmp_path / "counting.onnx")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_a_compiler_that_does_not_work(
    tiny: tuple[MergedModule, ExportedProgram], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise InductorError(InvalidCxxCompiler("/bin/false"), None)  # as torch wraps it

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", no_compiler)
    with pytest.raises(WriteError, match=r"AOTInductor needs a C\+\+ compiler that works: .* variable CXX. The reason"):
        writing.write(tiny[1], "aoti", tmp_path / "tiny.pt2")
