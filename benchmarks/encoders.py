"""Every image and video encoder of `transformers`, found in the library itself and built tiny.

An encoder is a model class whose `forward` takes pixels. There is one per configuration class: the base model, or what
comes closest to it. Models of pixels and text (those with a `text_config`) are left out: their vision tower has a
configuration of its own, and is here.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import transformers.models
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tests.zoo import randomize

LAYERS = 3
FRAMES = 4
BATCH = 2
LARGEST = 150_000_000  # parameters

WIDTHS = (
    "hidden_size hidden_sizes embed_dim embed_dims embedding_size hidden_dim d_model intermediate_size mlp_dim ffn_dim "
    "neck_hidden_sizes fusion_hidden_size encoder_ffn_dim decoder_ffn_dim projection_dim out_hidden_size output_channels "
    "embedding_hidden_size pred_hidden_size decoder_hidden_size decoder_intermediate_size encoder_hidden_dim dim dims "
    "embed_dim_per_stage embedding_dynamic_size hidden_channels hidden_expand mask_feature_size feature_size "
    "dim_feedforward encoder_feedforward_dim decoder_hidden_dim bottleneck_dim head_dim mlp_hidden_dim"
).split()
DEPTHS = (
    "num_hidden_layers num_layers depth depths num_encoder_blocks n_layers layers encoder_layers decoder_layers "
    "pred_num_hidden_layers decoder_num_hidden_layers num_temporal_layers num_spatial_layers mit_num_hidden_layers "
    "num_auxiliary_layers num_blocks num_pooler_layers encoder_num_layers"
).split()
IMAGES = "image_size crop_size img_size input_size pretrain_image_size".split()
PATCHES = "patch_size patch_sizes patch_stride tubelet_size".split()
TIMES = "num_frames frames_per_clip mit_num_frames".split()


@dataclass(frozen=True)
class Encoder:
    """A model class of the library."""

    module: str
    name: str

    def load(self) -> type[PreTrainedModel]:
        return getattr(importlib.import_module(self.module), self.name)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Built:
    """A tiny model in eval mode with random weights, and inputs that it takes."""

    model: nn.Module
    inputs: dict[str, Tensor]
    sizes: str


class Unbuildable(Exception):
    """No tiny configuration of a model runs; the text says what the last one failed with."""


def discover() -> tuple[list[Encoder], dict[str, str]]:
    """One encoder per configuration class, by name; and the modules that do not import, with the reason."""
    by_config: dict[type, list[type[PreTrainedModel]]] = defaultdict(list)
    absent: dict[str, str] = {}
    for path in _modeling_modules():
        try:
            module = importlib.import_module(path)
        except ImportError as reason:
            absent[path] = str(reason)
            continue
        for each in vars(module).values():
            if inspect.isclass(each) and issubclass(each, PreTrainedModel) and each.__module__ == path and _sees(each):
                by_config[each.config_class].append(each)  # type: ignore[index]
    chosen = [min(classes, key=_distance) for classes in by_config.values()]
    return sorted((Encoder(c.__module__, c.__name__) for c in chosen), key=lambda e: e.name), absent


def _modeling_modules() -> Iterator[str]:
    for package in pkgutil.iter_modules(transformers.models.__path__):
        path = f"transformers.models.{package.name}"
        for module in pkgutil.iter_modules(importlib.import_module(path).__path__):
            if module.name.startswith("modeling_"):
                yield f"{path}.{module.name}"


def _sees(model: type[PreTrainedModel]) -> bool:
    if not inspect.isclass(model.config_class) or model.__name__.endswith("PreTrainedModel"):
        return False
    takes = inspect.signature(model.forward).parameters
    return "input_ids" not in takes and any(name.startswith("pixel_values") or name == "grid_thw" for name in takes)


def _distance(model: type[PreTrainedModel]) -> tuple[bool, bool, bool, int, str]:
    """How far a class is from being the base model of its configuration."""
    name = model.__name__
    return "For" in name, "Backbone" in name, not name.endswith("Model"), len(name), name


def build(encoder: Encoder, attn: str | None = None) -> Built:
    """The smallest of some configurations that runs. Raises `Unbuildable`."""
    cls = encoder.load()
    last = "no configuration was tried"
    for factor, grid in product((8, 4, 2, 1), (7, 6, 8)):
        try:
            config = shrink(cls.config_class, factor, grid)  # type: ignore[arg-type]
            if attn:
                config._attn_implementation = attn
            with torch.device("meta"):
                size = sum(p.numel() for p in cls(config).parameters())
            if size > LARGEST:
                last = f"{size / 1e6:.0f} million parameters"
                continue
            torch.manual_seed(0)
            model = cls(config).eval()
        except Exception as reason:  # a configuration's own checks, which can raise anything
            last = _text(reason)
            continue
        randomize(model, seed=1)
        for kind, make in INPUTS.items():
            inputs = make(model, config)
            if inputs is None:
                continue
            try:
                with torch.no_grad():
                    model(**inputs)
            except Exception as reason:
                if kind == next(iter(INPUTS)) or "packed" in kind or "padded" in kind:
                    last = f"{kind}: {_text(reason)}"
                continue
            return Built(model, inputs, f"widths / {factor}, grid of {grid}, {kind}")
    raise Unbuildable(last)


def shrink(config_class: type[PreTrainedConfig], factor: int, grid: int) -> PreTrainedConfig:
    """A configuration with all widths divided by `factor`, few layers, and pictures of `grid` patches across.

    Dividing all widths by the same keeps what has to fit together.
    """
    default = config_class()
    image = _image(default, grid)
    changes = {name: change for name, value in default.to_dict().items() if (change := _smaller(name, value, factor, image)) is not None}
    config = config_class(**changes)
    for part in getattr(config_class, "sub_configs", {}):
        inner = getattr(config, part, None)
        if isinstance(inner, PreTrainedConfig):
            setattr(config, part, shrink(type(inner), factor, grid))
    return config


def _smaller(name: str, value: Any, factor: int, image: int) -> Any:
    """The tiny value of a field, or None to leave it."""
    if name in WIDTHS:
        return _map(lambda width: max(width // factor, 1), value)
    if name in DEPTHS:
        return _map(lambda depth: min(depth, 2), value) if isinstance(value, Sequence) else _map(lambda d: min(d, LAYERS), value)
    if name in IMAGES:
        return _map(lambda _: image, value)
    if name in TIMES:
        return _map(lambda _: FRAMES, value)
    if name.endswith(("_indexes", "_indices", "_index")) and isinstance(value, (list, tuple)):
        return [index for index in value if isinstance(index, int) and index < LAYERS] or [LAYERS - 1]
    if name in ("layer_types", "mlp_layer_types") and isinstance(value, (list, tuple)):
        return value[:LAYERS]
    return None


def _map(change: Callable[[int], int], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_map(change, each) for each in value)
    return change(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _image(config: PreTrainedConfig, grid: int) -> int:
    patch = _patch(config)
    return patch * max(grid, -(-64 // patch))


def _patch(config: PreTrainedConfig) -> int:
    for name in PATCHES:
        value = getattr(config, name, None)
        while isinstance(value, (list, tuple)) and value:
            value = value[-1] if name == "tubelet_size" else value[0]
        if isinstance(value, int):
            return value
    return 16


def _field(config: PreTrainedConfig, names: Sequence[str], default: int) -> int:
    for name in names:
        value = getattr(config, name, None)
        while isinstance(value, (list, tuple)) and value:
            value = value[0]
        if isinstance(value, int):
            return value
    return next((_field(getattr(config, p), names, default) for p in getattr(config, "sub_configs", {}) if isinstance(getattr(config, p), PreTrainedConfig)), default)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def _pixels(model: nn.Module) -> str:
    takes = inspect.signature(model.forward).parameters
    return next(name for name in takes if name.startswith("pixel_values"))


Maker = Callable[[nn.Module, PreTrainedConfig], "dict[str, Tensor] | None"]


def _pictures(*lead: int) -> Maker:
    def make(model: nn.Module, config: PreTrainedConfig) -> dict[str, Tensor] | None:
        takes = inspect.signature(model.forward).parameters
        if not any(name.startswith("pixel_values") for name in takes):
            return None
        side = _field(config, IMAGES, 0) or _image(config, 7)
        shape = (*lead, _field(config, ("num_channels", "in_channels", "in_chans"), 3), side, side)
        inputs = {_pixels(model): _random(*shape)}
        for name, parameter in takes.items():
            if name not in inputs and parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                if name == "input_ids":
                    inputs[name] = torch.arange(10).reshape(2, 5)
                elif name.endswith("pixel_values"):
                    inputs[name] = _random(*shape).flip(-1)
                elif name.endswith("masks"):
                    inputs[name] = _random(*shape).flip(-2)
        return inputs

    return make


def _packed(model: nn.Module, config: PreTrainedConfig) -> dict[str, Tensor] | None:
    """Patches of several pictures in one row, with their grids."""
    takes = inspect.signature(model.forward).parameters
    if "grid_thw" not in takes:
        return None
    first = next(iter(takes))
    patch, time = _patch(config), _field(config, ("temporal_patch_size",), 1)
    channels = _field(config, ("num_channels", "in_channels", "in_chans"), 3)
    grids = torch.tensor([[2, 6, 4], [1, 4, 4]])
    return {first: _random(int(grids.prod(-1).sum()), channels * time * patch * patch), "grid_thw": grids}


def _ragged(model: nn.Module, config: PreTrainedConfig) -> dict[str, Tensor] | None:
    """Patches of pictures of their own size, padded to one length."""
    takes = inspect.signature(model.forward).parameters
    if "spatial_shapes" not in takes:
        return None
    patch, channels = _patch(config), _field(config, ("num_channels",), 3)
    inputs = {"pixel_values": _random(BATCH, 24, channels * patch * patch), "spatial_shapes": torch.tensor([[6, 4], [4, 5]])}
    mask = next((name for name in takes if name.endswith("attention_mask")), None)
    if mask:
        inputs[mask] = torch.arange(24) < torch.tensor([[24], [20]])
    return inputs


INPUTS: Mapping[str, Maker] = {
    "images": _pictures(BATCH),
    "clips": _pictures(BATCH, FRAMES),
    "packed patches": _packed,
    "padded patches": _ragged,
}


def _text(reason: BaseException) -> str:
    return f"{type(reason).__name__}: {' '.join(str(reason).split())[:300]}"
