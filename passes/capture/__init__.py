"""Any traced model -> one graph in one dialect.

In: what `torch.export` or Dynamo traced. Out: `Captured`, a functional graph of plain ATen operators with the names and
source lines of the model, and, by `fuse`, a copy in which all attention is spelled one way.

    my::attention, einsum, softmax(q k') v, layer_norm by hand  ->  scaled_dot_product_attention, sums, ...

Nothing here knows of axes, tokens or merging: only what operators compute. An operator that hides something gets a
function of plain operators (`@decomposition`), which is traced in its place.
"""

from tldr_compile.passes.capture.assertions import Assertions
from tldr_compile.passes.capture.attention import SDPA, Attention, fuse
from tldr_compile.passes.capture.canonicalize import Captured, from_dynamo, from_export, inherit, retraced, with_writes
from tldr_compile.passes.capture.clip import clip_inputs
from tldr_compile.passes.capture.decompositions import decomposition

__all__ = [
    "SDPA",
    "Assertions",
    "Attention",
    "Captured",
    "clip_inputs",
    "decomposition",
    "from_dynamo",
    "from_export",
    "fuse",
    "inherit",
    "retraced",
    "with_writes",
]
