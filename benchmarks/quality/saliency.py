"""Does saliency see? Where the saliency of each layer lies, on made clips whose digit is known to the pixel.

    python -m benchmarks.quality.saliency [--write docs/quality.md]

A token is the digit's if the digit covers a quarter of its patch in either of its frames. Per layer: the share of
saliency on the digit's tokens, and the ROC AUC of saliency as a detector of them, both averaged over clips; beside them
chance, and the attention that a token receives, scored alike. Nothing is merged. `--write` replaces what stands between
two lines `<!-- saliency -->`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib import pyplot
from rich.progress import track
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.pages import PICTURES, add_write, write
from benchmarks.quality import clips
from benchmarks.quality.clips import Clips
from benchmarks.quality.command import check_writable, placed, status
from benchmarks.quality.made import check_made, checkpoint
from benchmarks.quality.train import EVAL_BATCH, batches
from tldr_compile import ops
from tldr_compile.cli.main import positive
from tldr_compile.cli.quality import check_outputs
from tldr_compile.media.video import IMAGENET_MEAN, IMAGENET_STD
from tldr_compile.quality.accuracy import Estimate, normal
from tldr_compile.quality.data import load
from tldr_compile.records.charts import save
from tldr_compile.records.tables import grid

MARKER: Final = "<!-- saliency -->"
COVERED: Final = 0.25
DRAWN: Final = tuple(8 * digit + digit % 8 for digit in range(10))  # every digit, every direction (of the first task)


class Scores(NamedTuple):
    """What a layer says of every token of some clips, each float32 [B, N]."""

    saliency: Tensor
    received: Tensor


def digit_tokens(mask: Tensor, tubelet: int, patch: int) -> Tensor:
    """The mask of a digit, bool [B, T, H, W], as that of its tokens, bool [B, N]."""
    covered = F.avg_pool3d(mask[:, None].float(), (1, patch, patch))[:, 0]
    return (covered.unflatten(1, (-1, tubelet)).amax(2) >= COVERED).flatten(1)


def scores(attention: Tensor) -> Scores:
    """Of a layer's attention [B, H, N, N]: its saliency, and the mean that each token receives."""
    return Scores(ops.saliency(ops.sharpness_of(attention)), attention.mean((1, 2)))


def share(score: Tensor, digit: Tensor) -> Tensor:
    """Part of the score [B, N] that lies on the digit's tokens [B, N]: float32 [B]."""
    return (score * digit).sum(1) / score.sum(1)


def auc(score: Tensor, digit: Tensor) -> Tensor:
    """ROC AUC of the score [B, N] as a detector of the digit's tokens bool [B, N], per clip: float32 [B]."""
    return torch.tensor([roc_auc_score(*pair) for pair in zip(digit.numpy(), score.numpy(), strict=True)]).float()


@torch.inference_mode()
def layers(model: nn.Module, pixels: Tensor) -> list[Scores]:
    """Of every layer; the model's attention is spelled out (`eager`)."""
    return [scores(attention) for attention in model(pixels, output_attentions=True).attentions]


def table(model: nn.Module, some: Iterable[Clips]) -> list[dict[str, Estimate]]:
    """A row for each layer, averaged over clips, with 95 % intervals."""
    measures: dict[str, Callable[[Scores, Tensor], Tensor]] = {
        "share": lambda found, digit: share(found.saliency, digit),
        "chance": lambda found, digit: digit.float().mean(1),
        "auc": lambda found, digit: auc(found.saliency, digit),
        "received_share": lambda found, digit: share(found.received, digit),
        "received_auc": lambda found, digit: auc(found.received, digit),
    }
    depth = model.config.num_hidden_layers
    rows: list[dict[str, list[Tensor]]] = [{name: [] for name in measures} for _ in range(depth)]
    for batch in some:
        digit = digit_tokens(batch.mask, model.config.tubelet_size, model.config.patch_size)
        for row, found in zip(rows, layers(model, batch.pixels), strict=True):
            for name, measure in measures.items():
                row[name].append(measure(found, digit))
    return [{name: normal(torch.cat(parts)) for name, parts in row.items()} for row in rows]


