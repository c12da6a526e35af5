"""Weight-only quantization simulated in PyTorch: the network that a weight-only file computes, as a module.

Krishnamoorthi 2018, arXiv:1806.08342, section 3.1.1.
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
    """A folded copy whose convolutions and linear maps have weights of `bits` only, held as float numbers.

    Args:
        skip: paths of modules whose weights stay as they are.
    Raises:
        ValueError: for a network in training mode, bits outside of 2..8, unknown paths, or weights that are not finite
            (the layer is named).
    """
    folded = fold(model)
    layers = {name: module for name, module in folded.named_modules() if isinstance(module, WEIGHTED)}
    for name in skip:
        if name not in layers:
            raise unknown_name("layer", name, layers)
    # Quantizing twice would change nothing, but a weight that two layers share may be skipped in one of them.
    with torch.no_grad():
        for name, module in layers.items():
            if name in skip:
                continue
            grid = weight_grid(module.weight, bits, symmetric=symmetric, per_channel=per_channel, name=f"{name}.weight")
            module.weight = nn.Parameter(fake_quantize(module.weight, grid), requires_grad=False)
    return folded
