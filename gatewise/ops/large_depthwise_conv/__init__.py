"""Depthwise convolution with a large kernel, at stride 1 and with as many output as input positions.

    y[b, c, i, j] = bias[c] + sum_{p, q} weight[c, 0, p, q] x[b, c, i + d (p - P), j + d (q - P)],   P = (K - 1) / 2

with zeros outside of the map and d the dilation. Each channel has its own odd K x K kernel.

Libraries are tuned for small kernels, and beyond 7x7 may take ten times longer than necessary. On a CPU, the map is
therefore converted to the format that suits its kernel size best. The gradient of the input is the convolution with the
flipped kernel, and that of the weight is one correlation in the frequency domain, whose cost hardly depends on K. On
CUDA, channels-last maps use custom kernels.

Source: the operator of Ding et al. 2022, arXiv:2203.06717 (RepLKNet), and 2024, arXiv:2410.08049 (UniRepLKNet).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.library import custom_op, register_autograd
from torch.utils.flop_counter import register_flop_formula

from gatewise.ops._backend import suits_triton
from gatewise.ops.precision import autocast_convolution, without_autocast

Maps = Float[Tensor, "batch channels height width"]
Weights = Float[Tensor, "channels 1 kernel kernel"]
Bias = Float[Tensor, " channels"]

# Measured on x86 with oneDNN. Contiguous maps have fast code up to 13x13, if they are at least as wide as their padding
# on one side. Beyond that, a loop is used that is ten to a hundred times slower. Channels-last maps are fast at any
# size, but at 13x13 only half as fast as contiguous ones.
_BEST_PLAIN = 13

# From this kernel size on, a CPU computes the weight's gradient in the frequency domain.
_SPECTRAL = 5

# Largest number of positions of a small map.
_SMALL_MAP = 100


def large_depthwise_conv(x: Maps, weight: Weights, bias: Bias | None = None, *, dilation: int = 1) -> Maps:
    """Convolve, differentiable any number of times. The memory format of the result may differ from that of x.

    Raises:
        ValueError: if shapes do not fit together, the kernel is even, or the dilation is below 1.
    """
    _check(x, weight, bias, dilation)
    x, weight, bias = autocast_convolution(x, weight, bias)
    if _own_operator(x, weight, dilation):
        y: Tensor = torch.ops.gatewise.large_depthwise_conv(x, weight, bias, dilation)
        return y
    return _convolve(arrange(x, weight.shape[-1]), weight, bias, dilation)


def large_depthwise_conv_reference(x: Maps, weight: Weights, bias: Bias | None = None, *, dilation: int = 1) -> Maps:
    """Compute the definition, tap by tap, in the given dtype."""
    height, width = x.shape[2:]
    size = weight.shape[-1]
    margin = dilation * (size // 2)
    padded = F.pad(x, (margin, margin, margin, margin))
    y = torch.zeros_like(x) if bias is None else torch.zeros_like(x) + bias[:, None, None]
    for p in range(size):
        for q in range(size):
            shifted = padded[:, :, dilation * p : dilation * p + height, dilation * q : dilation * q + width]
            y = y + weight[:, 0, p, q, None, None] * shifted
    return y


def arrange(x: Maps, kernel_size: int) -> Maps:
    """Return `x` in the best memory format for this kernel size on a CPU; unchanged elsewhere and for compilers."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return x
    return x.contiguous(memory_format=_memory_format(x, kernel_size))


def _memory_format(x: Tensor, kernel_size: int) -> torch.memory_format:
    if x.device.type != "cpu" or kernel_size > _BEST_PLAIN or x.shape[3] < kernel_size // 2:
        return torch.channels_last
    if kernel_size == _BEST_PLAIN:
        return torch.contiguous_format
    return torch.channels_last if _is_channels_last(x) else torch.contiguous_format


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _own_operator(x: Tensor, weight: Tensor, dilation: int) -> bool:
    """Return whether a custom operator gains over the library's convolution.

    Exported programs contain the library's, and `torch.func` only transforms that.
    """
    if torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active():
        return False
    if x.device.type == "cuda":
        return _uses_kernels(x, weight)
    differentiates = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return x.device.type == "cpu" and differentiates and _gradients_gain(x, weight.shape[-1], dilation)


def _gradients_gain(x: Tensor, kernel_size: int, dilation: int) -> bool:
    """Return whether forward and backward together are faster than the library's, as measured on x86 with oneDNN.

    7x7 and larger: 1.05 to 5 times faster, contiguous or channels-last. 5x5: 1.4 to 2.1 times faster for contiguous
    maps, except the smallest; the library is faster with channels-last ones. Dilated: up to 5 times. 3x3: never.
    """
    if dilation > 1 or kernel_size >= 7:
        return True
    return kernel_size == 5 and not _is_channels_last(x) and x.shape[2] * x.shape[3] > _SMALL_MAP


def _uses_kernels(x: Tensor, weight: Tensor) -> bool:
    """Return whether the kernels apply: they are for channels-last maps and kernels beyond 5x5."""
    return suits_triton(x) and weight.shape[-1] > 5 and _is_channels_last(x)


def _kernels() -> Any:
    from gatewise.ops.large_depthwise_conv import triton as kernels

    return kernels


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=x.shape[1])


