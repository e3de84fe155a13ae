"""Configurations of `transformers` made small, by what their fields are called."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from transformers import PreTrainedConfig, ResNetConfig

WIDTH = re.compile(
    r"(^|_)(dims?|d_model|width|channels?|feats|features|inplanes|embed_dim_per_stage|channel_list|key_dim)$"
    r"|(^|_)(hidden|embed|embedding|intermediate|output|feature|projection|head|descriptor|encoder)_sizes?$"
)
NOT_WIDTH = re.compile(r"^position_embedding_size$|^patch_|_slice_dim$|^num_channels$")
MAP = re.compile(r"(^|_)feature_sizes$|^image_embedding_size$")
DEPTH = re.compile(r"(^|_)(layers|depths?)$|^(num_blocks|blocks_per_stage)$")
NOT_DEPTH = re.compile(r"^(min|max)_|_proj_layers$")
CHOICE = re.compile(r"_(indexes|indices|index|idxs|ids|blocks)$")
WINDOW = re.compile(r"(^|_)window_sizes?$")
QUERIES = re.compile(r"^num_queries$|_num_proposals$")
OUTPUTS = ("out_features", "out_indices", "stage_names")
IMAGE = ("image_size", "crop_size", "img_size", "input_size", "pretrain_image_size")
PATCH = ("patch_size", "patch_sizes", "patch_stride", "tubelet_size")
TIME = ("num_frames", "frames_per_clip", "mit_num_frames")
CHANNELS = ("num_channels", "in_channels", "in_chans", "num_input_channels")
LEAST_WIDTH = 32
LEAST_IMAGE = 64
MOST_QUERIES = 20
MOST_WINDOW = 4  # patches across: small pictures are made of whole windows


@dataclass(frozen=True)
class Recipe:
    """How to make a configuration small.

    Attributes:
        factor: all widths are divided by it. Dividing all by the same keeps what has to fit together.
        layers: so many at most, and two for each of several stages; None leaves the depth.
        grid: pictures are so many patches across; None leaves their size.
        frames: pictures of a clip.
    """

    factor: int
    layers: int | None
    grid: int | None
    frames: int

    def __str__(self) -> str:
        layers = "all layers" if self.layers is None else f"at most {self.layers} layers"
        grid = "pictures as they are" if self.grid is None else f"pictures {self.grid} patches across"
        return f"widths / {self.factor}, {layers}, {grid}"


def shrink(config: PreTrainedConfig, recipe: Recipe) -> PreTrainedConfig:
    """A small configuration of the same class, and of the same parts, which see pictures of the same size."""
    return _shrunk(config, recipe, _image(config, recipe.grid))


def _shrunk(config: PreTrainedConfig, recipe: Recipe, image: int) -> PreTrainedConfig:
    if config.model_type == "timm_backbone":
        return _shrunk(_resnet(config), recipe, image)
    values = {name: value for name, value in config.to_dict().items() if not isinstance(value, dict)}
    plain = type(config)().to_dict()
    own = {name: value for name, value in values.items() if name not in plain or plain[name] != value}
    if recipe.layers is not None:
        own = {name: value for name, value in own.items() if name not in OUTPUTS}
    scale = Fraction(1) if recipe.grid is None else Fraction(image, number(config, IMAGE) or image)
    small = {name: _smaller(name, value, recipe, image, scale) for name, value in values.items()}
    changed = {name: value for name, value in small.items() if value != values[name]}
    return type(config)(**own | changed | {name: _shrunk(part, recipe, image) for name, part in parts(config)})


def parts(config: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
    """The configurations that a configuration is made of."""
    return ((name, value) for name, value in vars(config).items() if isinstance(value, PreTrainedConfig))


def number(config: PreTrainedConfig, names: Sequence[str], last: bool = False) -> int | None:
    """The first of `names` that the configuration or one of its parts has; the first (or last) entry of a sequence."""
    for name in names:
        value = getattr(config, name, None)
        while isinstance(value, (list, tuple)) and value:
            value = value[-1 if last else 0]
        if isinstance(value, int):
            return value
    found = (number(part, names, last) for _, part in parts(config))
    return next((value for value in found if value is not None), None)


def patch(config: PreTrainedConfig) -> int:
    """Pixels across a patch."""
    return number(config, PATCH[:-1]) or number(config, PATCH[-1:], last=True) or 16


def side(config: PreTrainedConfig, grid: int | None) -> int:
    """Pixels across a picture."""
    return number(config, IMAGE) or _image(config, grid)


def _image(config: PreTrainedConfig, grid: int | None) -> int:
    if grid is None:
        return number(config, IMAGE) or patch(config) * (number(config, ("num_patches",)) or 16)
    return patch(config) * max(grid, -(-LEAST_IMAGE // patch(config)))


def _resnet(config: PreTrainedConfig) -> ResNetConfig:
    """The library's own convolutions, for a backbone that needs another library."""
    chosen = getattr(config, "out_indices", None) or [4]
    return ResNetConfig(out_indices=[max(1, 5 - len(chosen)) + place for place in range(min(len(chosen), 4))])


def _smaller(name: str, value: Any, recipe: Recipe, image: int, scale: Fraction) -> Any:
    if MAP.search(name):
        return _map(lambda across: int(across * scale), value)
    if WIDTH.search(name) and not NOT_WIDTH.search(name):
        return _map(lambda width: _divided(width, recipe.factor), value)
    if name in IMAGE and recipe.grid is not None:
        return _map(lambda _: image, value)
    if WINDOW.search(name) and recipe.grid is not None:
        return _map(lambda across: min(across, MOST_WINDOW), value)
    if QUERIES.search(name):
        return _map(lambda count: min(count, MOST_QUERIES), value)
    if name in TIME:
        return _map(lambda _: recipe.frames, value)
    return value if recipe.layers is None else _shallower(name, value, recipe.layers)


def _shallower(name: str, value: Any, layers: int) -> Any:
    if DEPTH.search(name) and not NOT_DEPTH.search(name):
        return _map(lambda depth: min(depth, 2 if isinstance(value, (list, tuple)) else layers), value)
    if CHOICE.search(name) and isinstance(value, (list, tuple)):
        return [index for index in value if isinstance(index, int) and index < layers] or [layers - 1]
    if name.endswith("layer_types") and isinstance(value, (list, tuple)):
        return value[:layers]
    return value


def _divided(width: int, factor: int) -> int:
    return width // factor if width >= LEAST_WIDTH and width % factor == 0 else width


def _map(change: Callable[[int], int], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_map(change, each) for each in value)
    return change(value) if isinstance(value, int) and not isinstance(value, bool) else value
