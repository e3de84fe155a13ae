"""What Hypothesis draws: recipes, and the options to merge them with."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.generated.model import Recipe


def _valid(recipe: Recipe) -> bool:
    grid = recipe.layout != "grid" or not (recipe.before or recipe.after)
    return grid and not (recipe.attention == "module" and recipe.position == "rotary")


recipes = st.builds(
    Recipe,
    embed=st.sampled_from(["conv3d", "frames", "tokens"]),
    grid=st.tuples(st.integers(1, 3), st.integers(2, 3), st.integers(2, 4)),
    batch=st.integers(1, 3),
    before=st.sampled_from([0, 0, 1, 3]),
    after=st.sampled_from([0, 0, 1]),
    position=st.sampled_from(["none", "learned", "rotary"]),
    layout=st.sampled_from(["batch", "batch", "sequence", "grid"]),
    norm=st.sampled_from(["pre", "pre", "post", "none"]),
    branch=st.sampled_from(["serial", "parallel", "scaled"]),
    attention=st.sampled_from(["sdpa", "matmul", "bmm", "baddbmm", "einsum", "capped", "module"]),
    qkv=st.sampled_from(["fused", "split", "grouped", "normed"]),
    bias=st.sampled_from(["none", "none", "relative", "inplace"]),
    mlp=st.sampled_from(["gelu", "gated", "mixing"]),
    tail=st.sampled_from(["mean", "first", "tokens", "pooled", "dense", "states", "skip", "softmax", "frames"]),
    depth=st.integers(2, 3),
    seed=st.integers(0, 9),
).filter(_valid)

entries = st.one_of(st.integers(0, 5), st.sampled_from([0.1, 0.25, 0.4]))


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Options that remove at least one token at the first site."""
    rest = draw(st.lists(entries, max_size=2))
    chosen: dict[str, Any] = {
        "schedule": [draw(st.integers(1, 3)), *rest][: draw(st.integers(1, 3))],
        "saliency": draw(st.sampled_from(["attention", "attention", "uniform"])),
        "metric": draw(st.sampled_from(["tokens", "tokens", "keys"])),
        "reduction": draw(st.sampled_from(["merge", "merge", "merge", "drop", "random", "slice"])),
        "outputs": draw(st.sampled_from(["restore", "restore", "merged"])),
        "pooling": draw(st.sampled_from(["mass", "plain"])),
        "proportional": draw(st.booleans()),
    }
    if chosen["reduction"] == "drop":
        chosen["saliency"] = "attention"
    return chosen
