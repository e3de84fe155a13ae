"""Every public operator says what it does to shapes, by an example that runs."""

import doctest
import inspect

import pytest
import torch

from tldr_compile import ops

OPERATORS = [
    name
    for name in ops.__all__
    if inspect.isfunction(operator := getattr(ops, name))
    and [each.annotation for each in inspect.signature(operator).parameters.values()][:1] == ["Tensor"]
]


@pytest.mark.parametrize("name", OPERATORS)
def test_the_examples_of_an_operator_hold(name: str) -> None:
    operator = getattr(ops, name)
    (found,) = doctest.DocTestFinder(recurse=False).find(operator, name, globs={"ops": ops, "torch": torch})
    assert found.examples, "no example"
    said: list[str] = []
    doctest.DocTestRunner().run(found, out=said.append)
    assert not said, "".join(said)


def test_every_operator_is_asked() -> None:
    assert {"attend", "match", "group", "down", "up", "softmax", "saliency"} <= set(OPERATORS)
