"""Exact folding of batch norms into the linear layer before or after them, for inference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Affine = nn.Conv2d | nn.Linear

ALL = slice(None)


@torch.no_grad()
def scale_and_shift(norm: nn.BatchNorm2d | nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Return (t, u) with norm(x) = t x + u in eval mode, computed at least in float32.

    Raises:
        ValueError: if the norm keeps no running statistics.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a batch norm without running statistics cannot be folded")
    wide = torch.promote_types(norm.running_var.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


@torch.no_grad()
def fold_into_previous(layer: Affine, norm: nn.BatchNorm2d | nn.BatchNorm1d, channels: slice = ALL) -> None:
    """Change `layer` in place so that it computes norm(layer(x)).

    Args:
        channels: the norm's channels that the layer outputs.
    """
    scale, shift = (values[channels] for values in scale_and_shift(norm))
    bias = torch.zeros_like(shift) if layer.bias is None else layer.bias
    layer.weight = _parameter(layer.weight * _outputs(scale, layer.weight), layer.weight)
    layer.bias = _parameter(bias * scale + shift, layer.weight)


@torch.no_grad()
def fold_into_next(norm: nn.BatchNorm2d | nn.BatchNorm1d, layer: Affine, channels: slice = ALL) -> None:
    """Change `layer` in place so that it computes layer(norm(x)).

    Args:
        channels: the layer's input channels that the norm acts on; the others pass unchanged.
    Raises:
        ValueError: if the layer is a grouped convolution or has zero padding, as the shift is then not constant at the
            border.
    """
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or any(p != 0 for p in layer.padding)):
        raise ValueError("a norm folds into the convolution after it only without groups and without padding")
    scale, shift = scale_and_shift(norm)
    part = torch.zeros_like(scale, dtype=torch.bool)
    part[channels] = True
    scale, shift = torch.where(part, scale, 1.0), torch.where(part, shift, 0.0)
    per_input = layer.weight.flatten(2).sum(dim=2) if layer.weight.ndim > 2 else layer.weight
    added = per_input @ shift.to(per_input.dtype)
    layer.bias = _parameter(added if layer.bias is None else layer.bias + added, layer.weight)
    layer.weight = _parameter(layer.weight * scale.reshape(1, -1, *[1] * (layer.weight.ndim - 2)), layer.weight)


@torch.no_grad()
def scale_outputs(layer: Affine | nn.LayerNorm, scale: Tensor) -> None:
    """Change `layer` in place so that it computes scale * layer(x); `scale` has one entry per output channel."""
    layer.weight = _parameter(layer.weight * _outputs(scale, layer.weight), layer.weight)
    if layer.bias is not None:
        layer.bias = _parameter(layer.bias * scale, layer.weight)


def _outputs(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (weight.ndim - 1))


def _parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(like.dtype), requires_grad=like.requires_grad)