@custom_op(
    "gatewise::large_depthwise_conv",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, int dilation) -> Tensor",
)
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    memory_format = _memory_format(x, weight.shape[-1])
    x = x.contiguous(memory_format=memory_format)
    if _uses_kernels(x, weight):
        y: Tensor = _kernels().forward(x, weight, bias, dilation)
        return y
    with without_autocast(x):
        return _convolve(x, weight, bias, dilation).contiguous(memory_format=memory_format)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    return torch.empty_like(x, memory_format=_memory_format(x, weight.shape[-1]))


@custom_op(
    "gatewise::large_depthwise_conv_weight_gradient",
    mutates_args=(),
    schema="(Tensor x, Tensor dy, int kernel_size, int dilation) -> Tensor",
)
def _weight_gradient(x: Tensor, dy: Tensor, kernel_size: int, dilation: int) -> Tensor:
    weight = x.new_empty(x.shape[1], 1, kernel_size, kernel_size)
    if _uses_kernels(x, weight):
        gradient: Tensor = _kernels().weight_gradient(x, dy, kernel_size, dilation)
        return gradient
    if x.device.type == "cpu" and kernel_size >= _SPECTRAL:
        return _spectral_weight_gradient(x, dy, kernel_size, dilation)
    return _library_weight_gradient(x, dy, weight, dilation)


@_weight_gradient.register_fake
def _(x: Tensor, dy: Tensor, kernel_size: int, dilation: int) -> Tensor:
    return x.new_empty(x.shape[1], 1, kernel_size, kernel_size)


def _spectral_weight_gradient(x: Tensor, dy: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """Correlate maps and gradients, summed over the batch as a spectrum. Half precision is computed in float32.

    A correlation at shift s is at index s of a circular one. Nothing wraps around if the circle is longer than the map
    by the largest shift.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    reach = dilation * (kernel_size // 2)
    circle = [_smooth_length(size + reach) for size in x.shape[2:]]
    spectrum = torch.fft.rfft2(x.to(wide).contiguous(), s=circle)
    # conj() would leave conjugation to the dispatcher, which is disabled for operators in compiled programs.
    spectrum *= torch.fft.rfft2(dy.to(wide).contiguous(), s=circle).conj_physical_()
    correlation = torch.fft.irfft2(spectrum.sum(dim=0), s=circle)
    shifts = torch.arange(-reach, reach + 1, dilation)
    rows, columns = (shifts % length for length in circle)
    return correlation[:, rows][:, :, columns][:, None].to(x.dtype).contiguous()


@cache
def _smooth_length(length: int) -> int:
    """Return the next length without prime factors above 5, since others make a Fourier transform several times
    slower."""
    while _without_small_factors(length) != 1:
        length += 1
    return length


def _without_small_factors(length: int) -> int:
    for prime in (2, 3, 5):
        while length % prime == 0:
            length //= prime
    return length


def _library_weight_gradient(x: Tensor, dy: Tensor, weight: Tensor, dilation: int) -> Tensor:
    x, dy = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, dy))
    padding = dilation * (weight.shape[-1] // 2)
    geometry = ([1, 1], [padding, padding], [dilation, dilation], False, [0, 0], x.shape[1])
    wanted = [False, True, False]
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry, wanted)[1].contiguous()


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int], output: Tensor) -> None:
    x, weight, _, ctx.dilation = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    ops = torch.ops.gatewise
    wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
    dx = ops.large_depthwise_conv(dy, weight.flip(2, 3), None, ctx.dilation) if wants_x else None
    dweight = ops.large_depthwise_conv_weight_gradient(x, dy, weight.shape[-1], ctx.dilation) if wants_weight else None
    return dx, dweight, dy.sum(dim=(0, 2, 3)) if wants_bias else None, None


def _keep_pair(ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: Tensor) -> None:
    x, dy, _, ctx.dilation = inputs
    ctx.save_for_backward(x, dy)


def _differentiate_pair(ctx: Any, dweight: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate the weight's gradient, which is linear in both arguments; each derivative is a convolution."""
    x, dy = ctx.saved_tensors
    convolve = torch.ops.gatewise.large_depthwise_conv
    dx = convolve(dy, dweight.flip(2, 3), None, ctx.dilation) if ctx.needs_input_grad[0] else None
    return dx, convolve(x, dweight, None, ctx.dilation) if ctx.needs_input_grad[1] else None, None, None


register_autograd("gatewise::large_depthwise_conv", _differentiate, setup_context=_keep)
register_autograd("gatewise::large_depthwise_conv_weight_gradient", _differentiate_pair, setup_context=_keep_pair)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> None:
    if x.ndim != 4:
        raise ValueError(f"maps must be (batch, channels, height, width), not {tuple(x.shape)}")
    channels, size = x.shape[1], weight.shape[-1]
    if tuple(weight.shape) != (channels, 1, size, size) or size % 2 == 0:
        raise ValueError(
            f"the weight must be (channels, 1, K, K) with K odd and the {channels} channels of the maps, "
            f"not {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"the bias must have one entry for each of the {channels} channels, not {tuple(bias.shape)}")
    if dilation < 1:
        raise ValueError(f"dilation must be 1 or more, not {dilation}")


@register_flop_formula(torch.ops.gatewise.large_depthwise_conv)
def _flops(x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(x_shape) * weight_shape[-1] ** 2


@register_flop_formula(torch.ops.gatewise.large_depthwise_conv_weight_gradient)
def _weight_gradient_flops(x_shape: Any, dy_shape: Any, kernel_size: int, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x_shape) * kernel_size**2
