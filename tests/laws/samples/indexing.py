"""Looked up by number, or written there."""

from __future__ import annotations

import torch

from tests.laws.samples.sample import MIXES, TOKENS, B, C, Stream, across, aten, barred, carried, rows
from tests.tracing import number

PLACES = torch.tensor([2, 0, 1])


def places(h: Stream) -> Stream:
    """For every token the place of its largest channel, `[b, 1 + t·n, 1]`."""
    return aten.argmax.default(h, 2, True)


def sampled(h: Stream) -> Stream:
    """For every token a place in a map, `[b, 1 + t·n, 1, 2]`."""
    return aten.unsqueeze.default(aten.tanh.default(aten.slice.Tensor(h, 2, 0, 2)), 2)


INDEXING = [
    *carried("embedding", lambda h: aten.embedding.default(number(C, 5), aten.argmax.default(h, 2))),
    *carried(
        "index",
        lambda h: aten.index.Tensor(number(C, 5), [aten.argmax.default(h, 2)]),
        lambda h: aten.index.Tensor(h, [None, None, PLACES]),
        lambda h: aten.index.Tensor(number(C, C, 5), [aten.argmax.default(h, 2), aten.argmin.default(h, 2)]),
    ),
    *barred("index", MIXES, lambda h: aten.index.Tensor(h, [None, PLACES])),
    *barred("index", "it has no typing rule", lambda h: aten.index.Tensor(h, [PLACES % B, None, PLACES])),
    *barred(
        "index", "it has no typing rule", lambda h: aten.index.Tensor(h, [torch.ones(B, TOKENS, dtype=torch.bool)])
    ),
    *carried("index_select", lambda h: aten.index_select.default(h, 2, PLACES)),
    *barred("index_select", MIXES, lambda h: aten.index_select.default(h, 1, PLACES)),
    *carried("gather", lambda h: aten.gather.default(h, 2, places(h))),
    *barred("gather", MIXES, lambda h: aten.gather.default(h, 1, aten.zeros_like.default(h, dtype=torch.int64))),
    *barred("gather", MIXES, lambda h: aten.gather.default(h, 2, torch.zeros(B, 3, 2, dtype=torch.int64))),
    *carried(
        "scatter",
        lambda h: aten.scatter.value(h, 2, places(h), 1.0),
        lambda h: aten.scatter.src(h, 2, places(h), aten.neg.default(h)),
    ),
    *barred("scatter", MIXES, lambda h: aten.scatter.value(h, 1, torch.zeros(B, TOKENS, C, dtype=torch.int64), 1.0)),
    *carried("scatter_add", lambda h: aten.scatter_add.default(h, 2, places(h), aten.neg.default(h))),
    *carried("scatter_reduce", lambda h: aten.scatter_reduce.two(h, 2, places(h), aten.neg.default(h), "amax")),
    *carried(
        "slice_scatter",
        lambda h: aten.slice_scatter.default(h, aten.slice.Tensor(aten.neg.default(h), 2, 0, 3), 2, 0, 3),
    ),
    *barred("slice_scatter", MIXES, lambda h: aten.slice_scatter.default(h, number(B, 2, C), 1, 0, 2)),
    *carried(
        "select_scatter", lambda h: aten.select_scatter.default(h, aten.select.int(aten.neg.default(h), 2, 3), 2, 1)
    ),
    *barred("select_scatter", MIXES, lambda h: aten.select_scatter.default(h, number(B, C), 1, 0)),
    *carried("topk", lambda h: aten.topk.default(h, 3)),
    *barred("topk", MIXES, lambda h: aten.topk.default(h, 3, 1)),
    *carried("one_hot", lambda h: aten.one_hot.default(aten.argmax.default(h, 2), C)),
    *carried("grid_sampler", lambda h: aten.grid_sampler.default(number(B, 3, 4, 4), sampled(h), 0, 0, False)),
    *barred(
        "grid_sampler",
        MIXES,
        lambda h: aten.grid_sampler.default(
            aten.unsqueeze.default(across(h), 2), number(B, 3, 3, 2).tanh(), 0, 0, False
        ),
    ),
    *carried(
        "grid_sampler",
        lambda h: aten.grid_sampler.default(rows(h, 2, 2, 2), number(B * TOKENS, 3, 3, 2).tanh(), 0, 0, False),
    ),
]
