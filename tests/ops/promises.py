"""What the fake kernel of an operator promises: shapes, dtypes and strides; and arguments of every kind."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tldr_compile import ops
from tldr_compile.ops import reference

Skeleton = list[tuple[torch.Size, torch.dtype, tuple[int, ...]]]


def attention(
    dtype: torch.dtype, biased: bool = True, sizes: tuple[int, int, int, int] = (2, 3, 7, 9)
) -> tuple[Any, ...]:
    b, h, n, m = sizes
    q, k, v = (torch.randn(b, length, h, d, dtype=dtype).transpose(1, 2) for length, d in ((n, 4), (m, 4), (m, 5)))
    return q, k, v, 0.5, torch.rand(n, m)[None, None] < 0.8 if biased else None, torch.rand(b, 1, 1, m)


ARGUMENTS: dict[str, dict[str, Callable[[torch.dtype], tuple[Any, ...]]]] = {
    "attend": {
        "masked": attention,
        "alone": lambda dtype: attention(dtype, biased=False),
        "one of each": lambda dtype: attention(dtype, sizes=(1, 1, 1, 1)),
    },
    "match": {
        "an odd number": lambda dtype: (torch.randn(2, 9, 6, dtype=dtype),),
        "channels first": lambda dtype: (torch.randn(3, 5, 8, dtype=dtype).mT,),
        "two": lambda dtype: (torch.randn(1, 2, 1, dtype=dtype),),
    },
}
ARGUMENTS["affinity"] = ARGUMENTS["match"]
ARGUMENTS["energy"] = {"an odd number": lambda dtype: (torch.randn(2, 9, 6, dtype=dtype), 0.3)}
ARGUMENTS["attend_and_sharpness"] = {
    **ARGUMENTS["attend"],
    "no masses": lambda dtype: (*attention(dtype)[:5], None),
    "no values": lambda dtype: (*attention(dtype)[:2], attention(dtype)[2][..., :0], 0.5, None, None),
}
ARGUMENTS["received"] = {
    case: lambda dtype, biased=biased: (*(given := attention(dtype, biased))[:2], *given[3:5])
    for case, biased in (("masked", True), ("alone", False))
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
CASES = [(name, case) for name, cases in ARGUMENTS.items() for case in cases]


def specified(name: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The results of the reference."""
    if name == "match":
        return reference.match(*arguments)
    if name == "received":
        q, k, scale, mask = arguments
        return (reference.received(q, k, scale=scale, mask=mask),)
    if name in ("energy", "affinity"):
        return (getattr(reference, name)(*arguments),)
    q, k, v, scale, mask, log_mass = arguments
    both = reference.attention_with_sharpness(q, k, v, scale=scale, mask=mask, log_mass=log_mass)
    return both if name == "attend_and_sharpness" else both[:1]


def skeleton(results: Tensor | tuple[Tensor, ...]) -> Skeleton:
    several = (results,) if isinstance(results, Tensor) else results
    return [(each.shape, each.dtype, each.stride()) for each in several]


def faked(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Skeleton:
    with FakeTensorMode() as mode:
        return skeleton(function(*(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in arguments)))


def promise(name: str, case: str, dtype: torch.dtype) -> Skeleton:
    """What the operator's fake kernel gives; the test fails unless shapes and dtypes are those of the reference."""
    arguments = ARGUMENTS[name][case](dtype)
    promised = faked(ops.PROVIDERS[name].operator, arguments)
    expected = [(each.shape, each.dtype) for each in specified(name, arguments)]
    assert [(shape, dtype) for shape, dtype, _ in promised] == expected
    return promised


def gives(name: str, provider: ops.Provider[..., Any], arguments: tuple[Any, ...]) -> list[Skeleton]:
    """What this provider gives, by the way that graphs take to it and within the registered operator."""
    with ordered(name, provider) as providers:
        return [skeleton(providers(*arguments)), skeleton(providers.run(*arguments))]


@contextmanager
def ordered(name: str, *order: ops.Provider[..., Any]) -> Iterator[Any]:
    """The operator with these providers alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops.PROVIDERS[name], "order", list(order))
        yield ops.PROVIDERS[name]
