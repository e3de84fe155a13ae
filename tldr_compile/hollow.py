"""What holds a merged module's parameters, under the names that they have in the model: nobody calls it.

A layer is part of the graph, which reads its parameters. So a hook on it would never run, and is refused; but what
looks for linear layers to change their weights, such as a quantiser, finds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed._composable.contract import STATE_KEY

from tldr_compile.errors import CaptureError


class _Unsharded(dict[Any, Any]):
    """Where `fully_shard` and its like note, first of all, that they hold a module.

    It refuses there: a note that stays behind makes `fully_shard(merged)` pass the layer by, without a word.
    """

    def setdefault(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise CaptureError(
            "a layer of a merged module cannot be sharded or replicated by itself: nobody calls it, so that nothing "
            "would gather its parameters. Shard the merged module as one (fully_shard(merged))"
        )


class Hollow(nn.Module):
    """Parameters, buffers and other hollow modules."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.__dict__[STATE_KEY] = _Unsharded()

    def __iter__(self) -> NoReturn:
        raise CaptureError(
            "a merged module has no layers to go through one by one, only what holds their parameters: do what you do "
            "to each of them to the model before it is merged, or to the merged module as one (fully_shard(merged))"
        )

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise CaptureError("a layer of a merged module only holds parameters; call the merged module itself")

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise CaptureError(
            "a hook on a layer of a merged module would never run: the layer is part of a graph, which only reads the "
            "parameters that are held here. Hook the merged module itself, let the model return what the hook is to "
            "see, or shard or offload the merged module as one (fully_shard(merged))"
        )

    register_forward_hook = _refuse
    register_forward_pre_hook = _refuse
    register_full_backward_hook = _refuse
    register_full_backward_pre_hook = _refuse
    register_backward_hook = _refuse


class HollowLinear(Hollow, nn.Linear):
    """The weight of a linear layer, where whoever looks for `nn.Linear` finds it."""

    def __init__(self, rows: int, columns: int) -> None:
        Hollow.__init__(self)
        self.out_features, self.in_features = rows, columns
        for name in ("weight", "bias"):  # in the order of a linear layer
            self.register_parameter(name, None)


def hold(root: nn.Module, tensors: Mapping[str, Tensor], transient: set[str], linear: set[str]) -> None:
    """Register `tensors` by their names in hollow modules under `root`; no state dict has what is `transient`.

    A module whose `weight` is in `linear` is a `HollowLinear`. Raises `CaptureError` where `root` has such an attribute
    of its own.
    """
    for name, value in tensors.items():
        first, *_ = name.split(".")
        known = any(first in each for each in (root._modules, root._parameters, root._buffers))
        if not known and hasattr(root, first):
            raise CaptureError(
                f"the model's attribute {first!r} has the name of an attribute that every merged module has; rename "
                'it, or compile the model with torch.compile(model, backend="tldr")'
            )
        *path, leaf = name.split(".")
        module = root
        for k, part in enumerate(path):
            if part not in module._modules:
                weight = ".".join((*path[: k + 1], "weight"))
                module.add_module(part, HollowLinear(*tensors[weight].shape) if weight in linear else Hollow())
            module = module.get_submodule(part)
        if isinstance(value, nn.Parameter):
            module.register_parameter(leaf, value)
        else:
            module._parameters.pop(leaf, None)  # a linear layer's bias may be none of its parameters
            module.register_buffer(leaf, value, persistent=name not in transient)


def held(root: nn.Module, name: str) -> Tensor:
    """What is held under a name. Raises `CaptureError` where somebody put a layer in its place."""
    *path, leaf = name.split(".")
    module = root
    for part in path:
        module = module._modules[part]  # type: ignore[assignment]
    value = getattr(module, leaf)
    if not isinstance(value, torch.Tensor):
        raise CaptureError(
            f"{'.'.join(path)} is a {type(module).__name__} now, which a merged module's graph never calls: do that to "
            "the model before it is merged, or use what changes weights in place (torchao.quantization.quantize_)"
        )
    return value
