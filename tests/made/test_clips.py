from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.quality import clips, tasks
from benchmarks.quality.clips import make
from benchmarks.quality.sources import SCANS, SOURCES, Split, backgrounds, scans
from benchmarks.quality.tasks import DIRECTION, ORDER, TASKS, Draws, Task

BOTH = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
HEADINGS = torch.tensor([(1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1)]).float()


def centres(mask: Tensor) -> Tensor:
    """The mean x and y of a mask [..., H, W]: float32 [..., 2]."""
    side = torch.arange(mask.shape[-1])
    y, x = torch.meshgrid(side, side, indexing="ij")
    area = mask.sum((-2, -1))
    return torch.stack([(mask * x).sum((-2, -1)) / area, (mask * y).sum((-2, -1)) / area], dim=-1)


@BOTH
def test_a_batch_has_every_class_once(task: Task) -> None:
    batch = make(task, "val", range(task.classes))
    assert batch.pixels.shape == (task.classes, task.frames, 3, task.size, task.size)
    assert batch.pixels.dtype == torch.float32
    assert batch.mask.shape == (task.classes, task.frames, task.size, task.size)
    assert batch.labels.tolist() == list(range(task.classes))
    assert len(set(task.names)) == task.classes


@BOTH
def test_a_clip_does_not_depend_on_its_batch(task: Task) -> None:
    alone, among = make(task, "val", [7]), make(task, "val", [3, 160, 7])
    assert torch.equal(alone.mask[0], among.mask[2])
    torch.testing.assert_close(alone.pixels[0], among.pixels[2])


@BOTH
@pytest.mark.parametrize(("split", "index", "seed"), [("val", 87, 0), ("val", 7, 1), ("test", 7, 0)])
def test_index_seed_and_split_each_make_another_clip(task: Task, split: Split, index: int, seed: int) -> None:
    assert not torch.equal(make(task, "val", [7]).pixels, make(task, split, [index], seed=seed).pixels)


def test_the_digit_moves_in_the_direction_of_the_label() -> None:
    batch = make(DIRECTION, "val", range(DIRECTION.classes))
    middle = centres(batch.mask)
    move = torch.nn.functional.normalize(middle[:, -1] - middle[:, 0], dim=1)
    cosines = move @ torch.nn.functional.normalize(HEADINGS, dim=1).T
    assert cosines.argmax(1).tolist() == (batch.labels % 8).tolist()
    assert cosines.amax(1).min() > 0.97


def steps(batch: clips.Clips) -> Tensor:
    """How the digit moved from frame to frame, in the outline's own centre: float32 [B, T - 1, 2]."""
    return centres(batch.mask).diff(dim=1)


def test_the_digit_moves_in_both_directions_of_the_label_in_their_order() -> None:
    batch = make(ORDER, "val", range(4 * ORDER.classes))
    moved, shortest = steps(batch), tasks.SHORTEST
    early, late = moved[:, :shortest].sum(1), moved[:, -shortest:].sum(1)
    for move, part in ((early, batch.labels // 4), (late, batch.labels % 4)):
        cosines = torch.nn.functional.normalize(move, dim=1) @ HEADINGS[::2].T
        assert cosines.argmax(1).tolist() == part.tolist()
        assert cosines.amax(1).min() > 0.97


def test_no_stretch_as_short_as_the_rest_holds_both_directions() -> None:
    still = steps(make(ORDER, "val", range(4 * ORDER.classes))).norm(dim=2) < 1.0
    lengths = still.sum(1)
    first = still.int().argmax(1)
    assert lengths.tolist() == [tasks.REST] * len(still)
    assert all(row[start : start + tasks.REST].all() for row, start in zip(still, first.tolist(), strict=True))
    assert set(first.tolist()) == set(range(tasks.SHORTEST, ORDER.frames - tasks.REST - tasks.SHORTEST))


def test_backwards_is_the_class_of_the_opposite_directions_the_other_way_round() -> None:
    labels = torch.arange(ORDER.classes)
    chosen = ORDER.split(labels)
    backwards = {"first": (chosen["second"] + 2) % 4, "second": (chosen["first"] + 2) % 4}
    path = ORDER.path(chosen, Draws(torch.full((16, 2), 0.4)))
    other = ORDER.path(backwards, Draws(torch.tensor([0.4, 0.6]).repeat(16, 1)))
    torch.testing.assert_close(path.flip(1).diff(dim=1), other.diff(dim=1))
    assert not torch.equal(path.diff(dim=1)[1], other.diff(dim=1)[1])


@BOTH
def test_the_mask_covers_the_digit_and_little_else(task: Task) -> None:
    """Without contrast and distractors, every pixel that the digit did not change is of one colour; edges are soft."""
    batch = make(task, "train", range(task.classes), contrast=0.0)
    corner = batch.pixels[:, :1, :, :1, :1]
    changed = ((batch.pixels - corner).abs() > 1e-3).any(dim=2)
    assert not (batch.mask & ~changed).any()
    assert batch.mask.sum() > 0.7 * changed.sum()
    assert batch.mask.float().mean() < 0.2


@BOTH
def test_the_digit_stays_in_the_frame(task: Task) -> None:
    """Its outline may touch the border, its ink may not be cut: the mask's area hardly changes over a clip."""
    area = make(task, "val", range(task.classes)).mask.sum((2, 3)).float()
    assert (area.amin(1) / area.amax(1)).min() > 0.8


def test_clips_of_one_class_have_different_backgrounds() -> None:
    batch = make(DIRECTION, "train", [0, DIRECTION.classes])
    assert batch.labels.unique().numel() == 1
    outside = ~batch.mask.any(0).any(0)
    assert not torch.equal(batch.pixels[0][:, :, outside], batch.pixels[1][:, :, outside])


@pytest.mark.parametrize("contrast", [-0.1, 1.1])
def test_contrast_is_a_share(contrast: float) -> None:
    with pytest.raises(ValueError, match="not in 0 to 1"):
        make(DIRECTION, "val", [0], contrast=contrast)


def test_no_scan_is_in_two_splits() -> None:
    taken = [set(range(1797)[part]) for part in SCANS.values()]
    assert sum(map(len, taken)) == len(set.union(*taken)) == 1797
    images = [{tuple(scan.flatten().tolist()) for scan in scans(split).images} for split in SCANS]
    assert sum(map(len, images)) == len(set.union(*images))


def test_no_background_is_in_two_splits() -> None:
    columns = [
        {(source.name, column) for source in sources for column in range(640)[source.columns]}
        for sources in SOURCES.values()
    ]
    assert sum(map(len, columns)) == len(set.union(*columns))


@BOTH
def test_a_region_holds_a_crop_and_its_drift(task: Task) -> None:
    drift = (task.frames - 1) * task.camera_speed
    for split in SOURCES:
        table = backgrounds(split)
        assert table.regions[:, 2:].min() >= task.size + drift
        offset, frames, height, width = table.regions[-1].tolist()
        assert offset + frames * height * width == len(table.pixels)


def test_draws_run_out_with_an_error() -> None:
    draw = Draws(torch.rand(2, 3))
    assert draw(2).shape == (2, 2)
    with pytest.raises(ValueError, match="1 left: raise UNIFORMS"):
        draw(2)
