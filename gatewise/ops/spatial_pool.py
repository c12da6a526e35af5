"""Max pooling as a spatial operator: it mixes positions like a 3x3 convolution, but without weights.

    y[b, c, i, j] = max_{p, q} x[b, c, s i + p - P, s j + q - P],   p, q = 0 .. K - 1,   P = (K - 1) / 2

over positions within the map (padding is minus infinity, never zero), with K odd and s the stride: ceil(size / s)
positions. The gradient goes to the first largest element of a window, in row order.

For the backward pass the library keeps the index of that element in the map, in eight bytes per output. Its offset in
the window, K p + q, fits into one byte, and is all that is kept here. Without a backward pass no indices are needed.
The maximum of a square is that of the maxima of its columns, which takes 2 (K - 1) vectorized comparisons of whole
maps.

Source: Han et al. 2022, arXiv:2202.02777 (PfLayer), where it replaces the 3x3 convolution of residual blocks and the
self-attention of transformer blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.library import custom_op, register_autograd

Maps = Float[Tensor, "batch channels height width"]
Pooled = Float[Tensor, "batch channels _ _"]

LARGEST_KERNEL = 15
"""Largest kernel size: the 225 offsets of its window fit into a byte."""

# Elements per thread that a CPU works on at a time, so that they and intermediate results stay in its cache.
_PIECE = 2**17

# The library's loop over channels-last maps is vectorized; below this many elements, only call overhead matters.
_WORTHWHILE = 2**17


def spatial_max_pool(x: Maps, kernel_size: int = 3, stride: int = 1) -> Pooled:
    """Return the pooled maps, channels-last if `x` is. Differentiable any number of times.

    Raises:
        ValueError: if `x` does not have four axes or is empty, the kernel is even or above 15, or the stride below 1.
    """
    _check(x, kernel_size, stride)
    if torch.compiler.is_exporting():
        return _library_pool(x, kernel_size, stride)
    if torch.is_grad_enabled() and x.requires_grad:
        y: Tensor = torch.ops.gatewise.spatial_max_pool(x, kernel_size, stride)[0]
        return y
    return _largest(x, kernel_size, stride) if _gains(x, stride) else _library_pool(x, kernel_size, stride)


def spatial_max_pool_reference(x: Maps, kernel_size: int = 3, stride: int = 1) -> Pooled:
    """Compute the definition: the largest entry of every window, in the given dtype."""
    margin = kernel_size // 2
    padded = F.pad(x, (margin, margin, margin, margin), value=-torch.inf)
    return padded.unfold(2, kernel_size, stride).unfold(3, kernel_size, stride).amax(dim=(4, 5))


def _library_pool(x: Tensor, kernel_size: int, stride: int) -> Tensor:
    return F.max_pool2d(x, kernel_size, stride, kernel_size // 2)


def _gains(x: Tensor, stride: int) -> bool:
    """Return whether this is faster than the library's pooling, which compilers replace with their own loops."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not _is_channels_last(x) or (stride == 1 and x.numel() >= _WORTHWHILE)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if _is_channels_last(x) else torch.contiguous_format


def _empty(like: Tensor, dtype: torch.dtype, size: tuple[int, int]) -> Tensor:
    """Return empty maps of another size and dtype, in the memory format of `like`."""
    return torch.empty((*like.shape[:2], *size), dtype=dtype, device=like.device, memory_format=_memory_format(like))


def _outputs(size: int, stride: int) -> int:
    return (size - 1) // stride + 1


