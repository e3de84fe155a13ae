"""The picture shows what was merged: read back pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tldr_compile.media.picture import CAPTION, DIM, GAP, picture

GRID = (2, 2, 2)
SIDE = 160


def frames() -> np.ndarray:
    """Four frames of four quarters; the grey of a quarter counts through the tokens: 20, 40, ... 160."""
    tokens = (1 + np.arange(8, dtype=np.uint8)).reshape(GRID) * 20
    pixels = tokens.repeat(2, axis=0).repeat(SIDE // 2, axis=1).repeat(SIDE // 2, axis=2)
    return np.repeat(pixels[..., None], 3, axis=-1)


def middle(image: Image.Image, row: int, token: int) -> tuple[int, ...]:
    t, h, w = np.unravel_index(token, GRID)
    left = GAP + int(t) * (SIDE + GAP) + int(w) * SIDE // 2 + SIDE // 4
    top = row * (SIDE + CAPTION) + CAPTION + int(h) * SIDE // 2 + SIDE // 4
    pixel = image.getpixel((left, top))
    assert isinstance(pixel, tuple)
    return pixel


def draw(saliency: list[float], assign: list[int]) -> Image.Image:
    return picture(frames(), GRID, np.array(saliency, dtype=np.float32), np.array(assign, dtype=np.int64))


def test_rows_of_one_column_per_time_step() -> None:
    image = draw([1.0] * 8, list(range(8)))
    assert image.size == (2 * (SIDE + GAP) + GAP, 3 * (SIDE + CAPTION) + GAP)
    assert [middle(image, 0, token)[0] for token in range(8)] == [20, 40, 60, 80, 100, 120, 140, 160]


def test_tokens_alone_keep_their_pixels() -> None:
    image = draw([0.0] * 8, list(range(8)))
    assert [middle(image, 2, token) for token in range(8)] == [middle(image, 0, token) for token in range(8)]


def test_a_group_has_the_mean_colour_also_across_time() -> None:
    image = draw([1.0] * 8, [0, 1, 2, 3, 4, 5, 6, 0])
    assert middle(image, 2, 0) == middle(image, 2, 7) == (90, 90, 90)
    assert middle(image, 2, 1) == (40, 40, 40)


def test_merged_background_is_dim_and_the_rest_of_its_group_is_not() -> None:
    image = draw([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0], [5, 5, 2, 3, 4, 6, 7, 8])
    assert middle(image, 2, 0) == (30, 30, 30)
    assert middle(image, 2, 1) == (round(30 * DIM),) * 3
    assert middle(image, 2, 2) == (60, 60, 60)  # background, but alone


def test_heat_grows_with_saliency() -> None:
    image = draw([0.0, 0.25, 0.5, 1.0, 0.0, 0.0, 0.0, 0.0], list(range(8)))
    heat = [sum(middle(image, 1, token)) - 0.4 * sum(middle(image, 0, token)) for token in range(4)]
    assert heat == sorted(heat)
    assert heat[0] < heat[-1] - 200


@pytest.mark.parametrize(("tokens", "grid"), [(7, GRID), (6, (2, 3, 1)), (6, (3, 1, 2))])
def test_what_does_not_fit_together_is_refused(tokens: int, grid: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="grid"):
        picture(frames(), grid, np.zeros(tokens, dtype=np.float32), np.zeros(tokens, dtype=np.int64))


def test_small_frames_are_enlarged_by_whole_pixels() -> None:
    small = frames()[:, :: SIDE // 16, :: SIDE // 16]
    assert small.shape[1:3] == (16, 16)
    saliency, assign = np.ones(8, dtype=np.float32), np.arange(8)
    assert np.array_equal(picture(small, GRID, saliency, assign), picture(frames(), GRID, saliency, assign))
