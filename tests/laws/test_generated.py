"""The laws on random transformers."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from tests.generated.check import Traced, check, check_model, check_options
from tests.generated.recipe import Recipe
from tests.generated.strategy import drawn_options, drawn_recipe

PLAIN: dict[str, Any] = {
    "schedule": [2, 1],
    "saliency": "attention",
    "metric": "tokens",
    "reduction": "merge",
    "outputs": "restore",
    "pooling": "mass",
    "proportional": True,
}


FOUND: list[tuple[Recipe, dict[str, Any]]] = [
    # A stream on a grid, merged twice: what is held along two dimensions was taken for a table.
    (Recipe(layout="grid", tail="skip"), {"schedule": [0.4, 0.1], "outputs": "merged", "proportional": False}),
    # Merged per frame: scores between frames pair entries of different groupings.
    (Recipe(embed="frames", branch="between"), {"schedule": [2, 0, 2]}),
    # Merged over frames at every place, after every frame was merged: each grouping rests on what the other groups.
    (Recipe(embed="frames", batch=1, branch="between", depth=1), {"schedule": [2, 2], "reduction": "slice"}),
    # Merged per frame and then over the whole clip, which holds the frames' runs.
    (Recipe(embed="frames", branch="joint", depth=3), {"schedule": [2, 4, 3]}),
    (Recipe(embed="frames", branch="joint", attention="matmul", tail="attentions"), {"schedule": [2, 4]}),
    # Masses of keys in windows without heads: queries and keys, which lie along the same dimensions, changed places.
    (Recipe(branch="windows", grid=(2, 3, 4)), {"schedule": [2, 2]}),
]
"""What thousands of random models once broke, in its smallest form."""


@pytest.mark.parametrize("number", range(8))
def test_every_random_model_keeps_the_laws(number: int) -> None:
    """Model `number` of the fuzzer, which draws thousands, with two sets of options: a capture costs four merges."""
    random = Random(number)
    traced = Traced.of(drawn_recipe(random))
    check_model(traced)
    for chosen in (drawn_options(random), drawn_options(random)):
        check_options(traced, chosen)


@pytest.mark.parametrize(("recipe", "changed"), FOUND, ids=lambda each: str(each)[:60])
def test_what_once_broke_keeps_the_laws(recipe: Recipe, changed: dict[str, Any]) -> None:
    assert check(recipe, {**PLAIN, **changed}) in ("merged", "partly")


@pytest.mark.parametrize("attention", ["sdpa", "matmul", "bmm", "baddbmm", "einsum", "capped", "module"])
def test_every_spelling_merges(attention: str) -> None:
    assert check(Recipe(attention=attention), PLAIN) == "merged"


@pytest.mark.parametrize("layout", ["batch", "sequence", "grid"])
@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_every_layout_and_norm_merges(layout: str, norm: str) -> None:
    assert check(Recipe(layout=layout, norm=norm), PLAIN) == "merged"


LAID = [
    Recipe(branch="windows", grid=(2, 3, 4)),
    Recipe(embed="frames", branch="windows", grid=(2, 2, 4)),
    Recipe(tail="blocks", grid=(2, 3, 4)),
    Recipe(tail="blocks", grid=(1, 3, 4), before=1),
    Recipe(embed="folded"),
    Recipe(embed="folded", branch="between"),
    Recipe(embed="rows", layout="packed"),
    Recipe(layout="packed", tail="tokens"),
    Recipe(before=1, after=1, tail="spelled"),
    Recipe(beside="scale", branch="twins"),
    Recipe(beside="view", tail="tokens"),
    Recipe(beside="text", before=1),
    Recipe(qkv="prompted", attention="matmul"),
]
"""How samples, streams and keys are laid beside each other."""


@pytest.mark.parametrize("recipe", LAID, ids=str)
def test_every_way_to_lay_tokens_keeps_the_laws(recipe: Recipe) -> None:
    check(recipe, PLAIN)


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({"mlp": "mixing"}, "partly"),
        ({"tail": "dense"}, "partly"),
        ({"tail": "pooled"}, "merged"),
        ({"after": 1}, "merged"),
    ],
)
def test_what_stands_in_the_way_is_restored(changed: dict[str, Any], verdict: str) -> None:
    assert check(Recipe(**changed), PLAIN) == verdict
