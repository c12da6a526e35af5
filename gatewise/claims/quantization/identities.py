"""Exact properties of integer kernels, of batch norm on rounded weights, and of grids.

Sources: Krishnamoorthi 2018, arXiv:1806.08342, sections 2 and 3.2; integer arithmetic: Jacob et al. 2017,
arXiv:1712.05877, section 2.2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewise.claims.lab.checks import generator, randomise, relative_difference
from gatewise.claims.lab.training import build
from gatewise.claims.quantization.network import SeparableNetwork
from gatewise.efficiency.quantization.integer import integer_conv2d, quantize_bias
from gatewise.efficiency.quantization.quantize import QuantizationReport, quantize
from gatewise.layers.quantization_aware import folded_weight, norm_with_batch_statistics
from gatewise.methods.quantization_aware import prepare_qat
from gatewise.ops.quantize import Grid, affine_grid, dequantize, fake_quantize, weight_grid
from gatewise.ops.quantize import quantize as to_codes

LAYERS: dict[str, Callable[[], nn.Conv2d]] = {
    "3x3": partial(nn.Conv2d, 8, 16, 3, padding=1),
    "depthwise 3x3": partial(nn.Conv2d, 8, 8, 3, padding=1, groups=8),
}


def grids_of(report: QuantizationReport) -> tuple[Grid, Grid]:
    """The grids of a single layer's input and output."""
    ends = (report.ranges[0], report.ranges[-1])
    first, last = (
        Grid(torch.tensor(end.scale), torch.tensor(end.zero_point, dtype=torch.int32), 0, 255) for end in ends
    )
    return first, last


@torch.no_grad()
def code_differences(conv: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    """How many codes the kernel's output of a convolution with ReLU is off at most: simulation, integer arithmetic."""
    network = quantize(nn.Sequential(conv, nn.ReLU()).eval(), x)
    bits = 7 if network.report.reduced_range else 8
    given, result, own = *grids_of(network.report), weight_grid(conv.weight, bits)
    kernel = to_codes(network(x), result)
    sums = conv._conv_forward(fake_quantize(x, given), fake_quantize(conv.weight, own), conv.bias)
    simulated = to_codes(sums.relu(), result)
    bias = torch.zeros(len(conv.weight)) if conv.bias is None else conv.bias
    _, arithmetic = integer_conv2d(
        to_codes(x, given),
        given,
        to_codes(conv.weight, own),
        own,
        quantize_bias(bias, given, own),
        result,
        padding=cast(tuple[int, int], conv.padding),
        groups=conv.groups,
    )
    return int((kernel - simulated).abs().max()), int((kernel - arithmetic).abs().max())


def correction_error(seed: int) -> float:
    """Largest relative difference of the corrected path from batch norm in training mode, without rounding."""
    draw = generator(seed)
    conv = build(seed, lambda: nn.Conv2d(8, 16, 3, padding=1, bias=False))
    norm = randomise(nn.BatchNorm2d(16), seed).train()
    x = torch.randn(8, 8, 9, 9, generator=draw)
    weight = conv.weight.detach()
    # In this order: batch norm in training mode moves the statistics that the correction is made of.
    ours, _ = norm_with_batch_statistics(
        lambda own: F.conv2d(x, own, padding=1), weight, None, norm, folded_weight(weight, norm)
    )
    return relative_difference(ours, norm(F.conv2d(x, weight, padding=1)))


@torch.no_grad()
def training_against_inference(frozen: bool, seed: int) -> float:
    """Largest difference of a prepared network's outputs in training and in eval mode, for the same images."""
    network = randomise(build(seed, lambda: SeparableNetwork((4, 8, 8), (1, 2))), seed)
    prepare_qat(network, activation_delay=0, freeze_after=1 if frozen else None, input_shape=(1, 12, 12))
    images = torch.randn(2, 8, 1, 12, 12, generator=generator(seed))
    network.train()(images[0])
    training = network(images[1])
    return (training - network.eval()(images[1])).abs().max().item()


def zeros_missed(seed: int, ranges: int = 1000) -> int:
    """Of random affine grids, how many lack an exact 0."""
    low, high = 5 * torch.randn(2, ranges, generator=generator(seed)).sort(dim=0).values
    grid = affine_grid(low, high, axis=0)
    return int(dequantize(to_codes(torch.zeros(ranges), grid), grid).count_nonzero())
