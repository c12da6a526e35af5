"""EvoNorm on a CPU: process maps in blocks that stay in the cache through the whole layer.

A composition of library calls reads and writes the whole map ten times in each direction. Only statistics need whole
maps, of a channel (B series) or of a group of channels (S series). So each block is read from memory once, however much
is then done to it, and every temporary tensor is as small as a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gatewise.ops.evonorm import statistics as small
from gatewise.ops.evonorm.statistics import BatchSums, Gradients, Instance

# Numbers per thread and block: one MiB of float32. Larger blocks leave the caches, smaller ones spend time on calls.
_BLOCK = 1 << 18

Block = tuple[slice, slice]


def grouped_forward(
    x: Tensor, weight: Tensor, bias: Tensor, v: Tensor | None, groups: int, eps: float, centered: bool, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and center and inverse standard deviation of every group (N, G), for the S series."""
    x = _dense(x)
    y = torch.empty_like(x)
    center, rstd = (weight.new_empty(x.shape[0], groups) for _ in range(2))
    width = x.shape[1] // groups
    for block in _blocks(x, width):
        samples, channels = block
        part = _part(x, block, weight.dtype)
        own = samples, slice(channels.start // width, channels.stop // width)
        center[own], rstd[own] = small.group_statistics(
            *_moments(part), (channels.stop - channels.start) // width, eps, centered
        )
        scale = small.per_channel(rstd[own], part.shape[1]) * weight[channels]
        f = _activated(part, v, channels)[0] if gated else part
        torch.add(f * scale[..., None], bias[channels, None], out=_out(y, block))
    return y, center, rstd


def grouped_backward(
    dy: Tensor, x: Tensor, weight: Tensor, v: Tensor | None, center: Tensor, rstd: Tensor, gated: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of x, weight, bias and v for the S series."""
    x = _dense(x)
    dy = _like(dy, x)
    dx = torch.empty_like(x)
    totals = (torch.zeros_like(weight), torch.zeros_like(weight), torch.zeros_like(weight))
    width = x.shape[1] // rstd.shape[1]
    for block in _blocks(x, width):
        samples, channels = block
        own = samples, slice(channels.start // width, channels.stop // width)
        part, dpart = _part(x, block, weight.dtype), _part(dy, block, weight.dtype)
        f, slope, of_gate = _differentiated(part, v, channels) if gated else (part, None, None)
        t = dpart * f
        activated = t.sum(dim=2)
        gate = torch.zeros_like(activated) if of_gate is None else t.mul_(of_gate).sum(dim=2)
        gradients = small.group_gradients(
            activated, dpart.sum(dim=2), gate, weight[channels], center[own], rstd[own], x[0, 0].numel()
        )
        scale = small.per_channel(rstd[own], part.shape[1]) * weight[channels]
        local = dpart * scale[..., None]
        local = local if slope is None else local.mul_(slope)
        torch.add(local, _line(part, gradients.q, gradients.p), out=_out(dx, block))
        _add(totals, channels, gradients)
    return dx, *totals


def _activated(x: Tensor, v: Tensor | None, channels: slice) -> tuple[Tensor, Tensor]:
    """Return f = x * sigmoid(v x), and the sigmoid."""
    gate = x.sigmoid() if v is None else (x * v[channels, None]).sigmoid_()
    return x * gate, gate


def _differentiated(x: Tensor, v: Tensor | None, channels: slice) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return f, df/dx = gate (1 + v (x - f)), and the factor of f in df/dv, x - f."""
    f, gate = _activated(x, v, channels)
    rest = x - f
    scaled = rest if v is None else rest * v[channels, None]
    return f, gate.addcmul_(gate, scaled), None if v is None else rest


def batch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    v: Tensor | None,
    running_var: Tensor | None,
    member: str,
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, mean and variance of every image and channel, and those of the batch, for the B series.

    With `running_var`, those of the batch are zeros and `running_var`.
    """
    x = _dense(x)
    y = torch.empty_like(x)
    mean, var = (weight.new_empty(x.shape[:2]) for _ in range(2))
    if running_var is not None:
        center, variance = torch.zeros_like(weight), running_var.clone()
    else:
        for block in _blocks(x, 1):
            mean[block], var[block] = _moments(_part(x, block, weight.dtype))
        center, variance = small.batch_statistics(mean, var)
    deviation = (variance + eps).sqrt()
    for block in _blocks(x, 1):
        channels = block[1]
        part = _part(x, block, weight.dtype)
        if running_var is not None:
            mean[block], var[block] = _moments(part)
        line = small.instance_line(member, mean[block], var[block], _of(v, channels), eps, centered)
        m = _excess(part, line, deviation[channels]).clamp_min_(0).add_(deviation[channels, None])
        torch.div(part, m, out=m).mul_(weight[channels, None])
        torch.add(m, bias[channels, None], out=_out(y, block))
    return y, mean, var, center, variance


def batch_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    v: Tensor | None,
    moments: tuple[Tensor, Tensor],
    batch: tuple[Tensor, Tensor],
    member: str,
    eps: float,
    centered: bool,
    trained: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of x, weight, bias and v for the B series.

    Args:
        moments: mean and variance of every image and channel.
        batch: mean and variance of the batch.
        trained: whether the batch's moments depend on x.
    """
    x = _dense(x)
    dy = _like(dy, x)
    dx = torch.empty_like(x)
    totals = (torch.zeros_like(weight), torch.zeros_like(weight), torch.zeros_like(weight))
    (mean, var), (center, variance), positions = moments, batch, x[0, 0].numel()
    deviation = (variance + eps).sqrt()
    left = torch.empty_like(mean)
    for block in _blocks(x, 1):
        channels = block[1]
        part, dpart = _part(x, block, weight.dtype), _part(dy, block, weight.dtype)
        line = small.instance_line(member, mean[block], var[block], _of(v, channels), eps, centered)
        excess = _excess(part, line, deviation[channels])
        reciprocal = excess.clamp_min(0).add_(deviation[channels, None]).reciprocal_()
        over_m = dpart * reciprocal
        sums = _sums(part, dpart, over_m, reciprocal, excess)
        left[block] = sums.left
        gradients = small.instance_gradients(sums, member, weight[channels], mean[block], line, centered, positions)
        # dy w / m at the left, and that times offset / m at the right
        factor = _where_positive(excess, reciprocal.mul_(line.offset[..., None]).sub_(1)).add_(1)
        local = over_m.mul_(factor).mul_(weight[channels, None])
        torch.add(local, _line(part, gradients.q, gradients.p), out=_out(dx, block))
        _add(totals, channels, gradients)
    if trained:
        _add_batch_line(dx, x, *small.batch_line(left, weight, center, deviation, positions))
    return dx, *totals


def _excess(x: Tensor, line: Instance, deviation: Tensor) -> Tensor:
    """Return by how much the line slope x + offset exceeds the batch's standard deviation."""
    return _line(x, line.slope, line.offset - deviation)


def _where_positive(condition: Tensor, values: Tensor) -> Tensor:
    """Return `values` where `condition` is positive, else 0. This is the only vectorized mask."""
    return torch.ops.aten.threshold_backward(values, condition, 0)


def _sums(x: Tensor, dy: Tensor, over_m: Tensor, reciprocal: Tensor, excess: Tensor) -> BatchSums:
    t = over_m * x
    normalized = t.sum(dim=2)
    everywhere = t.mul_(reciprocal).sum(dim=2)
    t = _where_positive(excess, t)
    right = t.sum(dim=2)
    return BatchSums(normalized, dy.sum(dim=2), everywhere - right, right, t.mul_(x).sum(dim=2))


def _add_batch_line(dx: Tensor, x: Tensor, p: Tensor, q: Tensor) -> None:
    """Add p + q x to dx in place."""
    for block in _blocks(x, 1):
        line = _line(_part(x, block, p.dtype), q[None, block[1]], p[None, block[1]])
        target = _out(dx, block)
        torch.add(target, line, out=target)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance over the last axis, in two passes that stay in the cache."""
    mean = x.sum(dim=2) / x.shape[2]
    return mean, (x - mean[..., None]).square_().sum(dim=2) / x.shape[2]


def _line(x: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """Return slope * x + offset, with one of each per sample and channel. (addcmul is slow when it broadcasts.)"""
    return (x * slope[..., None]).add_(offset[..., None])


def _add(totals: tuple[Tensor, ...], channels: slice, gradients: Gradients) -> None:
    for total, gradient in zip(totals, gradients[:3], strict=True):
        total[channels] += gradient


def _of(v: Tensor | None, channels: slice) -> Tensor | None:
    return None if v is None else v[channels]


def _dense(x: Tensor) -> Tensor:
    """Return `x` in one of the two formats whose positions are one axis."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return x if x.is_contiguous() or last else x.contiguous()


def _like(dy: Tensor, x: Tensor) -> Tensor:
    """Return `dy` in the format of `x`."""
    return dy.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)


def _blocks(x: Tensor, unit: int) -> Iterator[Block]:
    """Yield slices of samples and channels, the latter in multiples of `unit`.

    Channels-last maps are only cut between samples, since a few of their channels are scattered in memory.
    """
    samples, channels = x.shape[:2]
    per_channel = max(1, x.shape[2] * x.shape[3])
    size = _BLOCK * torch.get_num_threads()
    step = max(1, size // (channels * per_channel))
    width = channels
    if step == 1 and x.is_contiguous():
        width = min(channels, max(unit, size // per_channel // unit * unit))
    for sample in range(0, samples, step):
        for channel in range(0, channels, width):
            yield slice(sample, min(sample + step, samples)), slice(channel, min(channel + width, channels))


def _part(x: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """Return a block as (samples, channels, positions) in this dtype; a view if it already has it."""
    return x[block].flatten(2).to(dtype)


def _out(y: Tensor, block: Block) -> Tensor:
    """Return the destination of a block's results; library calls round to its dtype as they write."""
    return y[block].flatten(2)