def markdown(rows: Sequence[Mapping[str, Sequence[float]]]) -> str:
    """The rows of `table`, or as JSON keeps them."""
    head = ("layer", "saliency on the digit, %", "its tokens, %", "AUC of saliency", "attention received, %", "its AUC")

    def line(index: int, row: Mapping[str, Sequence[float]]) -> tuple[str, ...]:
        on, chance, received = (f"{100 * row[name][0]:.1f}" for name in ("share", "chance", "received_share"))
        seen, other = ("{:.3f} ({:.3f} to {:.3f})".format(*row[name]) for name in ("auc", "received_auc"))
        return str(index), on, chance, seen, received, other

    return grid(head, (line(index, row) for index, row in enumerate(rows, 1)))


def picture(model: nn.Module, some: Clips, path: Path) -> Path:
    """A line for each clip: a frame from its middle, the digit's mask, and every layer's saliency over the frame."""
    config = model.config
    time, side = config.num_frames // config.tubelet_size // 2, config.image_size // config.patch_size
    frame = time * config.tubelet_size
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    shown = (some.pixels[:, frame] * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    heat = [found.saliency.unflatten(1, (-1, side, side))[:, time].numpy() for found in layers(model, some.pixels)]
    titles = ("frame", "digit", *(f"layer {index}" for index in range(1, len(heat) + 1)))
    low, high = -0.5, config.image_size - 0.5
    extent = (low, high, high, low)
    figure, axes = pyplot.subplots(
        len(shown), len(titles), figsize=(len(titles), 1.05 * len(shown)), squeeze=False, layout="constrained"
    )
    for index, line in enumerate(axes):
        images = ({"X": shown[index]}, {"X": some.mask[index, frame].numpy(), "cmap": "gray"})
        for each, image in zip(line, images, strict=False):
            each.imshow(**image)
        for each, layer in zip(line[2:], heat, strict=True):
            each.imshow(shown[index].mean(-1), cmap="gray")
            each.imshow(layer[index], cmap="magma", vmin=0, vmax=1, alpha=0.7, extent=extent)
        for each in line:
            each.set_axis_off()
    for each, title in zip(axes[0], titles, strict=True):
        each.set_title(title, fontsize=8)
    return save(figure, path)


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a VideoMAE for made clips; default: the one that is trained here")
    parser.add_argument("--clips", type=positive, default=800, help="test clips, a multiple of 80 (default: 800)")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default: benchmarks/results, or one for --model")
    parser.add_argument("--picture", type=Path, help="PNG; default: docs/saliency.png, or beside the JSON of --model")
    add_write(parser, MARKER)
    return placed(parser.parse_args(argv), "saliency", PICTURES / "saliency.png")


def run(chosen: argparse.Namespace) -> None:
    """Measure, print, keep, draw. Raises TldrError."""
    check_outputs(chosen.out, chosen.picture)
    check_writable(chosen.write, MARKER)
    name = chosen.model or checkpoint()
    subject = load(name, attention="eager")
    task = check_made(subject, name, chosen.clips)
    some = track(batches(task, "test", chosen.clips), "looking", total=chosen.clips // EVAL_BATCH, transient=True)
    rows = table(subject.model, some)
    facts: dict[str, Any] = {
        "model": chosen.model or "checkpoint",
        "clips": chosen.clips,
        "covered": COVERED,
        "machine": timing.machine(torch.device("cpu")),
        "layers": rows,
    }
    print(markdown(rows))
    print(timing.write("saliency", facts, chosen.out))
    print(picture(subject.model, clips.make(task, "test", DRAWN), chosen.picture))
    write(chosen.write, markdown(rows), MARKER)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after an error that one line on stderr explains."""
    chosen = options(argv)
    return status("saliency", lambda: run(chosen))


if __name__ == "__main__":
    sys.exit(main())
