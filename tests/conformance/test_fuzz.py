"""The fuzzer finds what is wrong, says it in the smallest way, and counts what it was asked for."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from tests.conformance import fuzz
from tests.generated import check as laws
from tests.generated.recipe import Recipe
from tldr_compile.errors import VerificationError

PLAIN: dict[str, Any] = {"schedule": [2]}


def test_chunks_cover_all_models_once() -> None:
    numbers = [number for chunk in fuzz.chunks(5, 47) for number in chunk.numbers]
    assert numbers == list(range(5, 52))


def test_what_holds_is_told_by_verdict() -> None:
    assert [told for _, told in fuzz.findings(Recipe(), [PLAIN, {"schedule": [1], "reduction": "drop"}])] == [
        "merged"
    ] * 2
    (_, refused), *_ = fuzz.findings(Recipe(bias="causal"), [PLAIN])
    assert refused.startswith("refused: no attention site of this graph can merge tokens")


def test_a_broken_law_is_made_as_small_as_it_can_be() -> None:
    """A law that fails where tokens are protected: the recipe that is left has nothing else."""
    honest = laws.check_options

    def broken(traced: laws.Traced, options: dict[str, Any]) -> str:
        if traced.recipe.before:
            raise VerificationError("made up")
        return honest(traced, options)

    with mock.patch.object(fuzz, "check_options", broken):
        assert not fuzz.fails(Recipe(mlp="gated"), PLAIN)
        assert str(fuzz.minimal(Recipe(before=3, mlp="gated", tail="mean", norm="post"), PLAIN)) == "Recipe(before=3)"


@pytest.mark.parametrize("count", [8, 9])
def test_a_record_counts_checks(count: int) -> None:
    record = fuzz.examine(fuzz.Chunk(range(3, 4)), lambda stage: None)
    assert sum(record["verdicts"].values()) == fuzz.OPTIONS
    assert not record["failures"]
    assert len(fuzz.chunks(0, -(-count // fuzz.OPTIONS))) == 1
