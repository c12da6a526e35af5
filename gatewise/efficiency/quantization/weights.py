"""Weight-only quantization simulated in PyTorch: a module that computes what a weight-only file does.

Source: Krishnamoorthi 2018, arXiv:1806.08342, section 3.1.1.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from gatewise.efficiency.acceleration.fold import fold
from gatewise.errors import unknown_name
from gatewise.ops.quantize import fake_quantize, weight_grid

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def quantize_weights(
    model: nn.Module, bits: int = 8, *, per_channel: bool = True, symmetric: bool = True, skip: Collection[str] = ()
) -> nn.Module:
    """Return a folded copy whose convolutions and linear layers have `bits`-bit weights, stored as floats.

    Args:
        skip: paths of modules whose weights stay unchanged.
    Raises:
        ValueError: if the network is in training mode, bits are outside of 2..8, paths are unknown, or weights are not
            finite (names the layer).
    """
    folded = fold(model)
    layers = {name: module for name, module in folded.named_modules() if isinstance(module, WEIGHTED)}
    for name in skip:
        if name not in layers:
            raise unknown_name("layer", name, layers)
    # Quantizing twice would change nothing, but one of two layers that share a weight may be skipped.
    with torch.no_grad():
        for name, module in layers.items():
            if name in skip:
                continue
            grid = weight_grid(module.weight, bits, symmetric=symmetric, per_channel=per_channel, name=f"{name}.weight")
            module.weight = nn.Parameter(fake_quantize(module.weight, grid), requires_grad=False)
    return folded
