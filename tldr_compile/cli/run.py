"""`tldr run`: the whole way on a real clip, from the file to the report, the measurements and the picture."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import tldr_compile
from tldr_compile.cli.main import options
from tldr_compile.errors import TldrError
from tldr_compile.inspection import Decision
from tldr_compile.media import models, video
from tldr_compile.media.models import device_of
from tldr_compile.media.picture import picture
from tldr_compile.records import measure
from tldr_compile.records.outputs import check_file, check_png

TIME_FIRST = ("t", "h", "w")


def run(arguments: argparse.Namespace) -> None:
    """Prints and draws what `tldr run --help` says. Raises TldrError; nothing is compiled before the input is read."""
    asked = options(arguments)
    config = tldr_compile.TokenMerging.from_options(asked)
    device = device_of(arguments.device)
    check_png("--out", arguments.out)
    check_file("--out", arguments.out)
    path = arguments.video or video.sample_video()
    available = video.count(path)
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)

    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        with _step(bar, "building the model"):
            subject = models.load(arguments.model, attention=arguments.attn, seed=arguments.seed)
            model = subject.model.to(device)
        frames = video.fit(video.sample(path, available, subject.frames), subject.preprocessing)
        clip = video.normalise(frames, subject.preprocessing).to(device)
        console.print(f"clip    {path}: {subject.frames} of {available} frames, {frames.shape[2]} x {frames.shape[1]}")
        console.print(f"model   {subject.origin}")

        with torch.no_grad():
            with _step(bar, "finding, typing, planning, rewriting"):
                merged = tldr_compile.apply(model, (clip,), config=config)
            console.print(merged.report)
            dense = _compiled(bar, "compiling the model as it is", torch.compile(model), clip)
            fast = _compiled(
                bar,
                "compiling with backend='tldr'",
                torch.compile(model, backend="tldr", options=asked),
                clip,
            )
            calls = {"dense": dense, "tldr": fast}
            _compare(console, bar, calls, names(model.config), device, arguments.repeats)
            with _step(bar, "drawing"):
                drawn = _drawn(frames, tldr_compile.inspect(merged, clip))
    if drawn is None:
        console.print("picture none: no tokens were merged that lie on a grid of t, h and w")
    else:
        drawn.save(arguments.out, format="PNG")
        console.print(f"picture {arguments.out}: frames, saliency, groups")


def _compare(
    console: Console,
    bar: Progress,
    calls: dict[str, Callable[[], torch.Tensor]],
    classes: Mapping[int, str],
    device: torch.device,
    rounds: int,
) -> None:
    with _step(bar, "warming up"):
        outputs = {name: call() for name, call in calls.items()}
    task = bar.add_task("timing in pairs", total=rounds * len(calls))
    taken = measure.alternate(calls, device, rounds=rounds, tick=lambda: bar.advance(task))
    with _step(bar, "measuring memory"):
        peak = {name: measure.peak_bytes(call, device) / 2**20 for name, call in calls.items()}
    far = measure.distance(outputs["dense"], outputs["tldr"])
    times = measure.ratio(taken["dense"], taken["tldr"])

    for name, logits in outputs.items():
        console.print(f"answer  {name:6} {answer(logits, classes)}")
    console.print(f"latency, both compiled, {rounds} pairs")
    for name, seconds in taken.items():
        spread = measure.Spread.of([1e3 * second for second in seconds])
        console.print(f"  {name:6} {spread.median:8.1f} ms  (min {spread.min:.1f}, max {spread.max:.1f})")
    console.print(f"  {'faster':6} {times.median:8.2f} x   (min {times.min:.2f}, max {times.max:.2f})")
    console.print(f"peak memory  {peak['dense']:.1f} -> {peak['tldr']:.1f} MiB in tensors of one call, without weights")
    console.print(
        f"logits apart  largest {far.largest:.3g}, relative {far.relative:.3g}, cosine {far.cosine:.5f}, "
        f"{'the same' if far.same_top else 'ANOTHER'} answer"
    )


def names(config: Any) -> Mapping[int, str]:
    """The classes of a model, from the configuration that came with it."""
    named: Mapping[int, str] = getattr(config, "id2label", None) or {}
    return named


def answer(logits: torch.Tensor, classes: Mapping[int, str]) -> str:
    """The likeliest class of logits [1, K] and its probability; its number, where `classes` does not name it."""
    share, label = (float(value) for value in logits[0].float().softmax(0).max(0))
    return f"{classes.get(int(label), f'class {int(label)}')} ({share:.1%})"


def _compiled(bar: Progress, what: str, model: Any, clip: torch.Tensor) -> Callable[[], torch.Tensor]:
    def call() -> torch.Tensor:
        logits: torch.Tensor = model(clip).logits
        return logits

    with _step(bar, what):
        try:
            call()
        except torch._dynamo.exc.BackendCompilerFailed as failure:
            if isinstance(failure.inner_exception, TldrError):
                raise failure.inner_exception from failure
            raise
    return call


def _drawn(frames: video.Frames, merges: Sequence[Decision]) -> Image.Image | None:
    """The saliency of the first merge, at full resolution, and the groups after the last one."""
    if not merges:
        return None
    first, last = merges[0], merges[-1]
    saliency, assign = on_grid(first, first.saliency), on_grid(last, _groups(last))
    if saliency is None or assign is None:
        return None
    t, h, w = saliency.shape
    return picture(frames, (t, h, w), saliency.flatten().numpy(), assign.flatten().numpy())


def _groups(merge: Decision) -> torch.Tensor:
    """The group of every token, numbered anew for each value of what is grouped apart."""
    return merge.assign + merge.assign.shape[1] * torch.arange(len(merge.assign))[:, None]


def on_grid(merge: Decision, values: torch.Tensor) -> torch.Tensor | None:
    """A number of every token of the first sample as `[t, h, w]`; None if they do not lie on such a grid.

    A dimension that was split, `h1` and `h2`, is put together again.
    """
    volume, labels = merge.volume(values.detach().cpu())
    named = {name: [k for k, label in enumerate(labels) if label[:1] == name] for name in TIME_FIRST}
    if not all(named.values()):
        return None
    order = [k for dims in named.values() for k in sorted(dims, key=labels.__getitem__)]
    rest = [k for k in range(len(labels)) if k not in order]
    sizes = [prod(volume.shape[k] for k in dims) for dims in named.values()]
    return volume.permute(*rest, *order)[(0,) * len(rest)].reshape(sizes)


@contextmanager
def _step(bar: Progress, what: str) -> Iterator[None]:
    task = bar.add_task(what, total=None)
    yield
    bar.update(task, total=1, completed=1)
