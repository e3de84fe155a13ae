"""The laws on random transformers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.generated.check import check
from tests.generated.model import Recipe
from tests.generated.strategy import options, recipes

PLAIN: dict[str, Any] = {
    "schedule": [2, 1],
    "saliency": "attention",
    "metric": "tokens",
    "reduction": "merge",
    "outputs": "restore",
    "pooling": "mass",
    "proportional": True,
}


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(recipes, options())
def test_every_generated_model_keeps_the_laws(recipe: Recipe, chosen: dict[str, Any]) -> None:
    check(recipe, chosen)


@pytest.mark.parametrize("attention", ["sdpa", "matmul", "bmm", "baddbmm", "einsum", "capped", "module"])
def test_every_spelling_merges(attention: str) -> None:
    assert check(Recipe(attention=attention), PLAIN) == "merged"


@pytest.mark.parametrize("layout", ["batch", "sequence", "grid"])
@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_every_layout_and_norm_merges(layout: str, norm: str) -> None:
    assert check(Recipe(layout=layout, norm=norm), PLAIN) == "merged"


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
