"""The small part of EvoNorm: arithmetic on moments per image and channel, forward and backward.

All tensors here have the size (batch, channels) or less, and are at least float32. Backends reduce over positions and
apply the resulting tables; both directions are linear in the maps that they read:

    S:   y = f(x) * scale + bias                    dx = dy * scale * f'(x) + p + q * x
    B:   y = x / max(s, slope * x + offset) * weight + bias, and the same for dx
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Table = Float[Tensor, "batch channels"]
Groups = Float[Tensor, "batch groups"]
Channels = Float[Tensor, " channels"]


class Gradients(NamedTuple):
    """Gradients of the parameters, and the linear terms p + q * x that the statistics add to the input's gradient."""

    weight: Tensor
    bias: Tensor
    v: Tensor
    p: Tensor
    q: Tensor


def group_statistics(mean: Table, var: Table, groups: int, eps: float, centered: bool) -> tuple[Groups, Groups]:
    """Return center and inverse standard deviation of each group, from exactly merged moments of equal parts."""
    mean, var = mean.unflatten(1, (groups, -1)), var.unflatten(1, (groups, -1))
    center = mean.mean(dim=2) if centered else torch.zeros_like(mean[:, :, 0])
    second = var.mean(dim=2) + (mean - center[..., None]).square().mean(dim=2)
    return center, (second + eps).rsqrt()


def per_channel(table: Groups, channels: int) -> Table:
    """Repeat each group's value for each of its channels."""
    return table.repeat_interleave(channels // table.shape[1], dim=1)


def group_gradients(
    activated: Table, plain: Table, gate: Table, weight: Channels, center: Groups, rstd: Groups, positions: int
) -> Gradients:
    """Return gradients of the S series.

    Args:
        activated: sum over positions of dy * f(x).
        plain: sum of dy.
        gate: sum of dy * df/dv.
        positions: height times width.
    """
    channels, groups = weight.shape[0], rstd.shape[1]
    scale = per_channel(rstd, channels)
    drstd = (activated * weight).unflatten(1, (groups, -1)).sum(dim=2)
    q = -drstd * rstd**3 / (positions * (channels // groups))
    return Gradients(
        (activated * scale).sum(dim=0),
        plain.sum(dim=0),
        (gate * scale * weight).sum(dim=0),
        per_channel(-q * center, channels),
        per_channel(q, channels),
    )


class Instance(NamedTuple):
    """Each image and channel's standard deviation (or root mean square), and its line slope * x + offset."""

    deviation: Table
    slope: Table
    offset: Table


def instance_line(member: str, mean: Table, var: Table, v: Channels | None, eps: float, centered: bool) -> Instance:
    """Return what the batch's standard deviation is compared with: v x + s in B0, (x + 1) s in B1, s - x in B2."""
    deviation = ((var if centered else var + mean.square()) + eps).sqrt()
    if v is not None:
        return Instance(deviation, v.expand_as(deviation), deviation)
    return Instance(deviation, deviation if member == "B1" else -torch.ones_like(deviation), deviation)


def batch_statistics(mean: Table, var: Table) -> tuple[Channels, Channels]:
    """Return mean and biased variance over the batch, from moments of equally many positions."""
    center = mean.mean(dim=0)
    return center, var.mean(dim=0) + (mean - center).square().mean(dim=0)


class BatchSums(NamedTuple):
    """Sums over positions, with m the larger of the two: "left" where the batch's deviation is larger, else "right"."""

    normalized: Tensor
    """dy x / m"""
    plain: Tensor
    """dy"""
    left: Tensor
    """dy x / m^2 at the left"""
    right: Tensor
    """dy x / m^2 at the right"""
    right_squared: Tensor
    """dy x^2 / m^2 at the right"""


def instance_gradients(
    sums: BatchSums, member: str, weight: Channels, mean: Table, instance: Instance, centered: bool, positions: int
) -> Gradients:
    """Return gradients of the B series, except for the batch's own term."""
    doffset, dslope = -weight * sums.right, -weight * sums.right_squared
    q = (doffset + dslope if member == "B1" else doffset) / (instance.deviation * positions)
    p = -q * mean if centered else torch.zeros_like(q)
    return Gradients(sums.normalized.sum(dim=0), sums.plain.sum(dim=0), dslope.sum(dim=0), p, q)


def batch_line(
    left: Table, weight: Channels, center: Channels, deviation: Channels, positions: int
) -> tuple[Channels, Channels]:
    """Return (p, q) of the term that the batch's standard deviation adds in training."""
    q = -(left * weight).sum(dim=0) / (deviation * (left.shape[0] * positions))
    return -q * center, q
