"""The initial weights that networks after ConvNeXt share."""

from __future__ import annotations

from torch import nn


def init_weights(module: nn.Module) -> None:
    """Linear maps and convolutions from a truncated normal distribution of deviation 0.02, biases at 0."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
