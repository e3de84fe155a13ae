"""The model that `tldr run` compiles, and what its configuration says about the clip it reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForVideoClassification,
    PreTrainedModel,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
)
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar

from tldr_compile.errors import OptionError, TldrError
from tldr_compile.media.video import Preprocessing

FRAMES = ("num_frames", "frames_per_clip")
SIDES = ("image_size", "crop_size")
PROCESSORS = ("video_preprocessor_config.json", "preprocessor_config.json")


class ModelError(TldrError):
    """A model that cannot be had, or that does not read a clip of frames."""


@dataclass(frozen=True)
class Subject:
    """A video classifier in eval mode, called as `model(clip [1, T, 3, H, W])`, and how a clip is made for it."""

    model: PreTrainedModel
    frames: int
    preprocessing: Preprocessing
    origin: str


def load(model: str | None, *, attention: str | None, seed: int) -> Subject:
    """`model` is a hub id or a local folder; None builds VideoMAE-Base with random weights.

    `attention` is what transformers calls `attn_implementation`; None leaves it to the model.
    Raises ModelError when it cannot be had or its configuration names no clip.
    """
    return _random(attention, seed) if model is None else _pretrained(model, attention)


def device_of(name: str) -> torch.device:
    """The device of that name. Raises OptionError where this torch has none."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise OptionError(f"--device {name}: {error}") from error


def _random(attention: str | None, seed: int) -> Subject:
    torch.manual_seed(seed)
    config = VideoMAEConfig(attn_implementation=attention)
    return _subject(
        VideoMAEForVideoClassification(config),
        None,
        f"VideoMAE-Base at full size with RANDOM weights (seed {seed}): its speed and its token counts are real, its "
        "predictions and its saliency mean nothing. Trained ones: --model MCG-NJU/videomae-base-finetuned-kinetics",
    )


def _pretrained(name: str, attention: str | None) -> Subject:
    if "://" in name:
        raise ModelError(f"--model {name} is an address: give the hub id alone, such as OWNER/NAME, or a local folder")
    if Path(name).is_file():
        raise ModelError(f"--model {name} is a file: give the folder that holds config.json and the weights")
    disable_progress_bar()  # of the weights' loading, which takes no time
    try:
        model = AutoModelForVideoClassification.from_pretrained(name, attn_implementation=attention)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"--model {name} cannot be had: {str(error).strip()}\nGive a local folder with config.json and weights, "
            "the hub id of a video classifier that can be downloaded from here, or no --model for random weights."
        ) from error
    processor = _processor(name)
    told = "its own processor's pixels" if processor else "ImageNet's mean and deviation (it ships no processor)"
    return _subject(model, processor, f"{name} ({type(model).__name__}), {told}")


def _subject(model: Any, processor: dict[str, Any] | None, origin: str) -> Subject:
    frames = said(model.config, FRAMES)
    return Subject(model.eval(), frames, preprocessing(processor or {}, said(model.config, SIDES)), origin)


def said(config: Any, names: Sequence[str]) -> int:
    """What the configuration says under the first of these names. Raises ModelError where it has none of them."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, int):
            return value
    raise ModelError(f"{type(config).__name__} has none of {', '.join(names)}: it reads no square clip")


def _processor(name: str) -> dict[str, Any] | None:
    for file in PROCESSORS:
        try:
            path = cached_file(name, file)
        except OSError:  # how a file that the model does not ship is reported
            continue
        try:
            said: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"--model {name}: its {file} is no JSON ({error})") from error
        return said
    return None


def preprocessing(processor: dict[str, Any], side: int) -> Preprocessing:
    """Reads a processor's configuration; what it leaves out is ImageNet's, at the model's own `side`."""
    resize = _size(processor["size"]) if "size" in processor else side
    if processor.get("do_center_crop", True):
        crop = _size(processor["crop_size"]) if "crop_size" in processor else side
    else:
        crop = side if isinstance(resize, int) else resize
    normalised = processor.get("do_normalize", True)
    defaults = Preprocessing(resize, (crop, crop) if isinstance(crop, int) else crop)
    return Preprocessing(
        defaults.resize,
        defaults.crop,
        scale=processor.get("rescale_factor", defaults.scale) if processor.get("do_rescale", True) else 1.0,
        offset=1.0 if processor.get("offset", False) else 0.0,
        mean=tuple(processor.get("image_mean", defaults.mean)) if normalised else (0.0, 0.0, 0.0),
        std=tuple(processor.get("image_std", defaults.std)) if normalised else (1.0, 1.0, 1.0),
    )


def _size(said: int | dict[str, int]) -> int | tuple[int, int]:
    if isinstance(said, int):
        return said
    return said["shortest_edge"] if "shortest_edge" in said else (said["height"], said["width"])
