"""Compiled code that lies on disk: found again by another process, and never by a model that it was not made for."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._functorch._aot_autograd import autograd_cache

from tests.tiny import Tiny, clip
from tldr_compile import cache, ops
from tldr_compile.config import TokenMerging

BASE: dict[str, Any] = {"schedule": [5]}
CHANGES: dict[str, Any] = {
    "schedule": [4],
    "budget": 0.8,
    "saliency": "shift",
    "metric": "keys",
    "reduction": "random",
    "outputs": "merged",
    "pooling": "plain",
    "proportional": False,
    "protect": 0,
    "clip": ["video"],
    "grouping": "each",
    "on_nothing": "warn",
    "verify": True,
    "inductor": {"max_fusion_size": 63},
    "made_for": {"sites": 2},
}


class Looked(BaseException):
    """Raised where AOTAutograd's cache is asked: what comes after takes seconds."""


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str | None, str]]:
    """Under what key AOTAutograd's cache looks for a model, None where it is passed by; and the graph, written down."""
    found: list[tuple[str | None, str]] = []
    real = autograd_cache.autograd_cache_key

    def noting(graph: fx.GraphModule, *args: Any) -> None:
        code = graph.code
        try:
            found.append((real(graph, *args)[0], code))
        except autograd_cache.BypassAOTAutogradCache:
            found.append((None, code))
        raise Looked

    def looked(model: nn.Module, **options: Any) -> tuple[str | None, str]:
        torch.compiler.reset()
        with pytest.raises(Looked), torch.no_grad():
            torch.compile(model, backend="tldr", options={**BASE, **options})(clip(), tokens=True)
        return found[-1]

    monkeypatch.setattr(autograd_cache, "autograd_cache_key", noting)
    return looked


@pytest.fixture
def key(looked: Callable[..., tuple[str | None, str]]) -> Callable[..., str | None]:
    """The key alone, of a model that may be any."""
    return lambda model=None, **options: looked(model or Tiny(depth=1), **options)[0]


def test_code_is_found_where_the_graph_and_inductors_options_are_the_same(
    looked: Callable[..., tuple[str | None, str]],
) -> None:
    assert {*CHANGES, "return_places", "portable", "margin"} == {each.name for each in dataclasses.fields(TokenMerging)}
    key, code = looked(Tiny())
    assert key is not None
    instead = {"budget": {"schedule": None}}
    found = {name: looked(Tiny(), **{**instead.get(name, {}), name: value}) for name, value in CHANGES.items()}
    hits = [name for name, (other, _) in found.items() if other == key]
    assert hits == [name for name, (_, other) in found.items() if other == code and name != "inductor"]
    assert hits == ["protect", "clip", "grouping", "on_nothing", "verify", "made_for"]
    margins = [looked(Tiny(), reduction="energy", margin=margin)[0] for margin in (None, 0.2, 0.3)]
    assert None not in margins
    assert len(set(margins)) == 3


def test_what_decides_the_functions_of_ops_is_a_part_of_the_key(
    key: Callable[..., str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [key()]
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_sources", lambda: "another version")
        keys.append(key())
    for providers in ops.PROVIDERS.values():
        with monkeypatch.context() as patch:
            patch.setattr(providers, "order", providers.order[1:])
            keys.append(key())
    flash = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(not flash)
    try:
        keys.append(key())
    finally:
        torch.backends.cuda.enable_flash_sdp(flash)
    assert None not in keys
    assert len(set(keys)) == len(keys) == 3 + len(ops.PROVIDERS)
    assert key() == keys[0]


def test_every_source_of_ops_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = cache._sources()
    with resources.as_file(resources.files(ops)) as folder:
        copy = shutil.copytree(folder, tmp_path / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache.resources, "files", lambda package: copy)
    read = cache._sources.__wrapped__
    assert read() == digest
    digests = {digest}
    for file in (copy / "grouping.py", copy / "attention.cpp"):
        file.write_bytes(file.read_bytes() + b"\n")
        digests.add(read())
    assert len(digests) == 3


def test_the_cache_is_passed_by_where_a_function_comes_from_outside(
    key: Callable[..., str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ops.signal("here", reads="tokens")(lambda tokens: tokens.float().norm(dim=-1))
    ops.metric("here", reads="tokens")(lambda tokens: tokens * 2)
    ops.reduction("here", gives=True)(lambda tokens: ops.REDUCTIONS["merge"].choose(tokens))
    assert key(saliency="here") is None
    assert key(metric="here") is None
    assert key(reduction="here") is None
    assert key() is not None  # nobody's function takes part
    outside = ops.Provider("here", lambda *_: "it serves nothing", ops.match)
    with monkeypatch.context() as patch:
        patch.setattr(ops.PROVIDERS["match"], "order", [outside, *ops.PROVIDERS["match"].order])
        assert key() is None
    ops.reduction("merge", gives=True)(lambda tokens: ops.REDUCTIONS["slice"].choose(tokens))
    assert key() is None


class Scaled(Tiny):
    """Its pixels are multiplied by numbers that are written in its code."""

    def __init__(self, red: float) -> None:
        super().__init__()
        self.red = red

    def embed(self, video: Tensor) -> Tensor:
        return super().embed(video * torch.tensor([self.red, 1.0, 1.0]).view(3, 1, 1, 1))


def test_the_values_of_constants_are_a_part_of_the_key(key: Callable[..., str | None]) -> None:
    assert key(Scaled(2.0)) == key(Scaled(2.0)) != key(Scaled(3.0))


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    reports = []
    for step in ("first", "second"):
        places = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "c")}
        command = [sys.executable, "-m", "benchmarks.roads.twice", str(tmp_path), step]
        done = subprocess.run(command, env={**os.environ, **places}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        reports.append(json.loads((tmp_path / f"{step}.json").read_text()))
    first, second = reports
    assert all(each <= 1e-5 for each in second.pop("far").values())
    hits = {"autograd_cache_hit": 2, "fxgraph_cache_hit": 3}  # inference; training, forwards and backwards
    assert first["counts"] == {"autograd_cache_miss": 2, "autograd_cache_saved": 2, "fxgraph_cache_miss": 3}
    assert second == {"counts": hits, "built": [], "counts from artifacts": hits}
