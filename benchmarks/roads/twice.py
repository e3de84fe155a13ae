"""Two processes that share a cache: each compiles a small model in several ways, and writes down what it found.

    python -m benchmarks.roads.twice FOLDER first    # compiles, and saves what torch can save
    python -m benchmarks.roads.twice FOLDER second   # finds all of it: in the folder of caches, or in what was saved
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.cpp_builder import CppBuilder

import tldr_compile
from benchmarks.roads.subjects import Encoder, clips

OPTIONS = {"schedule": [5]}

inductor.compile_threads = 1
inductor.cpp.simdlen = 1  # C++ without vectors compiles in a fraction of the time


def calls(model: Encoder) -> list[Tensor]:
    """Inference at one size, and training with a batch of any size; one compiled graph each."""
    torch.compiler.reset()
    compiled = torch.compile(model, backend="tldr", options=OPTIONS)
    with torch.no_grad():
        out = compiled(clips())
    video = clips(3)
    torch._dynamo.mark_dynamic(video, 0)
    trained = compiled(video)
    return [out, trained.detach(), *torch.autograd.grad(trained.square().sum(), list(model.parameters()))]


def counted(model: Encoder) -> tuple[list[Tensor], dict[str, int]]:
    """The results, and how often each cache was hit or missed."""
    counters.clear()
    results = calls(model)
    return results, {
        name: count
        for group in ("aot_autograd", "inductor")
        for name, count in counters[group].items()
        if name.startswith(("autograd_cache", "fxgraph_cache"))
    }


def first(folder: Path, model: Encoder, report: dict[str, Any]) -> None:
    results, report["counts"] = counted(model)
    saved = torch.compiler.save_cache_artifacts()
    assert saved is not None
    (folder / "artifacts").write_bytes(saved[0])
    torch.save(results, folder / "results")
    if torch._dynamo.config.enable_aot_compile:  # torch 2.11 has it switched off, and for its own backends alone
        whole = torch.compile(model, fullgraph=True, backend="tldr", options=OPTIONS)
        with torch.no_grad():
            whole.forward.aot_compile(((clips(),), {})).save_compiled_function(str(folder / "ahead"))


def second(folder: Path, model: Encoder, report: dict[str, Any]) -> None:
    built: list[str] = []
    real = CppBuilder.build
    CppBuilder.build = lambda builder: built.append(builder.get_target_file_path()) or real(builder)
    wanted = torch.load(folder / "results")
    results, report["counts"] = counted(model)
    torch.testing.assert_close(results, wanted, rtol=0, atol=0)
    with torch.no_grad():
        merged = tldr_compile.apply(model, (clips(),), **OPTIONS)(clips())
    report["far"] = {"warm cache": float((results[0] - merged).abs().max())}
    if torch._dynamo.config.enable_aot_compile:
        with torch.no_grad(), (folder / "ahead").open("rb") as file:
            ahead = torch.compiler.load_compiled_function(file)
            found = ahead(model, clips())
            torch.testing.assert_close(found, wanted[0], rtol=0, atol=0)
        report["far"]["aot_compile"] = float((found - merged).abs().max())
    report["built"] = [path for path in built if path.endswith(".so")]
    # Torch's artifacts hold no programs, so what is loaded already is not compiled anew for this.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "empty")
    torch.compiler.load_cache_artifacts((folder / "artifacts").read_bytes())
    results, report["counts from artifacts"] = counted(model)
    torch.testing.assert_close(results, wanted, rtol=0, atol=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    told: dict[str, Any] = {}
    place, step = Path(sys.argv[1]), {"first": first, "second": second}[sys.argv[2]]
    step(place, Encoder(depth=1), told)
    (place / f"{sys.argv[2]}.json").write_text(json.dumps(told))
