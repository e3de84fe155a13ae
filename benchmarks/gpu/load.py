"""What is measured of a model: its batch, its fused attention, its rows; and how a row is called."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from benchmarks import timing
from benchmarks.models import MODELS, Spec
from benchmarks.speed import DENSE, FLOOR, OURS, ROWS, Setting
from benchmarks.umt import UMT, UMTConfig

FUSED = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION")

BY_HAND = (DENSE, OURS, FLOOR, "ToMe compiled", "vid-TLDR compiled")
GENERAL = (DENSE, OURS, "floor")

TINY = "umt-tiny"
SPECS: dict[str, Spec] = {
    **MODELS,
    TINY: Spec(
        "UMT, tiny",
        lambda: UMT(UMTConfig(image=32, frames=4, patch=8, dim=64, depth=2, heads=2, classes=3)),
        (3, 4, 32, 32),
        (16, 8),
    ),
}
NAMES = ("umt-b", "videomae-l", "vjepa2-l", "umt-l")
BATCHES = (8, 32, 1)


@dataclass(frozen=True)
class Load:
    """A model of `SPECS` on a batch of clips, with CUDA graphs or without."""

    model: str
    batch: int
    graphs: bool = False
    attention: tuple[tuple[str, float | None], ...] = ()
    """Seconds of each of `FUSED` alone on the model's shape, None where it refuses; the fastest first."""

    @property
    def name(self) -> str:
        return f"{self.model} b{self.batch}{' graphs' if self.graphs else ''}"

    @property
    def setting_name(self) -> str:
        """What loads that compile together have in common."""
        return f"batch {self.batch}{' with CUDA graphs' if self.graphs else ''}"

    @property
    def inductor(self) -> dict[str, Any]:
        return {"triton.cudagraphs": True} if self.graphs else {}

    @property
    def rows(self) -> tuple[str, ...]:
        """Dense, ours and the floor lead."""
        if self.model == TINY:
            return BY_HAND[:3]
        return BY_HAND if self.model.startswith("umt") else GENERAL

    @contextmanager
    def running(self) -> Iterator[None]:
        """How everything is compiled and called: the fastest attention first, the others where it refuses."""
        order = [*(name for name, _ in self.attention), "MATH"]
        backends = [SDPBackend.__members__[name] for name in order]
        with torch.inference_mode(), sdpa_kernel(backends, set_priority=True):
            yield

    def setting(self, device: torch.device) -> Setting:
        spec = SPECS[self.model]
        with device:
            model = spec.build().to(dtype_on(device))
        move_tables(model, device)
        return Setting(model, spec.schedule, self.inductor)

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        return tuple(value.to(device, dtype_on(device)) for value in SPECS[self.model].inputs(self.batch))


def move_tables(model: nn.Module, device: torch.device) -> None:
    """Tensors that are neither parameters nor buffers: left on the CPU, each call would wait for their copies."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                setattr(module, name, value.to(device))


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def call_of(setting: Setting, inputs: tuple[Tensor, ...], row: str) -> timing.Call:
    """A row's call; the first one compiles."""
    return partial(ROWS[row](setting), *inputs)


def loads(device: torch.device, *, dry: bool, batches: Sequence[int] = BATCHES) -> tuple[Load, ...]:
    """All that is measured, the most important first, each with the attention that is fastest for it."""
    if dry:
        plain = [Load(TINY, 2)]
    else:
        plain = [Load(name, batch) for batch in batches for name in NAMES]
        plain += [Load(name, 1, graphs=True) for name in NAMES if 1 in batches]
    shapes = {load.model: attention_shape(SPECS[load.model]) for load in plain}
    times = {
        (model, batch): attention_times((batch, *shapes[model]), device)
        for model, batch in dict.fromkeys((load.model, load.batch) for load in plain)
    }
    return tuple(replace(load, attention=times[load.model, load.batch]) for load in plain)


def attention_shape(spec: Spec) -> tuple[int, ...]:
    """`[H, N, d]` of the model's first fused attention, without running it."""
    with torch.device("meta"):
        model = spec.build()
    with Shapes() as seen, torch.no_grad():
        model(*(value.to("meta") for value in spec.inputs()))
    return tuple(seen.shapes[0][1:])


class Shapes(TorchFunctionMode):
    """Notes the shapes of the queries of every fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            self.shapes.append(args[0].shape)
        return function(*args, **(kwargs or {}))


@torch.inference_mode()
def attention_times(shape: tuple[int, ...], device: torch.device) -> tuple[tuple[str, float | None], ...]:
    """Seconds of each of `FUSED` for `q, k, v [B, H, N, d]` in the layout of models, the fastest first."""
    batch, heads, tokens, channels = shape
    joint = torch.randn(batch, tokens, 3, heads, channels, device=device, dtype=dtype_on(device))
    q, k, v = joint.permute(2, 0, 3, 1, 4).unbind(0)
    times = {name: _seconds(name, partial(F.scaled_dot_product_attention, q, k, v), device) for name in FUSED}
    return tuple(sorted(times.items(), key=lambda item: (item[1] is None, item[1])))


def _seconds(backend: str, call: timing.Call, device: torch.device) -> float | None:
    with sdpa_kernel(SDPBackend.__members__[backend]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one for every reason why it refuses
        try:
            taken = timing.paired({backend: call}, device, rounds=3, least=0.005)
        except RuntimeError:  # the only sign of a backend that does not take the arguments
            return None
    return timing.Spread.of(taken[backend]).median
