"""What is drawn: recipes, and the options to merge them with. What is repeated in a list is likelier."""

from __future__ import annotations

from random import Random
from typing import Any

from tests.generated.recipe import Recipe
from tldr_compile import ops

Choices = dict[str, list[Any]]

RECIPE: Choices = {
    "embed": ["conv3d", "conv3d", "frames", "folded", "tokens", "rows"],
    "grid": [(t, h, w) for t in (1, 2, 3) for h in (2, 3) for w in (2, 3, 4)],
    "batch": [1, 2, 3],
    "before": [0, 0, 1, 3],
    "after": [0, 0, 1],
    "position": ["none", "learned", "sinusoidal", "interpolated", "ids", "arange", "table", "axial"],
    "layout": ["batch", "batch", "batch", "sequence", "grid", "packed"],
    "norm": ["pre", "pre", "post", "none"],
    "branch": ["serial", "parallel", "scaled", "inplace", "between", "ushaped", "joint", "twins", "windows"],
    "attention": ["sdpa", "sdpa", "matmul", "bmm", "baddbmm", "einsum", "capped", "sinks", "talking", "module"],
    "qkv": ["fused", "split", "grouped", "multiquery", "normed", "prompted"],
    "scale": ["after", "before", "both", "divided"],
    "bias": ["none"] * 6 + ["relative", "relative", "inplace", "inplace", "causal", "padding"],
    "mlp": ["gelu", "gelu", "gated", "mixing", "experts", "routed", "convolution", "squeezed"],
    "tail": [
        *("mean", "first", "tokens", "pooled", "dense", "states", "skip"),
        *("softmax", "frames", "difference", "product", "attentions", "decoder", "spelled"),
        *("blocks", "blocks"),
    ],
    "beside": ["none"] * 4 + ["scale", "view", "text"],
    "dtype": ["float32", "float32", "float32", "float64", "bfloat16"],
    "dynamic": [False, False, False, True],
    "depth": [1, 2],
    "seed": list(range(10)),
}

OPTIONS: Choices = {
    "schedule": [[1], [3], [2, 1], [3, 0.25], [1, 0, 2], [0.4, 0.1], 0.25, [2, 5, 1]],
    "saliency": ["attention", *ops.SIGNALS],
    "metric": ["tokens", "tokens", "keys"],
    "reduction": [
        *("merge", "merge", "merge", "drop", "random", "slice"),
        *("energy", "affinity", "partition", "random merge"),
    ],
    "grouping": ["auto", "auto", "auto", "each", "shared", "blocks"],
    "outputs": ["restore", "restore", "merged"],
    "pooling": ["mass", "plain"],
    "proportional": [True, False],
}


def possible(recipe: Recipe) -> bool:
    """No extra tokens on a grid, no rotary positions in `nn.MultiheadAttention`, no dynamic batch of one or in a row.

    What stands beside a clip stands beside all of its frames, and `[B, N, C]`. Masks know no keys but the tokens.
    """
    added = recipe.leading or recipe.after
    prompted = recipe.qkv == "prompted" and recipe.attention != "module"
    rotary = recipe.position in ("arange", "table", "axial")
    return (
        not (recipe.layout == "grid" and added)
        and not (recipe.attention == "module" and rotary)
        and not (recipe.dynamic and (recipe.batch < 2 or recipe.embed in ("folded", "rows")))
        and not (recipe.beside != "none" and (recipe.embed, recipe.layout) != ("conv3d", "batch"))
        and not (prompted and recipe.bias in ("relative", "causal", "padding"))
    )


def settled(options: dict[str, Any]) -> dict[str, Any]:
    """Dropping the least salient tokens needs a saliency."""
    blind = options["reduction"] == "drop" and options["saliency"] == "uniform"
    return {**options, "saliency": "attention"} if blind else options


def drawn_recipe(random: Random) -> Recipe:
    """A recipe, every choice drawn by itself."""
    while not possible(recipe := Recipe(**{name: random.choice(values) for name, values in RECIPE.items()})):
        pass
    return recipe


def drawn_options(random: Random) -> dict[str, Any]:
    return settled({name: random.choice(values) for name, values in OPTIONS.items()})
