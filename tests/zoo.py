"""The models that must merge end to end, as small random configs of their unmodified classes.

`CASES` has odd grids, so that a size is never mistaken for another and pairs never come out even by luck;
`case(name, attn, image=..., frames=..., schedule=...)` makes others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
import transformers as T
from torch import Tensor, nn

from benchmarks.umt import UMT, UMTConfig
from tests.randomize import randomize

Attn: TypeAlias = Literal["sdpa", "eager"]
Schedule: TypeAlias = tuple[int | float, ...]


@dataclass(frozen=True)
class Family:
    """How to make one kind of model: `make(image, frames, attn)`, `shape(image, frames)` of one input sample."""

    make: Callable[[int, int, Attn], nn.Module]
    shape: Callable[[int, int], tuple[int, ...]]
    schedule: Schedule
    frames: int = 6
    attns: tuple[Attn, ...] = ("sdpa", "eager")


@dataclass(frozen=True)
class Case:
    """A model and its inputs. `schedule` can be merged: one entry per leading site, and some sites get none."""

    name: str
    attn: Attn
    image: int
    frames: int
    schedule: Schedule

    def build(self) -> nn.Module:
        """The model in eval mode; the same weights at every call and for every `attn`."""
        torch.manual_seed(0)
        model = FAMILIES[self.name].make(self.image, self.frames, self.attn).eval()
        randomize(model, seed=1)
        return model

    def inputs(self, batch: int = 2) -> tuple[Tensor, ...]:
        """Random pixels; the same at every call."""
        shape = FAMILIES[self.name].shape(self.image, self.frames)
        return (torch.randn(batch, *shape, generator=torch.Generator().manual_seed(2)),)

    def __str__(self) -> str:
        return f"{self.name}-{self.attn}"


def case(
    name: str, attn: Attn = "sdpa", *, image: int = 24, frames: int | None = None, schedule: Schedule | None = None
) -> Case:
    """A case with patches of 8 x 8; `frames` of the model's input (2 per token, where it embeds them by tubes).

    Fewer tokens than by default need a `schedule` of their own.
    """
    family = FAMILIES[name]
    return Case(name, attn, image, frames or family.frames, family.schedule if schedule is None else schedule)


def _transformer(config: type, model: type, **sizes: Any) -> Callable[[int, int, Attn], nn.Module]:
    def make(image: int, frames: int, attn: Attn) -> nn.Module:
        values = {k: v(image, frames) if callable(v) else v for k, v in (BODY | sizes).items()}
        return cast(nn.Module, model(config(attn_implementation=attn, **values)))

    return make


def _umt(image: int, frames: int, attn: Attn) -> nn.Module:
    return UMT(UMTConfig(image=image, frames=frames, patch=8, dim=32, depth=3, heads=4, mlp_ratio=2, attn=attn))


def _image(image: int, frames: int) -> int:
    return image


def _frames(image: int, frames: int) -> int:
    return frames


def _clip(image: int, frames: int) -> tuple[int, ...]:
    return frames, 3, image, image


BODY = {
    "image_size": _image,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
VIDEOMAE = {"patch_size": 8, "num_frames": _frames, "tubelet_size": 2, "num_labels": 5}

FAMILIES = {
    "umt": Family(_umt, lambda image, frames: (3, frames, image, image), (9, 4), frames=3),
    "videomae": Family(_transformer(T.VideoMAEConfig, T.VideoMAEForVideoClassification, **VIDEOMAE), _clip, (9, 0, 4)),
    "videomae-tokens": Family(_transformer(T.VideoMAEConfig, T.VideoMAEModel, **VIDEOMAE), _clip, (9, 4)),
    "vivit": Family(
        _transformer(
            T.VivitConfig, T.VivitForVideoClassification, num_frames=_frames, tubelet_size=[2, 8, 8], num_labels=5
        ),
        _clip,
        (9, 4),
    ),
    # The frames of a clip are the batch of an image model.
    "clip": Family(
        _transformer(T.CLIPVisionConfig, T.CLIPVisionModelWithProjection, patch_size=8, projection_dim=16),
        lambda image, frames: (3, image, image),
        (3, 2),
    ),
    "vjepa2": Family(
        _transformer(
            T.VJEPA2Config,
            T.VJEPA2ForVideoClassification,
            crop_size=_image,
            patch_size=8,
            frames_per_clip=_frames,
            tubelet_size=2,
            hidden_size=48,
            mlp_ratio=2.0,
            num_pooler_layers=1,
            num_labels=5,
            pred_hidden_size=24,
            pred_num_attention_heads=2,
            pred_num_hidden_layers=1,
        ),
        _clip,
        (9, 4),
    ),
    # transformers offers no SDPA for TimeSformer. Its sites alternate: temporal (never merged), spatial.
    "timesformer": Family(
        _transformer(
            T.TimesformerConfig, T.TimesformerForVideoClassification, patch_size=8, num_frames=_frames, num_labels=5
        ),
        _clip,
        (0, 3, 0, 2),
        frames=3,
        attns=("eager",),
    ),
}

SPELLED_OUT = ("umt", "videomae", "timesformer")
"""Of the models that can spell attention out, one for each spelling: the others do it with VideoMAE's words."""

CASES = tuple(
    case(name, attn) for name, each in FAMILIES.items() for attn in each.attns if attn == "sdpa" or name in SPELLED_OUT
)
