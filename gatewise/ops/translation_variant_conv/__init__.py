"""Translation-variant depthwise convolution: a separate kernel for every channel and position, shared by all images.

    y[b, c, i, j] = bias[c, i, j] + sum_{u, v} weight[c, u, v, i, j] x[b, c, s i + u - P, s j + v - P],  P = (K - 1) / 2

with zeros outside of the map, stride s and odd K. An input of H x W has (H - 1) // s + 1 rows of outputs, and likewise
columns from W: with s = 2, both 2 h - 1 and 2 h rows give h. If the weight is the same at all positions, this is the
depthwise convolution.

The operator is bilinear in x and weight, and each gradient is one of three operators of the same kind, so it can be
differentiated any number of times. On a CPU, a block of samples that fits the cache is processed at a time, with
channels last, and one tap after the other is added to it. Nothing of the size K K times the map is ever held. On CUDA,
custom kernels read the weights once for many samples. Compilers see the taps as plain slices, products and sums, and
fuse them. Exported programs contain the same (in ONNX: Pad, Slice, Mul, Add), since no exchange format has an operator
for it.

Source: Chen et al. 2022, arXiv:2203.10489, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.library import custom_op, register_autograd
from torch.utils.flop_counter import register_flop_formula

from gatewise.ops._backend import suits_triton
from gatewise.ops.precision import autocast_convolution

Maps = Float[Tensor, "batch channels height width"]
Outputs = Float[Tensor, "batch channels h w"]
Weights = Float[Tensor, "channels kernel kernel h w"]
Bias = Float[Tensor, "channels h w"]

# Numbers in a block of outputs on a CPU: with the block's inputs and weights they fit a second-level cache.
_BLOCK = 1 << 16


def translation_variant_conv(x: Maps, weight: Weights, bias: Bias | None = None, *, stride: int = 1) -> Outputs:
    """Convolve, differentiable any number of times. The memory format of the result may differ from that of x.

    Half precision is summed in float32. Weights that are laid out as by `arrange_weight` save a copy.

    Args:
        weight: K x K kernels for each channel and output position.
    Raises:
        ValueError: if shapes do not fit together, the kernel is even, or the stride is not 1 or 2.
    """
    x, weight, bias = autocast_convolution(x, weight, bias)
    _check(x, weight, bias, stride)
    if _traced(x):
        return _add_taps(x, weight, bias, stride)
    y: Tensor = torch.ops.gatewise.translation_variant_conv(x, weight, bias, stride)
    return y


def translation_variant_conv_reference(
    x: Maps, weight: Weights, bias: Bias | None = None, *, stride: int = 1
) -> Outputs:
    """Compute the definition over unfolded windows, in the given dtype."""
    channels, kernel, _, h, w = weight.shape
    windows = F.unfold(x, kernel, padding=kernel // 2, stride=stride)
    windows = windows.view(x.shape[0], channels, kernel, kernel, h, w)
    y = (weight * windows).sum(dim=(2, 3))
    return y if bias is None else y + bias


def output_size(size: int, stride: int) -> int:
    """Return the number of output rows (or columns) for a number of input ones."""
    return (size - 1) // stride + 1


def arrange_weight(weight: Weights, x: Maps | None = None) -> Weights:
    """Return the weight in the operator's preferred layout for maps like `x`; on a CPU, for any: tap by tap."""
    if x is not None and suits_triton(x) and not _is_channels_last(x):
        return weight.permute(1, 2, 0, 3, 4).contiguous().permute(2, 0, 1, 3, 4)
    return weight.permute(1, 2, 3, 4, 0).contiguous().permute(4, 0, 1, 2, 3)


def _traced(x: Tensor) -> bool:
    """Return whether a compiler or exporter should see the taps instead of one operator."""
    if torch.compiler.is_exporting():
        return True
    return torch.compiler.is_compiling() and not suits_triton(x)


def _kernels() -> Any:
    from gatewise.ops.translation_variant_conv import triton as kernels

    return kernels


def _seen(padded: Tensor, kernel: int, size: Sequence[int], stride: int) -> list[Tensor]:
    """Return what each of the K K taps sees of padded maps (batch, rows, columns, channels), as views.

    The views are (batch, h, w, channels). Taking them from one view of all costs a fraction of slicing each, which
    matters for small maps.
    """
    batch, row, column, channel = padded.stride()
    shape = (kernel, kernel, padded.shape[0], *size, padded.shape[3])
    windows = padded.as_strided(shape, (row, column, batch, stride * row, stride * column, channel))
    return [view for line in windows.unbind(0) for view in line.unbind(0)]


