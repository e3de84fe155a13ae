"""Made clips and the model that is trained on them, as the comparison takes them."""

from __future__ import annotations

from benchmarks.quality.clips import CLASSES, FRAMES, SIZE, Split
from benchmarks.quality.train import CHECKPOINTS, EVAL_BATCH, HERE, batches
from tldr_compile.errors import OptionError
from tldr_compile.media.models import ModelError, Subject
from tldr_compile.quality.data import Batch, Part


def checkpoint() -> str:
    """The folder of the model that is trained here. Raises ModelError where it is missing."""
    path = HERE / CHECKPOINTS["base"]
    if not path.is_dir():
        raise ModelError(f"there is no checkpoint in {path}: train it with python -m benchmarks.quality.train")
    return str(path)


def check_made(subject: Subject, name: str, number: int) -> None:
    """Raises ModelError for a model that reads other clips than the made ones, OptionError for so many of them."""
    if number % EVAL_BATCH:
        raise OptionError(f"--clips {number}: made clips come {EVAL_BATCH} at a time, one of every class")
    reads = (subject.model.config.num_labels, subject.frames, *subject.preprocessing.crop)
    if reads != (CLASSES, FRAMES, SIZE, SIZE):
        raise ModelError(
            f"{name} tells {reads[0]} classes from {reads[1]} frames of {reads[2]} x {reads[3]}, and the made clips "
            f"have {CLASSES}, {FRAMES} and {SIZE} x {SIZE}: compare it on videos with `tldr quality --data`"
        )


def made(split: Split, number: int) -> Part:
    """Made clips of a split, a multiple of 80."""
    taken = (Batch(batch.pixels, batch.labels) for batch in batches(split, number))
    return Part(number, EVAL_BATCH, taken)
