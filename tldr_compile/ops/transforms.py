"""Registered operators under `torch.func`: grad, vjp, jacrev and vmap, one in another.

The gradients that `torch.library` registers refuse every transform. A call under one is therefore an
`autograd.Function`, which torch takes through all of them, down to the operator on plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import Library

TRANSFORMED = "FuncTorchDynamicLayerFrontMode"
"""The dispatch key of a call while some transform is under way."""

_library = Library("tldr", "FRAGMENT")

Folded = tuple[Any, Any]
"""Results, and in each of them the vmapped dimension."""


def differentiable(
    name: str,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
    vmap: Callable[..., Folded] | None = None,
) -> None:
    """Register gradients of the operator `tldr::name`, as `torch.library.register_autograd` takes them, for transforms
    too; `vmap` in place of `folded`, as `torch.library.register_vmap` takes it."""
    operator = getattr(torch.ops.tldr, name)
    torch.library.register_autograd(f"tldr::{name}", backward, setup_context=setup_context)
    members = {
        "forward": operator,
        "setup_context": setup_context,
        "backward": backward,
        "vmap": folded(operator) if vmap is None else vmap,
        "jvp": refuse_forward_mode,
    }
    function: Any = type(name, (torch.autograd.Function,), {key: staticmethod(each) for key, each in members.items()})
    _library.impl(name, function.apply, TRANSFORMED)


def refuse_forward_mode(*args: Any) -> NoReturn:
    """Raise NotImplementedError."""
    raise NotImplementedError(
        "attention with saliency or masses has no forward-mode derivative (torch.func.jvp), which jacfwd and hessian "
        "take: use the backward one (torch.func.vjp, jacrev, jacrev of jacrev)"
    )


def differentiates(*tensors: Tensor | None) -> bool:
    """Whether gradients of a function of these are wanted."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def slopes(function: Callable[..., Any], arguments: Sequence[Any], cotangents: Any) -> tuple[Tensor | None, ...]:
    """The gradient in each argument of a function of differentiable operators; None for what is no float tensor."""
    places = [at for at, each in enumerate(arguments) if isinstance(each, Tensor) and each.is_floating_point()]

    def of_floats(*floats: Tensor) -> Any:
        replaced = dict(zip(places, floats, strict=True))
        return function(*(replaced.get(at, each) for at, each in enumerate(arguments)))

    transposed: Any = torch.func.vjp(of_floats, *(arguments[at] for at in places))[1]
    found = dict(zip(places, transposed(cotangents), strict=True))
    return tuple(found.get(at) for at in range(len(arguments)))


def folded(operator: Callable[..., Any]) -> Callable[..., Folded]:
    """The vmap rule of an operator whose tensors, given and returned, begin with one batch: a larger batch."""

    def rule(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> Folded:
        given = [lifted(each, dim, info.batch_size) for each, dim in zip(arguments, in_dims, strict=True)]
        batch = given[0].shape[1]
        results = operator(*(_joined(each, batch) for each in given))
        if isinstance(results, Tensor):
            return _apart(results, info.batch_size), 0
        return tuple(_apart(each, info.batch_size) for each in results), (0,) * len(results)

    return rule


def lifted(argument: Any, dim: int | None, count: int) -> Any:
    """A tensor as `count` of it, `[count, B, ...]`: those along its vmapped dimension, or all the same."""
    if not isinstance(argument, Tensor):
        return argument
    return argument.expand(count, *argument.shape) if dim is None else argument.movedim(dim, 0)


def _joined(argument: Any, batch: int) -> Any:
    """A bias may have a batch of 1 for all."""
    if not isinstance(argument, Tensor):
        return argument
    return argument.expand(-1, batch, *argument.shape[2:]).flatten(0, 1)


def _apart(result: Tensor, count: int) -> Tensor:
    return result.unflatten(0, (count, result.shape[0] // count))
