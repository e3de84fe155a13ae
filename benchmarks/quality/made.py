"""Made clips and the model that is trained on them, as the comparison takes them."""

from __future__ import annotations

from benchmarks.quality.sources import Split
from benchmarks.quality.tasks import TASKS, Task
from benchmarks.quality.train import EVAL_BATCH, HERE, RECIPES, batches, kept
from tldr_compile.errors import OptionError
from tldr_compile.media.models import ModelError, Subject
from tldr_compile.quality.data import Batch, Part


def checkpoint() -> str:
    """The folder of the first model that is trained here. Raises ModelError where it is missing."""
    path = HERE / kept(RECIPES["direction"])
    if not path.is_dir():
        raise ModelError(f"there is no checkpoint in {path}: train it with python -m benchmarks.quality.train")
    return str(path)


def check_made(subject: Subject, name: str, number: int) -> Task:
    """The kind of made clips that a model reads, by what its configuration says.

    Raises ModelError for a model that reads none, OptionError for so many of them.
    """
    if number % EVAL_BATCH:
        raise OptionError(f"--clips {number}: made clips come {EVAL_BATCH} at a time, as many of every class")
    reads = (subject.model.config.num_labels, subject.frames, *subject.preprocessing.crop)
    for task in TASKS.values():
        if reads == (task.classes, task.frames, task.size, task.size):
            return task
    have = " or ".join(f"{task.classes} from {task.frames} of {task.size} x {task.size}" for task in TASKS.values())
    raise ModelError(
        f"{name} tells {reads[0]} classes from {reads[1]} frames of {reads[2]} x {reads[3]}, and the made clips "
        f"have {have}: compare it on videos with `tldr quality --data`"
    )


def made(task: Task, split: Split, number: int) -> Part:
    """Made clips of a split, a multiple of 80."""
    taken = (Batch(batch.pixels, batch.labels) for batch in batches(task, split, number))
    return Part(number, EVAL_BATCH, taken)
