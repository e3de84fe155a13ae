from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.quality import clips
from benchmarks.quality.clips import CLASSES, DIRECTIONS, FRAMES, SCANS, SIZE, SOURCES, Draws, make

HEADINGS = torch.tensor([(1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1)]).float()


def centres(mask: Tensor) -> Tensor:
    """The mean x and y of a mask [..., H, W]: float32 [..., 2]."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    area = mask.sum((-2, -1))
    return torch.stack([(mask * x).sum((-2, -1)) / area, (mask * y).sum((-2, -1)) / area], dim=-1)


def test_a_batch_has_every_class_once() -> None:
    batch = make("val", range(CLASSES))
    assert batch.pixels.shape == (CLASSES, FRAMES, 3, SIZE, SIZE)
    assert batch.pixels.dtype == torch.float32
    assert batch.mask.shape == (CLASSES, FRAMES, SIZE, SIZE)
    assert batch.labels.tolist() == list(range(CLASSES))


def test_a_clip_does_not_depend_on_its_batch() -> None:
    alone, among = make("val", [7]), make("val", [3, 160, 7])
    assert torch.equal(alone.mask[0], among.mask[2])
    torch.testing.assert_close(alone.pixels[0], among.pixels[2])


@pytest.mark.parametrize(("split", "index", "seed"), [("val", 87, 0), ("val", 7, 1), ("test", 7, 0)])
def test_index_seed_and_split_each_make_another_clip(split: clips.Split, index: int, seed: int) -> None:
    assert not torch.equal(make("val", [7]).pixels, make(split, [index], seed=seed).pixels)


def test_the_digit_moves_in_the_direction_of_the_label() -> None:
    batch = make("val", range(CLASSES))
    middle = centres(batch.mask)
    move = torch.nn.functional.normalize(middle[:, -1] - middle[:, 0], dim=1)
    cosines = move @ torch.nn.functional.normalize(HEADINGS, dim=1).T
    assert cosines.argmax(1).tolist() == (batch.labels % len(DIRECTIONS)).tolist()
    assert cosines.amax(1).min() > 0.97


def test_the_mask_covers_the_digit_and_little_else() -> None:
    """Without contrast and distractors, every pixel that the digit did not change is of one colour; edges are soft."""
    batch = make("train", range(CLASSES), contrast=0.0)
    corner = batch.pixels[:, :1, :, :1, :1]
    changed = ((batch.pixels - corner).abs() > 1e-3).any(dim=2)
    assert not (batch.mask & ~changed).any()
    assert batch.mask.sum() > 0.7 * changed.sum()
    assert batch.mask.float().mean() < 0.2


def test_the_digit_stays_in_the_frame() -> None:
    """Its outline may touch the border, its ink may not be cut: the mask's area hardly changes over a clip."""
    area = make("val", range(CLASSES)).mask.sum((2, 3)).float()
    assert (area.amin(1) / area.amax(1)).min() > 0.8


def test_clips_of_one_class_have_different_backgrounds() -> None:
    batch = make("train", range(0, 2 * CLASSES, CLASSES))
    assert batch.labels.unique().numel() == 1
    outside = ~batch.mask.any(0).any(0)
    assert not torch.equal(batch.pixels[0][:, :, outside], batch.pixels[1][:, :, outside])


@pytest.mark.parametrize("contrast", [-0.1, 1.1])
def test_contrast_is_a_share(contrast: float) -> None:
    with pytest.raises(ValueError, match="not in 0 to 1"):
        make("val", [0], contrast=contrast)


def test_no_scan_is_in_two_splits() -> None:
    taken = [set(range(1797)[part]) for part in SCANS.values()]
    assert sum(map(len, taken)) == len(set.union(*taken)) == 1797
    images = [{tuple(scan.flatten().tolist()) for scan in clips.scans(split).images} for split in SCANS]
    assert sum(map(len, images)) == len(set.union(*images))


def test_no_background_is_in_two_splits() -> None:
    columns = [
        {(source.name, column) for source in sources for column in range(640)[source.columns]}
        for sources in SOURCES.values()
    ]
    assert sum(map(len, columns)) == len(set.union(*columns))


def test_a_region_holds_a_crop_and_its_drift() -> None:
    drift = (FRAMES - 1) * clips.CAMERA_SPEED
    for split in SOURCES:
        table = clips.backgrounds(split)
        assert table.regions[:, 2:].min() >= SIZE + drift
        offset, frames, height, width = table.regions[-1].tolist()
        assert offset + frames * height * width == len(table.pixels)


def test_draws_run_out_with_an_error() -> None:
    draw = Draws(torch.rand(2, 3))
    assert draw(2).shape == (2, 2)
    with pytest.raises(ValueError, match="1 left: raise UNIFORMS"):
        draw(2)