def _add_taps(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Compute the operator in plain PyTorch, for compilers to fuse and for exported programs."""
    _, kernel, _, h, w = weight.shape
    margin, rows, columns = kernel // 2, stride * (h - 1) + 1, stride * (w - 1) + 1
    padded = F.pad(x, (margin, margin, margin, margin))
    products = [
        padded[:, :, u : u + rows : stride, v : v + columns : stride] * weight[:, u, v]
        for u in range(kernel)
        for v in range(kernel)
    ]
    y = sum(products[1:], products[0])
    return y if bias is None else y + bias


@custom_op(
    "gatewise::translation_variant_conv",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, int stride) -> Tensor",
)
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    if suits_triton(x):
        y: Tensor = _kernels().forward(x, weight, bias, stride)
        return y
    y = _empty_maps(x, (x.shape[0], x.shape[1], *weight.shape[-2:]))
    taps = _as_taps(weight, x.dtype)
    start = None if bias is None else bias.permute(1, 2, 0)
    kernel, size = weight.shape[1], weight.shape[3:]
    target = y.permute(0, 2, 3, 1)
    for samples in _blocks(target):
        padded = _pad(x[samples], kernel)
        # Half precision is summed in a separate float32 tensor, everything else in the output itself.
        exact = target.dtype == taps[0].dtype
        sums = target[samples] if exact else torch.empty_like(target[samples], dtype=taps[0].dtype)
        sums.zero_() if start is None else sums.copy_(start.expand_as(sums))
        for seen, tap in zip(_seen(padded, kernel, size, stride), taps, strict=True):
            sums.addcmul_(seen, tap)
        if sums.dtype != target.dtype:
            target[samples] = sums
    return y


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    return _empty_maps(x, (x.shape[0], x.shape[1], *weight.shape[-2:]))


@custom_op(
    "gatewise::translation_variant_conv_input_gradient",
    mutates_args=(),
    schema="(Tensor dy, Tensor weight, SymInt height, SymInt width, int stride) -> Tensor",
)
def _input_gradient(dy: Tensor, weight: Tensor, height: int, width: int, stride: int) -> Tensor:
    if suits_triton(dy):
        gradient: Tensor = _kernels().input_gradient(dy, weight, height, width, stride)
        return gradient
    kernel = weight.shape[1]
    margin = kernel // 2
    dx = _empty_maps(dy, (dy.shape[0], dy.shape[1], height, width))
    taps = _as_taps(weight, dy.dtype)
    target = dx.permute(0, 2, 3, 1)
    for samples in _blocks(target):
        given = dy[samples].permute(0, 2, 3, 1).to(taps[0].dtype, memory_format=torch.contiguous_format)
        padded = given.new_zeros(given.shape[0], height + 2 * margin, width + 2 * margin, given.shape[3])
        for seen, tap in zip(_seen(padded, kernel, weight.shape[3:], stride), taps, strict=True):
            seen.addcmul_(given, tap)
        target[samples] = padded[:, margin : margin + height, margin : margin + width]
    return dx


@_input_gradient.register_fake
def _(dy: Tensor, weight: Tensor, height: int, width: int, stride: int) -> Tensor:
    return _empty_maps(dy, (dy.shape[0], dy.shape[1], height, width))


@custom_op(
    "gatewise::translation_variant_conv_weight_gradient",
    mutates_args=(),
    schema="(Tensor x, Tensor dy, int kernel_size, int stride) -> Tensor",
)
def _weight_gradient(x: Tensor, dy: Tensor, kernel_size: int, stride: int) -> Tensor:
    if suits_triton(x):
        gradient: Tensor = _kernels().weight_gradient(x, dy, kernel_size, stride)
        return gradient
    channels, h, w = dy.shape[1:]
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = dy.new_zeros(kernel_size, kernel_size, h, w, channels, dtype=wide)
    for samples in _blocks(dy.permute(0, 2, 3, 1)):
        given = dy[samples].permute(0, 2, 3, 1).to(wide, memory_format=torch.contiguous_format)
        padded = _pad(x[samples], kernel_size)
        products = torch.empty_like(given)
        for seen, total in zip(_seen(padded, kernel_size, (h, w), stride), sums.flatten(0, 1).unbind(0), strict=True):
            if given.shape[0] == 1:
                total.addcmul_(given[0], seen[0])
            else:
                total += torch.mul(given, seen, out=products).sum(dim=0)
    return sums.to(x.dtype).permute(4, 0, 1, 2, 3)


@_weight_gradient.register_fake
def _(x: Tensor, dy: Tensor, kernel_size: int, stride: int) -> Tensor:
    channels, h, w = dy.shape[1:]
    if suits_triton(x) and not _is_channels_last(x):
        return x.new_empty(kernel_size, kernel_size, channels, h, w).permute(2, 0, 1, 3, 4)
    return x.new_empty(kernel_size, kernel_size, h, w, channels).permute(4, 0, 1, 2, 3)


def _empty_maps(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Allocate maps with channels last on a CPU, and in the memory format of `like` where the kernels run."""
    batch, channels, height, width = shape
    if suits_triton(like) and not _is_channels_last(like):
        return like.new_empty(shape)
    return like.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _as_taps(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the weight of each of the K K taps, (h, w, channels), at least in float32."""
    wide = torch.promote_types(dtype, torch.float32)
    return weight.permute(1, 2, 3, 4, 0).to(wide).contiguous().flatten(0, 1).unbind(0)


def _pad(x: Tensor, kernel: int) -> Tensor:
    """Return maps with channels last and zeros around them, at least in float32."""
    batch, channels, height, width = x.shape
    margin = kernel // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    padded = x.new_zeros(batch, height + 2 * margin, width + 2 * margin, channels, dtype=wide)
    padded[:, margin : margin + height, margin : margin + width].copy_(x.permute(0, 2, 3, 1))
    return padded


def _blocks(maps: Tensor) -> Iterator[slice]:
    """Yield slices of the batch with about `_BLOCK` numbers each."""
    samples = max(1, _BLOCK // max(1, maps[0].numel())) if maps.shape[0] else 1
    for first in range(0, maps.shape[0], samples):
        yield slice(first, first + samples)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int], output: Tensor) -> None:
    x, weight, _, ctx.stride = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
    dx = _to_input(dy, weight, x.shape, ctx.stride) if wants_x else None
    dweight = _to_weight(x, dy, weight.shape[1], ctx.stride) if wants_weight else None
    return dx, dweight, dy.sum(dim=0) if wants_bias else None, None


def _keep_gradient(ctx: Any, inputs: tuple[Tensor, Tensor, int, int, int], output: Tensor) -> None:
    dy, weight, _, _, ctx.stride = inputs
    ctx.save_for_backward(dy, weight)


def _differentiate_gradient(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate the input's gradient, which is bilinear in `dy` and the weight."""
    dy, weight = ctx.saved_tensors
    wants_dy, wants_weight = ctx.needs_input_grad[:2]
    ddy = torch.ops.gatewise.translation_variant_conv(ddx, weight, None, ctx.stride) if wants_dy else None
    return ddy, _to_weight(ddx, dy, weight.shape[1], ctx.stride) if wants_weight else None, None, None, None


def _keep_pair(ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: Tensor) -> None:
    x, dy, _, ctx.stride = inputs
    ctx.save_for_backward(x, dy)


def _differentiate_pair(ctx: Any, dweight: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate the weight's gradient, which is bilinear in `x` and `dy`."""
    x, dy = ctx.saved_tensors
    wants_x, wants_dy = ctx.needs_input_grad[:2]
    dx = _to_input(dy, dweight, x.shape, ctx.stride) if wants_x else None
    ddy = torch.ops.gatewise.translation_variant_conv(x, dweight, None, ctx.stride) if wants_dy else None
    return dx, ddy, None, None


def _to_input(dy: Tensor, weight: Tensor, shape: torch.Size, stride: int) -> Tensor:
    gradient: Tensor = torch.ops.gatewise.translation_variant_conv_input_gradient(dy, weight, *shape[2:], stride)
    return gradient


def _to_weight(x: Tensor, dy: Tensor, kernel: int, stride: int) -> Tensor:
    gradient: Tensor = torch.ops.gatewise.translation_variant_conv_weight_gradient(x, dy, kernel, stride)
    return gradient


register_autograd("gatewise::translation_variant_conv", _differentiate, setup_context=_keep)
register_autograd(
    "gatewise::translation_variant_conv_input_gradient", _differentiate_gradient, setup_context=_keep_gradient
)
register_autograd("gatewise::translation_variant_conv_weight_gradient", _differentiate_pair, setup_context=_keep_pair)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> None:
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, not {stride}")
    if x.ndim != 4:
        raise ValueError(f"maps must be (batch, channels, height, width), not {tuple(x.shape)}")
    channels, height, width = x.shape[1:]
    h, w = output_size(height, stride), output_size(width, stride)
    kernel = weight.shape[1] if weight.ndim == 5 else 0
    if tuple(weight.shape) != (channels, kernel, kernel, h, w) or kernel % 2 == 0:
        raise ValueError(
            f"the weight must be (channels, K, K, h, w) with K odd, the {channels} channels of the maps and their "
            f"{h}x{w} outputs, not {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (channels, h, w):
        raise ValueError(f"the bias must be (channels, h, w) = {(channels, h, w)}, not {tuple(bias.shape)}")
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(f"weight and bias must have the dtype of the maps, {x.dtype}, not {weight.dtype}")


@register_flop_formula(torch.ops.gatewise.translation_variant_conv)
def _flops(x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * x_shape[0] * math.prod(weight_shape)


@register_flop_formula(torch.ops.gatewise.translation_variant_conv_input_gradient)
def _input_gradient_flops(dy_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * dy_shape[0] * math.prod(weight_shape)


@register_flop_formula(torch.ops.gatewise.translation_variant_conv_weight_gradient)
def _weight_gradient_flops(x_shape: Any, dy_shape: Any, kernel_size: int, *_: Any, **__: Any) -> int:
    return 2 * math.prod(dy_shape) * kernel_size**2