@custom_op(
    "gatewise::spatial_max_pool",
    mutates_args=(),
    schema="(Tensor x, int kernel_size, int stride) -> (Tensor, Tensor)",
)
def _forward(x: Tensor, kernel_size: int, stride: int) -> tuple[Tensor, Tensor]:
    """Return the pooled maps, and the offset of each maximum within its window, in a byte."""
    window = ([kernel_size] * 2, [stride] * 2, [kernel_size // 2] * 2)
    y = _empty(x, x.dtype, (_outputs(x.shape[2], stride), _outputs(x.shape[3], stride)))
    offsets = torch.empty_like(y, dtype=torch.uint8)
    # On a CPU the library is only fast with channels-last maps, by more than converting others to them costs.
    inner_format = torch.channels_last if x.device.type == "cpu" else _memory_format(x)
    for piece in _pieces(x):
        maps = x[piece].contiguous(memory_format=inner_format)
        y[piece], places = torch.ops.aten.max_pool2d_with_indices(maps, *window)
        offsets[piece] = _offsets(places, x.shape[3], kernel_size, stride)
    return y, offsets


@_forward.register_fake
def _(x: Tensor, kernel_size: int, stride: int) -> tuple[Tensor, Tensor]:
    y = _empty(x, x.dtype, (_outputs(x.shape[2], stride), _outputs(x.shape[3], stride)))
    return y, torch.empty_like(y, dtype=torch.uint8)


@custom_op(
    "gatewise::spatial_max_pool_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor offsets, SymInt height, SymInt width, int kernel_size, int stride) -> Tensor",
)
def _scatter(dy: Tensor, offsets: Tensor, height: int, width: int, kernel_size: int, stride: int) -> Tensor:
    """Add up the gradients of the outputs at the elements that they were taken from."""
    window = ([kernel_size] * 2, [stride] * 2, [kernel_size // 2] * 2, [1, 1], False)
    dy = dy.contiguous(memory_format=_memory_format(offsets))
    dx = _empty(offsets, dy.dtype, (height, width))
    add_up = torch.ops.aten.max_pool2d_with_indices_backward.grad_input
    for piece in _pieces(dx):
        places = _places(offsets[piece], width, kernel_size, stride)
        # The library only uses the shape of the input maps, which the result has too.
        add_up(dy[piece], dx[piece], *window, places, grad_input=dx[piece])
    return dx


@_scatter.register_fake
def _(dy: Tensor, offsets: Tensor, height: int, width: int, kernel_size: int, stride: int) -> Tensor:
    return _empty(offsets, dy.dtype, (height, width))


@custom_op(
    "gatewise::spatial_max_pool_gather",
    mutates_args=(),
    schema="(Tensor x, Tensor offsets, int kernel_size, int stride) -> Tensor",
)
def _gather(x: Tensor, offsets: Tensor, kernel_size: int, stride: int) -> Tensor:
    """Return the elements at the positions of other maps' maxima."""
    places = _places(offsets, x.shape[3], kernel_size, stride)
    picked = x.flatten(2).gather(2, places.flatten(2)).unflatten(2, places.shape[2:])
    return picked.contiguous(memory_format=_memory_format(offsets))


@_gather.register_fake
def _(x: Tensor, offsets: Tensor, kernel_size: int, stride: int) -> Tensor:
    return torch.empty_like(offsets, dtype=x.dtype)


def _keep_offsets(ctx: Any, inputs: tuple[Tensor, int, int], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.kernel_size, ctx.stride = inputs
    ctx.size = x.shape[2:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _differentiate(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (offsets,) = ctx.saved_tensors
    scatter = torch.ops.gatewise.spatial_max_pool_backward
    return scatter(dy, offsets, *ctx.size, ctx.kernel_size, ctx.stride), None, None


def _keep_scattered(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, offsets, _, _, ctx.kernel_size, ctx.stride = inputs
    ctx.save_for_backward(offsets)


def _differentiate_scatter(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    (offsets,) = ctx.saved_tensors
    picked = torch.ops.gatewise.spatial_max_pool_gather(ddx, offsets, ctx.kernel_size, ctx.stride)
    return picked, None, None, None, None, None


def _keep_gathered(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offsets, ctx.kernel_size, ctx.stride = inputs
    ctx.size = x.shape[2:]
    ctx.save_for_backward(offsets)


def _differentiate_gather(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (offsets,) = ctx.saved_tensors
    scatter = torch.ops.gatewise.spatial_max_pool_backward
    return scatter(dy, offsets, *ctx.size, ctx.kernel_size, ctx.stride), None, None, None


register_autograd("gatewise::spatial_max_pool", _differentiate, setup_context=_keep_offsets)
register_autograd("gatewise::spatial_max_pool_backward", _differentiate_scatter, setup_context=_keep_scattered)
register_autograd("gatewise::spatial_max_pool_gather", _differentiate_gather, setup_context=_keep_gathered)


def _offsets(places: Tensor, columns: int, kernel_size: int, stride: int) -> Tensor:
    """Convert map indices, columns * p + q after the window's corner, to offsets within windows, K p + q."""
    rows, corners = _corners(places, columns, kernel_size, stride)
    # Small integers are fast, and differences of truncated ones are still correct.
    dtype = _integers(columns, kernel_size)
    steps = places.to(dtype) - corners.to(dtype)
    if columns >= kernel_size:
        down = _quotient(steps, columns, kernel_size)
    else:
        # Indices that differ in p and q may then be equally far after the corner.
        down = (torch.div(places, columns, rounding_mode="floor") - rows).to(dtype)
    return steps.add_(down, alpha=kernel_size - columns).to(torch.uint8)


def _places(offsets: Tensor, columns: int, kernel_size: int, stride: int) -> Tensor:
    """Convert offsets within windows to map indices in row order."""
    _, corners = _corners(offsets, columns, kernel_size, stride)
    dtype = _integers(columns, kernel_size)
    down = _quotient(offsets, kernel_size, kernel_size).to(dtype)
    steps = offsets.to(dtype).add_(down, alpha=columns - kernel_size)
    return steps.to(torch.int32).add_(corners.to(torch.int32)).long()


def _corners(outputs: Tensor, columns: int, kernel_size: int, stride: int) -> tuple[Tensor, Tensor]:
    """Return the row and map index of each window's first element; both are below 0 outside of the map."""
    rows, across = (torch.arange(size, device=outputs.device) * stride - kernel_size // 2 for size in outputs.shape[2:])
    return rows[:, None], rows[:, None] * columns + across


def _integers(columns: int, kernel_size: int) -> torch.dtype:
    """Return the smallest integers that can count the elements of as many whole rows as a window has."""
    return torch.int16 if kernel_size * columns < 2**15 else torch.int32


def _quotient(x: Tensor, divisor: int, below: int) -> Tensor:
    """Return x // divisor for quotients from 0 to `below` - 1. Comparisons are faster than divisions."""
    quotient = torch.zeros_like(x)
    reached = torch.empty_like(x)
    for multiple in range(1, below):
        quotient += torch.ge(x, multiple * divisor, out=reached)
    return quotient


def _pieces(maps: Tensor) -> Iterator[slice]:
    """Yield runs of maps along the first axis to work on at a time; one run of all maps except on a CPU."""
    count = maps.shape[0]
    if maps.device.type == "cpu":
        count = max(1, _PIECE * torch.get_num_threads() // math.prod(maps.shape[1:]))
    return (slice(first, first + count) for first in range(0, maps.shape[0], max(1, count)))


def _largest(x: Tensor, kernel_size: int, stride: int) -> Tensor:
    """Return only the maxima, on a CPU: down every column, then along the rows of the result."""
    format_of_x = _memory_format(x)
    x = x.contiguous(memory_format=format_of_x)
    y = _empty(x, x.dtype, (_outputs(x.shape[2], stride), _outputs(x.shape[3], stride)))
    # Contiguous (maps, height, width, channels): one map per sample, or per sample and channel.
    last = format_of_x == torch.channels_last
    maps, pooled = (t.permute(0, 2, 3, 1) if last else t.flatten(0, 1)[..., None] for t in (x, y))
    for piece in _pieces(maps):
        down = _largest_along(maps[piece], 1, kernel_size, stride)
        pooled[piece] = _largest_along(down, 2, kernel_size, stride)
    return y


def _largest_along(x: Tensor, axis: int, kernel_size: int, stride: int) -> Tensor:
    """Return the largest value of every window along one axis."""
    size, arm = x.shape[axis], kernel_size // 2
    middles = x[_at(axis, slice(None, None, stride))]
    y = torch.empty(middles.shape, dtype=x.dtype).copy_(middles)
    for step in range(-arm, arm + 1):
        # Outputs whose window reaches an element this many steps from its middle.
        first = max(0, -(step // stride))
        last = (size - 1 - step) // stride + 1
        if step != 0 and last > first:
            best = y[_at(axis, slice(first, last))]
            seen = x[_at(axis, slice(first * stride + step, None, stride))]
            torch.maximum(best, seen.narrow(axis, 0, best.shape[axis]), out=best)
    return y


def _at(axis: int, where: slice) -> tuple[slice, ...]:
    return (*[slice(None)] * axis, where)


def _check(x: Tensor, kernel_size: int, stride: int) -> None:
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"maps must be (batch, channels, height, width) and not empty, not {tuple(x.shape)}")
    if kernel_size % 2 == 0 or not 1 <= kernel_size <= LARGEST_KERNEL:
        raise ValueError(f"kernel_size must be odd and at most {LARGEST_KERNEL}, not {kernel_size}")
    if stride < 1:
        raise ValueError(f"stride must be 1 or more, not {stride}")
