"""Weight initialization shared by several networks, as functions for `module.apply`."""

from __future__ import annotations

from torch import nn


def init_weights(module: nn.Module) -> None:
    """Initialize linear layers and convolutions: truncated normal, standard deviation 0.02, biases at 0."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_linear(module: nn.Module, std: float = 0.02) -> None:
    """Initialize only linear layers, as in vision transformers: truncated normal, biases at 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_kaiming(module: nn.Module) -> None:
    """Initialize convolutions with variance 2 / fan-out over all groups, linear layers with standard deviation 0.01."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


def init_by_fan_out(module: nn.Module, linear_std: float = 0.02) -> None:
    """Initialize convolutions with variance 2 / fan-out within a group, and linear layers as in `init_linear`."""
    init_linear(module, linear_std)
    if isinstance(module, nn.Conv2d):
        fan_out = module.out_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
