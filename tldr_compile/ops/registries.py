"""Registries of functions that an option names, open from outside."""

from __future__ import annotations

from typing import TypeVar

import torch

T = TypeVar("T")


def put(registry: dict[str, T], name: str, value: T) -> None:
    """Register `value` as `name`. Where another had the name, what was compiled with that is compiled anew.

    Dynamo takes two backends for one whose options are equal, and a name stays equal to itself.
    """
    if name in registry:
        torch.compiler.reset()
    registry[name] = value
