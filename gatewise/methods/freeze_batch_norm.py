"""Frozen batch-norm statistics (a transform).

Fine-tuning with small batches spoils the running mean and variance that pre-training measured on a million images.
Frozen layers normalize with these in training too. Training and inference then compute the same function, and an
image's output does not depend on the batch's other images.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Self

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gatewise.methods._base import register_transform


@register_transform
def freeze_batch_norm(model: nn.Module, *, train_affine: bool = True) -> nn.Module:
    """Make every batch-norm layer of `model` keep its running mean and variance in any mode.

    The layers are otherwise unchanged: same parameters, same keys, same place in the network. Apply this before the
    network is wrapped for several devices, and not together with synchronized batch norm, which would replace the
    layers again.

    Args:
        model: the network, changed in place.
        train_affine: keep training scale and shift; otherwise they are frozen as well.
    Returns:
        `model`.
    Raises:
        ValueError: if `model` has no batch-norm layer with running statistics.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no batch-norm layer with running statistics to freeze")
    for layer in layers:
        kind: Any = type(layer)
        layer.__class__ = _frozen(kind)
        layer.eval()
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(train_affine)
    return model


class _FrozenStatistics(nn.Module):
    """A mix-in for batch norms that never enter training mode."""

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


@cache
def _frozen(layer_type: type[nn.Module]) -> type[nn.Module]:
    """Return the frozen variant of the class `layer_type`, the same class every time."""
    if issubclass(layer_type, _FrozenStatistics):
        return layer_type
    return type(f"Frozen{layer_type.__name__}", (_FrozenStatistics, layer_type), {})
