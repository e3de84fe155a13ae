"""Whether a merged graph means what it should.

In: a plan and the graph that was emitted. Out: nothing, or `VerificationError`. `projection` interprets the original
graph at full length with the stream replaced by `up(down(x))`; `independence` asks whether samples stay apart, against
the dense graph alone; `check_shapes` compares shapes.

Nothing here shares code with `emit`, or knows how a graph was made: only what it must mean.
"""

from tldr_compile.passes.check.projection import full_length
from tldr_compile.passes.check.verify import check_shapes, record, verify

__all__ = [
    "check_shapes",
    "full_length",
    "record",
    "verify",
]
