"""Portable programs as files, for readers without this package: one function for each format.

portable module -- torch.export --> program --> pt2    torch.export.load
                                           --> aoti   torch._inductor.aoti_load_package, AOTIModelPackageLoader in C++
                                           --> onnx   onnxruntime

With `portable="native"` the first two need a library beside them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from shutil import copyfile

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils._pytree import KeyPath, tree_leaves_with_path, tree_unflatten

from tldr_compile import ops
from tldr_compile.errors import OptionError, WriteError
from tldr_compile.portable import native_operators, needs_compiler

LIBRARY = "libtldr_native.so"


def pt2(program: ExportedProgram, path: Path) -> None:
    """`torch.export.save`."""
    torch.export.save(program, path)


def aoti(program: ExportedProgram, path: Path) -> None:
    """AOTInductor: machine code for this device, with the weights."""
    # Importing Inductor takes seconds.
    from torch._inductor import aoti_compile_and_package  # noqa: PLC0415
    from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler  # noqa: PLC0415

    try:
        aoti_compile_and_package(program, package_path=str(path))
    except InductorError as wrapped:
        reason = wrapped.inner_exception
        if isinstance(reason, (CppCompileError, InvalidCxxCompiler)):
            raise needs_compiler("AOTInductor", reason) from reason
        raise WriteError(f"AOTInductor cannot compile this program: {wrapped}") from wrapped


def onnx(program: ExportedProgram, path: Path) -> None:
    """ONNX, with the weights in the file where they fit, beside it (`.data`) where not.

    Inputs have the names of the arguments, outputs those under which the model returns them (`_output_names`).
    """
    try:
        import onnxscript  # noqa: F401, PLC0415 - optional
    except ModuleNotFoundError as missing:
        raise WriteError(
            f"the format onnx needs the package {missing.name!r}: pip install 'tldr-compile[onnx]'"
        ) from missing
    from onnx_ir.passes.common import NameFixPass  # noqa: PLC0415 - with onnxscript
    from torch.onnx.errors import OnnxExporterError  # noqa: PLC0415 - with onnxscript

    try:
        written = torch.onnx.export(program, dynamo=True, verbose=False)
    except OnnxExporterError as reason:
        raise WriteError(f"torch.onnx.export cannot write this program: {_innermost(reason)}") from reason
    assert written is not None
    assert written.exported_program is not None
    changed = written.exported_program.graph_signature.buffers_to_mutate.values()
    if changed:
        raise WriteError(
            f"a call changes the buffers {', '.join(changed)}, which an ONNX file cannot hold: write it in the format "
            "pt2 or aoti, or a model that leaves them as they are"
        )
    graph = written.model.graph
    for values, names in ((graph.inputs, _input_names(program)), (graph.outputs, _output_names(program))):
        for value, name in zip(values, names, strict=True):
            value.name = name
    NameFixPass()(written.model)  # what is inside makes way: two values of one name make no valid file
    written.save(str(path))


def _input_names(program: ExportedProgram) -> list[str]:
    specs = (spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT)
    return [spec.arg.name for spec in specs if not isinstance(spec.arg, ConstantArgument)]


def _output_names(program: ExportedProgram) -> list[str]:
    """Keys and places on the way to each tensor: `logits`, `hidden_states_0`; what has no key is an `output`.

    A tensor alone is `output`, those of a tuple are `output_0`, `output_1`.
    """
    spec = program.call_spec.out_spec
    assert spec is not None
    paths = [path for path, _ in tree_leaves_with_path(tree_unflatten(range(spec.num_leaves), spec))]
    specs = (each for each in program.graph_signature.output_specs if each.kind is OutputKind.USER_OUTPUT)
    return [
        _joined(path) for path, each in zip(paths, specs, strict=True) if not isinstance(each.arg, ConstantArgument)
    ]


def _joined(path: KeyPath) -> str:
    keys = [getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))) for entry in path]
    unnamed = not keys or not isinstance(keys[0], str)
    return "_".join(map(str, ("output", *keys) if unnamed else keys))


def _innermost(reason: BaseException) -> str:
    """The first line of the reason of the reasons: the others are advice and environment."""
    while reason.__cause__ is not None:
        reason = reason.__cause__
    return str(reason).strip().splitlines()[0]


FORMATS: Mapping[str, tuple[str, Callable[[ExportedProgram, Path], None]]] = {
    "pt2": (".pt2", pt2),
    "aoti": (".pt2", aoti),
    "onnx": (".onnx", onnx),
}
"""What a file has to end in, and what writes it."""


def write(program: ExportedProgram, form: str, path: str | os.PathLike[str]) -> None:
    """Write a program of a portable module to a file.

    Raises `OptionError` for a format that there is not, a file name that it does not take, or a program that only runs
    where this package is, and `WriteError` where the file cannot be written, or what writes the format is missing or
    refuses the program.
    """
    path = Path(path)
    check(form, path)
    _check_portable(program)
    _, writer = FORMATS[form]
    new = not path.exists()
    try:
        path.open("ab").close()  # torch's archives tell of a missing folder in a RuntimeError, after all the work
        if new:
            path.unlink()
        writer(program, path)
    except OSError as reason:
        raise WriteError(f"{path} cannot be written in the format {form}: {reason}") from reason


def check(form: str, path: Path) -> None:
    """Raise `OptionError` as `write` does."""
    if form not in FORMATS:
        raise OptionError(f"format {form!r}: there are {', '.join(FORMATS)}")
    suffix, _ = FORMATS[form]
    if path.suffix != suffix:
        raise OptionError(f"{path}: a file in the format {form} has to end in {suffix}")


def _check_portable(program: ExportedProgram) -> None:
    for graph in program.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
            if getattr(node.target, "namespace", None) == "tldr":
                raise OptionError(
                    f"{node.name} calls {node.target}, an operator of tldr-compile, which a reader without it lacks: "
                    "export tldr_compile.portable(merged) in place of merged"
                )


def write_library(folder: str | os.PathLike[str]) -> Path:
    """Write `libtldr_native.so` into a folder that there is: operators of programs with `portable="native"`.

    It is for this machine's kind of CPU and this version of torch. Load it before the program: in Python by
    `torch.ops.load_library(path)`, in C++ by linking to it or `dlopen`.

    Raises `WriteError`: no C++ compiler works, or the file cannot be written.
    """
    native_operators()
    path = Path(folder) / LIBRARY
    try:
        copyfile(ops.native.operators_library(), path)
    except OSError as reason:
        raise WriteError(f"{path} cannot be written: {reason}") from reason
    return path
