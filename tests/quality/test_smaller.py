"""The same weights on fewer frames and at lower resolution."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import VideoMAEForVideoClassification

from tests.quality.support import CLASS_NAMES, config
from tldr_compile.errors import OptionError
from tldr_compile.media.models import Subject
from tldr_compile.media.video import Preprocessing
from tldr_compile.quality import smaller
from tldr_compile.quality.smaller import Less, fewer_frames, lower_resolution, on_less


@pytest.fixture
def subject() -> Subject:
    model = VideoMAEForVideoClassification(config(side=32, frames=8, names=CLASS_NAMES)).eval()
    return Subject(model, 8, Preprocessing(32, (32, 32)), "made here")


def test_what_there_is_to_choose_from(subject: Subject) -> None:
    assert list(fewer_frames(subject)) == [Less(6, 32), Less(4, 32), Less(2, 32)]
    assert list(lower_resolution(subject)) == [Less(8, 24), Less(8, 16), Less(8, 8)]


@torch.no_grad()
def test_on_all_of_the_clip_it_is_the_model(subject: Subject) -> None:
    clip = torch.randn(2, 8, 3, 32, 32)
    assert torch.equal(on_less(subject, Less(8, 32))(clip).logits, subject.model(clip).logits)


@torch.no_grad()
def test_a_clip_that_stands_still_and_is_flat_is_the_same_on_less_of_it(subject: Subject) -> None:
    """Without positions all tokens are alike, however many there are."""
    subject.model.videomae.embeddings.position_embeddings.zero_()
    clip = torch.ones(1, 8, 3, 32, 32)
    whole = subject.model(clip).logits
    for less in (Less(4, 32), Less(8, 16)):
        torch.testing.assert_close(on_less(subject, less)(clip).logits, whole)


def test_positions_are_interpolated_over_the_grid() -> None:
    # A class token, and 4 x 2 x 2 patches that number their time: half as many lie between them.
    times = torch.arange(4.0).repeat_interleave(4)
    table = torch.cat((torch.tensor([9.0]), times)).reshape(1, -1, 1)
    found = smaller._resized(table, (1, 9, 1), (4, 2, 2), (2, 2, 2))
    assert found is not None
    assert found.flatten().tolist() == [9, *[0.5] * 4, *[2.5] * 4]


def test_weights_over_tokens_that_are_no_table_are_refused(subject: Subject) -> None:
    class Mixing(VideoMAEForVideoClassification):
        def __init__(self, config) -> None:  # type: ignore[no-untyped-def]
            super().__init__(config)
            self.mixing = nn.Linear(config.num_frames, 1)

    model = Mixing(subject.model.config)
    with pytest.raises(OptionError, match=r"mixing.weight is \[1, 8\], would be \[1, 4\], and is no table"):
        on_less(Subject(model, 8, subject.preprocessing, ""), Less(4, 32))
