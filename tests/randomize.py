"""Random weights with which every part of a model matters."""

from __future__ import annotations

from math import prod

import torch
from torch import nn


def randomize(model: nn.Module, seed: int, gain: float = 1.5) -> None:
    """Give every parameter values that matter.

    A model as its class initialises it attends almost evenly (weights of 0.02, biases and tables of 0), so that
    saliency would be decided by rounding and a lost bias or position would go unnoticed.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if name == "weight" and parameter.ndim == 1:  # the scale of a norm
                value = 1 + 0.2 * noise
            elif name == "weight" and not isinstance(module, nn.Embedding):
                value = noise * gain / prod(parameter.shape[1:]) ** 0.5
            else:
                value = 0.3 * noise
            with torch.no_grad():
                parameter.copy_(value)
