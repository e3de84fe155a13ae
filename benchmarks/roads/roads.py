"""All roads, and the bound that each is held to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import tldr_compile
from benchmarks.roads import libraries, readers
from benchmarks.roads.subjects import SCHEDULE, Encoder, clips
from tldr_compile import writing

ROOT = Path(__file__).parents[2]
HERE = "tests/test_roads.py"


@dataclass(frozen=True)
class Road:
    """`walk()` gives the largest difference at each of its ends, which is at most `bound`.

    `ends` says how each is come to; `needs` is a package that the tests' extra does not bring.
    """

    name: str
    ends: Mapping[str, str]
    walk: Callable[[], dict[str, float]]
    bound: float = 1e-5
    test: str = HERE
    needs: str | None = None


def _road(
    name: str, how: str, run: Callable[[], float], bound: float = 1e-5, test: str = HERE, needs: str | None = None
) -> Road:
    return Road(name, {name: how}, lambda: {name: run()}, bound, test, needs)


ALONE = """
import sys
sys.modules["tldr_compile"] = None
import torch
for library in sys.argv[3:]:
    torch.ops.load_library(library)
READ
print(*torch.as_tensor(run(torch.load(sys.argv[2]))).flatten().tolist())
"""
READERS = {
    "pt2": "run = torch.export.load(sys.argv[1]).module()",
    "aoti": "run = torch._inductor.aoti_load_package(sys.argv[1])",
    "onnx": "import onnxruntime\nsession = onnxruntime.InferenceSession(sys.argv[1])\n"
    "run = lambda clip: session.run(None, {'clip': clip.numpy()})[0]",
}


def _written(form: str, native: bool = False) -> float:
    """A file of a portable program with any number of clips, read by a process in which this package is not."""
    shapes = {"clip": {0: torch.export.Dim("clips", min=1, max=8)}}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"encoder.{'onnx' if form == 'onnx' else 'pt2'}"
        merged = tldr_compile.apply(Encoder().eval(), (clips(),), schedule=SCHEDULE, dynamic_shapes=shapes)
        program = torch.export.export(tldr_compile.portable(merged, native=native), (clips(),), dynamic_shapes=shapes)
        writing.write(program, form, path)
        torch.save(clips(5), Path(folder) / "clips.pt")
        command = [sys.executable, "-c", ALONE.replace("READ", READERS[form]), str(path), f"{folder}/clips.pt"]
        if native:
            command.append(str(tldr_compile.write_library(folder)))
        out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
        return float((torch.tensor([*map(float, out.split())]) - merged(clips(5)).flatten()).abs().max())


DISTRIBUTED = dict.fromkeys(
    (
        "DDP(merged)",
        "DDP(torch.compile(model))",
        "torch.compile(DDP(model))",
        "fully_shard(merged)",
        "torch.compile(fully_shard(model))",
    ),
    "`torchrun`, one step on gloo",
)


def _distributed() -> dict[str, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    run = subprocess.run(
        [*command, "benchmarks.roads.distributed"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    far: dict[str, float] = json.loads(run.stdout.strip().splitlines()[-1])
    return far


def _in_cpp(native: bool = False) -> float:
    """A package for a reader that is compiled here and links to torch alone."""
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        package, reader = Path(folder) / "tiny.pt2", Path(folder) / "reader"
        merged = tldr_compile.apply(Encoder().eval(), (clips(),), schedule=SCHEDULE)
        writing.write(torch.export.export(tldr_compile.portable(merged, native=native), (clips(),)), "aoti", package)
        library = tldr_compile.write_library(folder) if native else None
        readers.build(reader)
        return float((readers.run(reader, package, clips(), library) - merged(clips()).flatten()).abs().max())


CACHED = {"warm cache": "`torch.compile` in a second process", "aot_compile": "`forward.aot_compile(...)` there"}


def _twice() -> dict[str, float]:
    """What a second process finds on disk."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
        for step in ("first", "second"):
            command = [sys.executable, "-m", "benchmarks.roads.twice", folder, step]
            subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=600)
        far: dict[str, float] = json.loads((Path(folder) / "second.json").read_text())["far"]
        return far


PORTABLE, CACHE = "tests/test_portable.py", "tests/test_cache.py"
NATIVE = "`tldr export --format aoti --native`"
ROADS = (
    _road("torch.export.save", "`tldr export --format pt2`", lambda: _written("pt2"), test=PORTABLE),
    _road("AOTInductor, Python", "`tldr export --format aoti`", lambda: _written("aoti"), test=PORTABLE),
    _road("AOTInductor, C++", "`AOTIModelPackageLoader`", _in_cpp, test=PORTABLE),
    _road("native operators, Python", f"{NATIVE}, `load_library`", lambda: _written("aoti", True), test=PORTABLE),
    _road("native operators, C++", f"{NATIVE}, `dlopen`", lambda: _in_cpp(True), test=PORTABLE),
    _road("ONNX, onnxruntime", "`tldr export --format onnx`", lambda: _written("onnx"), test=PORTABLE),
    _road("exported again", "`torch.export.export(merged, ..., dynamic_shapes=...)`", libraries.reexport),
    _road("deepcopy", "`copy.deepcopy(merged)`", libraries.deepcopy),
    _road("transformers Trainer, merged", "`Trainer(model=merged)`", libraries.trainer_merged),
    _road("transformers Trainer, compiled", '`model.compile(backend="tldr")`', libraries.trainer_compiled),
    _road("transformers pipeline", '`pipe.model.compile(backend="tldr")`, `pipe.model = merged`', libraries.pipelines),
    _road("accelerate", "`accelerator.prepare(merged, ...)`", libraries.accelerate),
    _road("peft", "`apply(get_peft_model(...), ...)`", libraries.peft),
    _road("torchao int8", "`quantize_(merged, config)`", libraries.torchao),
    _road("PT2E int8", "`prepare_pt2e(torch.export.export(portable, ...).module(), ...)`", libraries.pt2e, bound=5e-2),
    _road("diffusers", '`pipe.transformer.compile(backend="tldr")`', libraries.diffusers),
    _road("timm", '`torch.compile(frames, backend="tldr")`', libraries.timm, needs="timm"),
    Road("a second process", CACHED, _twice, test=CACHE),
    Road("two processes", DISTRIBUTED, _distributed),
)
