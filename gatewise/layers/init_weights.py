"""Initial weights that several networks share; each function is for `module.apply`."""

from __future__ import annotations

from torch import nn


def init_weights(module: nn.Module) -> None:
    """Linear maps and convolutions from a truncated normal distribution of deviation 0.02, biases at 0."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_linear(module: nn.Module, std: float = 0.02) -> None:
    """Linear maps alone, as vision transformers start: a truncated normal distribution, biases at 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_kaiming(module: nn.Module) -> None:
    """Convolutions with variance 2 / fan-out, outputs of all groups counted; linear maps with deviation 0.01."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)


def init_by_fan_out(module: nn.Module, linear_std: float = 0.02) -> None:
    """Convolutions with variance 2 / fan-out, outputs counted within a group; linear maps as `init_linear`."""
    init_linear(module, linear_std)
    if isinstance(module, nn.Conv2d):
        fan_out = module.out_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
