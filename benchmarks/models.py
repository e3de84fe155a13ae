"""Full-size models with random weights, their inputs, and the schedule each is measured with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as T
from torch import Tensor, nn

from benchmarks.umt import UMT, UMTConfig

# About what the paper takes off in its first blocks, as fractions.
FRACTIONS = (0.25, 0.12, 0.06)
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


@dataclass(frozen=True)
class Spec:
    """`build()` makes the model; one clip is `[clip_batch, *shape]` (`clip_batch` frames for an image model)."""

    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    schedule: tuple[int | float, ...] = FRACTIONS
    clip_batch: int = 1

    def build(self) -> nn.Module:
        """The model in eval mode; the same weights at every call."""
        torch.manual_seed(0)
        return self.make().eval()

    def inputs(self, clips: int = 1) -> tuple[Tensor, ...]:
        """Random pixels of `clips` clips; the same at every call."""
        return (torch.randn(clips * self.clip_batch, *self.shape, generator=torch.Generator().manual_seed(1)),)

    def on(self, device: str, dtype: str, clips: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The model and its inputs, there and in a dtype of torch's."""
        where = (torch.device(device), getattr(torch, dtype))
        return self.build().to(*where), tuple(value.to(*where) for value in self.inputs(clips))


def _videomae(**sizes: Any) -> nn.Module:
    return T.VideoMAEForVideoClassification(T.VideoMAEConfig(num_labels=400, **sizes))


MODELS = {
    "umt-b": Spec("UMT-B", lambda: UMT(UMTConfig(classes=400)), (3, 12, 224, 224), (600, 200, 100)),
    "umt-l": Spec(
        "UMT-L", lambda: UMT(UMTConfig(dim=1024, depth=24, heads=16, classes=400)), (3, 12, 224, 224), (550, 400)
    ),
    "videomae-b": Spec("VideoMAE-B", _videomae, (16, 3, 224, 224)),
    "videomae-l": Spec("VideoMAE-L", lambda: _videomae(**LARGE), (16, 3, 224, 224)),
    "vivit-b": Spec("ViViT-B", lambda: T.VivitForVideoClassification(T.VivitConfig()), (32, 3, 224, 224)),
    "clip-b": Spec(
        "CLIP-B/16, per frame",
        lambda: T.CLIPVisionModelWithProjection(T.CLIPVisionConfig(patch_size=16)),
        (3, 224, 224),
        clip_batch=16,
    ),
    "vjepa2-l": Spec(
        "V-JEPA 2 ViT-L",
        lambda: T.VJEPA2ForVideoClassification(T.VJEPA2Config(frames_per_clip=16, num_labels=174)),
        (16, 3, 256, 256),
    ),
    # Its sites alternate between time, which is never merged, and space.
    "timesformer-b": Spec(
        "TimeSformer-B",
        lambda: T.TimesformerForVideoClassification(T.TimesformerConfig(num_labels=400)),
        (8, 3, 224, 224),
        tuple(entry for fraction in FRACTIONS for entry in (0, fraction)),
    ),
}


@dataclass(frozen=True)
class Packed(Spec):
    """Patches of all clips in one row, `[clips * t * h * w, *shape]`, and their grids `[clips, 3]`, int64."""

    grid: tuple[int, int, int] = (1, 16, 16)

    def inputs(self, clips: int = 1) -> tuple[Tensor, ...]:
        return *Spec.inputs(self, clips), torch.tensor([self.grid] * clips)


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchvision.models import get_model  # noqa: PLC0415 - not everyone has it

        return get_model(name)

    return make


def _timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from timm import create_model  # noqa: PLC0415 - not everyone has it

        return create_model(name)

    return make


def _qwen() -> nn.Module:
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen  # noqa: PLC0415 - loads a large module

    return qwen.Qwen2_5_VisionTransformerPretrainedModel(qwen.Qwen2_5_VLVisionConfig(hidden_size=1280))


PYRAMID = {"hidden_sizes": [64, 128, 320, 512], "depths": [3, 4, 6, 3]}
PICTURE, CLIP = (3, 224, 224), (3, 16, 224, 224)

# Of each way in which attention is confined to a part of the tokens, or they become fewer on their way, one or two.
FAMILIES = {
    "timesformer-b": MODELS["timesformer-b"],
    "vivit-b": MODELS["vivit-b"],
    "swin-t": Spec("Swin-T", _torchvision("swin_t"), PICTURE),
    "swin3d-t": Spec("Swin3D-T", _torchvision("swin3d_t"), CLIP),
    "hiera-b": Spec("Hiera-B", lambda: T.HieraForImageClassification(T.HieraConfig(num_labels=1000)), PICTURE),
    "sam-b": Spec("SAM ViT-B", lambda: T.SamVisionModel(T.SamVisionConfig()), (3, 1024, 1024)),
    "mvit-v2-s": Spec("MViTv2-S", _torchvision("mvit_v2_s"), CLIP),
    "maxvit-t": Spec("MaxViT-T", _torchvision("maxvit_t"), PICTURE),
    "nest-b": Spec("NesT-B", _timm("nest_base"), PICTURE),
    "qwen2.5-vl": Packed("Qwen2.5-VL's tower", _qwen, (1176,), clip_batch=256),
    "pvt-v2-b2": Spec("PVTv2-B2", lambda: T.PvtV2ForImageClassification(T.PvtV2Config(**PYRAMID)), PICTURE),
    "segformer-b2": Spec(
        "SegFormer-B2", lambda: T.SegformerForImageClassification(T.SegformerConfig(**PYRAMID)), PICTURE
    ),
}
