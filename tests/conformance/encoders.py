"""Every image and video encoder of `transformers`, found in the library itself and built tiny.

An encoder is a model class whose `forward` takes pixels. There is one per configuration class: the base model, or what
comes closest to it. Models of pixels and text are left out: their vision tower has a configuration of its own, and is
here.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from types import ModuleType
from typing import TypeVar

import torch
import transformers.models
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tests.conformance.inputs import FRAMES, candidates
from tests.conformance.shrink import Recipe, shrink
from tests.randomize import randomize

LARGEST = 150_000_000  # parameters
TOO_LARGE = "million parameters"
PATIENCE = 45.0
RECIPES = tuple(
    Recipe(factor, layers, grid, FRAMES) for factor, layers, grid in product((8, 2, 1), (3, None), (7, 8, 6, None))
)

VIDEO, TOWERS, IMAGES = "video", "towers", "images"
CLIPS = ("clips", "frames")  # inputs that hold time: as a dimension, or in the batch

T = TypeVar("T")


@dataclass(frozen=True)
class Encoder:
    """A model class of the library, and the section of the page where a reader looks for it."""

    module: str
    name: str
    section: str = field(default=IMAGES, compare=False)

    @property
    def facts(self) -> dict[str, str]:
        """What is known before it is built."""
        return {"name": self.name, "module": self.module, "section": self.section}

    def load(self) -> type[PreTrainedModel]:
        return getattr(importlib.import_module(self.module), self.name)


@dataclass(frozen=True)
class Built:
    """A tiny model in eval mode with random weights, and inputs that it takes."""

    model: nn.Module
    inputs: dict[str, Tensor]
    sizes: str
    kind: str
    """What the inputs are."""

    @property
    def video(self) -> bool:
        return self.kind in CLIPS


class Unbuildable(Exception):
    """No tiny configuration of a model runs; the text says why not."""


def discover() -> tuple[list[Encoder], dict[str, str]]:
    """One encoder per configuration class, by name; and the modules that do not import, with the reason."""
    by_config: dict[type, list[type[PreTrainedModel]]] = defaultdict(list)
    families = set[type[PreTrainedConfig]]()
    absent: dict[str, str] = {}
    for path in _modeling_modules():
        try:
            module = importlib.import_module(path)
        except ImportError as reason:
            absent[path] = str(reason)
            continue
        for each in _models(module):
            if _sees(each):
                by_config[each.config_class].append(each)
            elif _reads(each):
                families.add(each.config_class)
    parts = {part for family in families for part in _made_of(family)}
    found = [_encoder(classes, families, parts) for classes in by_config.values()]
    return sorted(found, key=lambda e: (e.name, e.module)), absent


def build(encoder: Encoder, patience: float = PATIENCE) -> Built:
    """The smallest of some configurations that runs, found within `patience` seconds. Raises `Unbuildable`."""
    cls, started = encoder.load(), time.monotonic()
    reasons: list[str] = []
    for recipe in RECIPES:
        try:
            return _built(cls, recipe)
        except Unbuildable as reason:
            reasons.append(str(reason))
        if time.monotonic() - started > patience:
            break
    raise Unbuildable(next((reason for reason in reversed(reasons) if TOO_LARGE not in reason), reasons[-1]))


def _built(cls: type[PreTrainedModel], recipe: Recipe) -> Built:
    config = _attempt(lambda: shrink(cls.config_class(), recipe))
    with torch.device("meta"):
        size = _attempt(lambda: sum(parameter.numel() for parameter in cls(config).parameters()))
    if size > LARGEST:
        raise Unbuildable(f"{size / 1e6:.0f} {TOO_LARGE}")
    torch.manual_seed(0)
    model = _attempt(lambda: cls(config).eval())
    randomize(model, seed=1)
    refusals: list[str] = []
    for kind, inputs in candidates(model, config, recipe.grid):
        try:
            _attempt(lambda: _run(model, inputs))  # noqa: B023 - called at once
        except Unbuildable as refusal:
            refusals.append(f"{kind}: {refusal}")
        else:
            return Built(model, inputs, f"{recipe}; {kind}", kind)
    raise Unbuildable(refusals[0] if refusals else "nothing is known to make its inputs from")


def _run(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        model(**inputs)


def _attempt(action: Callable[[], T]) -> T:
    try:
        return action()
    except Exception as reason:  # a model's own checks and code, which can raise anything
        raise Unbuildable(f"{type(reason).__name__}: {' '.join(str(reason).split())[:300]}") from reason


def _modeling_modules() -> Iterator[str]:
    for package in pkgutil.iter_modules(transformers.models.__path__):
        path = f"transformers.models.{package.name}"
        for module in pkgutil.iter_modules(importlib.import_module(path).__path__):
            if module.name.startswith("modeling_"):
                yield f"{path}.{module.name}"


def _models(module: ModuleType) -> Iterator[type[PreTrainedModel]]:
    """The classes of models that a module defines and that have a configuration."""
    classes: list[type[PreTrainedModel]] = [each for each in vars(module).values() if _is_model(each)]
    for each in classes:
        named = each.__module__ == module.__name__ and not each.__name__.endswith("PreTrainedModel")
        if named and inspect.isclass(each.config_class):
            yield each


def _is_model(each: object) -> bool:
    return isinstance(each, type) and issubclass(each, PreTrainedModel)


def _takes(model: type[PreTrainedModel]) -> Sequence[str]:
    return list(inspect.signature(model.forward).parameters)


def _sees(model: type[PreTrainedModel]) -> bool:
    """Whether a model takes pixels and no text."""
    takes = _takes(model)
    return not any(name.endswith("input_ids") for name in takes) and any(
        name.startswith("pixel_values") or name == "grid_thw" for name in takes
    )


def _reads(model: type[PreTrainedModel]) -> bool:
    """Whether a model takes pixels and text."""
    takes = _takes(model)
    return any(name.endswith("input_ids") for name in takes) and any("pixel_values" in name for name in takes)


def _made_of(family: type[PreTrainedConfig]) -> set[type]:
    """The classes of the configurations that a class is made of by itself."""
    try:
        return set(_parts(_attempt(family)))
    except Unbuildable:  # it has to be given its parts: none is its own
        return set()


def _parts(config: PreTrainedConfig) -> Iterator[type]:
    for name in config.sub_configs:
        part = getattr(config, name)
        if part is not None:  # a part that is there only if asked for
            yield type(part)
            yield from _parts(part)


def _encoder(classes: Sequence[type[PreTrainedModel]], families: Collection[type], parts: Collection[type]) -> Encoder:
    """The base model of a configuration, out of the classes that share it.

    It is a tower if its configuration is one of pixels and text, or part of one. A general model can be such a part
    too, and is none of the towers: it has models with heads of its own.
    """
    base = min(classes, key=_distance)
    part = base.config_class in parts and not any(map(_headed, classes))
    section = TOWERS if part or base.config_class in families else IMAGES
    if any("videos" in name for name in _takes(base)):
        section = VIDEO
    return Encoder(base.__module__, base.__name__, section)


def _headed(model: type[PreTrainedModel]) -> bool:
    return re.search("For[A-Z]", model.__name__) is not None


def _distance(model: type[PreTrainedModel]) -> tuple[bool, bool, bool, int, str]:
    """How far a class is from being the base model of its configuration."""
    name = model.__name__
    return _headed(model), "Backbone" in name, not name.endswith("Model"), len(name), name
