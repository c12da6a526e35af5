"""Context mixing: a separate depthwise kernel for every position, computed from its affinity with the whole map.

Per head h of g, with position p = (i, j), centers l (means over regions of the map) and windows of s x s and K x K:

    A[p, l] = q[p] . k[l]                                          affinity of a position with every region
    Z[p, t] = sum_l W[t, l] A[p, l] + b[t] + R[p, t]               one linear layer for all heads and positions
    P_s = softmax(Z[p, :s^2]),   P_K = softmax(Z[p, s^2:])         two kernels, entries row by row
    y[p] = sum_{a, b} P[p, (a, b)] v[i0 + a, j0 + b]               i0 = clamp(i - K // 2, 0, H - K), j0 alike

The first half of the value's channels uses the small kernels, the second half the large ones, and each half is split
into g heads. At the map's borders, windows are shifted inside, never padded, and the bias R is read by offset:
R[p, (a, b)] = table[i0 + a - i + K - 1, j0 + b - j + K - 1].

Since W A = (W k) q, the kernels of a position are one small matrix product away from its query: W k is computed once
per map, and A never. Values and kernels are combined in products with a band matrix, for a few rows of positions at a
time, forward and backward, so neither the windows of the values nor the kernels of the whole map are ever in memory. On
CUDA, custom kernels gather values by their address. Backward, they write the kernels of one window at a time, which
take a fraction of the memory of windows of values. Exported programs contain plain products and index lookups, for one
height and width: bands along rows, and values repeated once for each row of the window.

Source: Lou and Yu 2025, arXiv:2502.20087 (OverLoCK), "Context-Mixing Dynamic Convolution"; windows as in Hassani et al.
2023, arXiv:2204.07143 (neighborhood attention), section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.library import custom_op, register_autograd
from torch.utils.flop_counter import register_flop_formula

from gatewise.ops._backend import suits_triton
from gatewise.ops.context_mixing import rows as rows
from gatewise.ops.context_mixing.rows import Window, kernel_makers, window_starts
from gatewise.ops.precision import without_autocast

Maps = Float[Tensor, "batch channels height width"]
Queries = Float[Tensor, "batch query_dim height width"]
Centers = Float[Tensor, "batch query_dim regions"]
Weight = Float[Tensor, "taps regions"]
Bias = Float[Tensor, " taps"]
SmallTable = Float[Tensor, "heads small small"]
LargeTable = Float[Tensor, "heads large large"]
Kernels = Float[Tensor, "batch heads height width taps"]
Values = Float[Tensor, "batch heads height width head_dim"]


def context_mixing(
    query: Queries, centers: Centers, weight: Weight, bias: Bias, small: SmallTable, large: LargeTable, value: Maps
) -> Maps:
    """Return the mixed values in the dtype of `value`. Softmax and sums are at least float32. Differentiable once.

    Args:
        query: queries that are already scaled.
        weight: weight from affinities to the entries of both kernels, the small one's first.
        small: table of relative positions for the small window, (g, 2s - 1, 2s - 1).
        large: the same for the large window, (g, 2K - 1, 2K - 1).
    Raises:
        ValueError: if shapes do not fit together, or the map is smaller than a window.
    """
    arguments = (query, centers, weight, bias, small, large, value)
    _check(*arguments)
    if torch.compiler.is_exporting():
        return _traceable(*arguments)
    y: Tensor = torch.ops.gatewise.context_mixing(*arguments)
    return y


def context_mixing_reference(
    query: Queries, centers: Centers, weight: Weight, bias: Bias, small: SmallTable, large: LargeTable, value: Maps
) -> Maps:
    """Compute the definition, offset by offset, in the given dtype."""
    heads, (height, width) = small.shape[0], value.shape[2:]
    q = query.unflatten(1, (heads, -1)).flatten(3)
    k = centers.unflatten(1, (heads, -1))
    affinity = torch.einsum("bhcp,bhcl->bhpl", q, k)
    logits = (affinity @ weight.T + bias).unflatten(2, (height, width))
    halves = []
    for table, part, v in zip((small, large), split_taps(logits, small), value.chunk(2, dim=1), strict=True):
        kernels = (part + relative_bias(table, height, width)).softmax(-1)
        y = neighborhood_sum_reference(kernels, v.unflatten(1, (heads, -1)).permute(0, 1, 3, 4, 2))
        halves.append(y.permute(0, 1, 4, 2, 3).flatten(1, 2))
    return torch.cat(halves, dim=1)


def neighborhood_sum_reference(kernels: Kernels, values: Values) -> Values:
    """Return every position's sum over its window, sum_{a, b} kernels[p, (a, b)] values[i0 + a, j0 + b]."""
    height, width = values.shape[2:4]
    size = round(kernels.shape[-1] ** 0.5)
    top, left = (window_starts(length, size, values.device) for length in (height, width))
    y = torch.zeros_like(values)
    for a in range(size):
        for b in range(size):
            y = y + kernels[..., a * size + b, None] * values[:, :, top + a][:, :, :, left + b]
    return y


def relative_bias(
    table: Float[Tensor, "heads offsets offsets"], height: int, width: int
) -> Float[Tensor, "heads height width taps"]:
    """Return the bias of every position and entry, read from the table by offset."""
    size = (table.shape[1] + 1) // 2
    return rows.row_bias(rows.by_column(table, width, size), rows.offsets(height, size, table.device))


def split_taps(entries: Float[Tensor, "*axes taps"], small: SmallTable) -> tuple[Tensor, Tensor]:
    """Split entries into those of the small and of the large kernels."""
    taps = ((small.shape[1] + 1) // 2) ** 2
    return entries[..., :taps], entries[..., taps:]


def _traceable(*arguments: Tensor) -> Tensor:
    """Compute with products and constant-index lookups: differentiable, for any number of samples."""
    value = arguments[-1]
    halves = [rows.dense_forward(window) for window in _windows(*arguments)]
    return torch.cat([_as_maps(y, value) for y in halves], dim=1).to(value.dtype)


def _windows(
    query: Tensor, centers: Tensor, weight: Tensor, bias: Tensor, small: Tensor, large: Tensor, value: Tensor
) -> tuple[Window, Window]:
    """Return the arguments for the small and the large window, positions before channels, at least in float32."""
    wide, heads = torch.promote_types(value.dtype, torch.float32), small.shape[0]
    q = _by_position(query.to(wide), heads)
    weights, biases = split_taps(weight.to(wide).T, small), split_taps(bias.to(wide), small)
    values = value.to(wide).chunk(2, dim=1)
    first, second = (
        Window(q, kernel_makers(centers.to(wide), weights[n], heads), biases[n], table.to(wide), _by_position(v, heads))
        for n, (table, v) in enumerate(zip((small, large), values, strict=True))
    )
    return first, second


def _by_position(x: Tensor, heads: int) -> Tensor:
    """Move channels last: (B, g c, H, W) -> (B, g, H, W, c)."""
    return x.unflatten(1, (heads, -1)).permute(0, 1, 3, 4, 2).contiguous()


def _as_maps(x: Tensor, like: Tensor) -> Tensor:
    """Move channels first: (B, g, H, W, c) -> (B, g c, H, W)."""
    return x.permute(0, 1, 4, 2, 3).flatten(1, 2).to(like.dtype)


def _backend(x: Tensor) -> Any:
    """Return the module that computes a window: kernels on CUDA, bands of a few rows elsewhere and in float64."""
    if not suits_triton(x):
        return rows
    from gatewise.ops.context_mixing import triton as kernels

    return kernels


@custom_op(
    "gatewise::context_mixing",
    mutates_args=(),
    schema="(Tensor query, Tensor centers, Tensor weight, Tensor bias, Tensor small, Tensor large, Tensor value)"
    " -> Tensor",
)
def _forward(
    query: Tensor, centers: Tensor, weight: Tensor, bias: Tensor, small: Tensor, large: Tensor, value: Tensor
) -> Tensor:
    with without_autocast(value):
        windows = _windows(query, centers, weight, bias, small, large, value)
        halves = [_backend(value).forward(window) for window in windows]
        return torch.cat([_as_maps(y, value) for y in halves], dim=1)


@_forward.register_fake
def _(
    query: Tensor, centers: Tensor, weight: Tensor, bias: Tensor, small: Tensor, large: Tensor, value: Tensor
) -> Tensor:
    return value.new_empty(value.shape)


@custom_op(
    "gatewise::context_mixing_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor query, Tensor centers, Tensor weight, Tensor bias, Tensor small, Tensor large, "
    "Tensor value) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(dy: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
    query, centers, weight, _, small, _, value = arguments
    heads = small.shape[0]
    with without_autocast(value):
        windows = _windows(*arguments)
        cotangents = [_by_position(part.to(windows[0].v.dtype), heads) for part in dy.chunk(2, dim=1)]
        parts = [_backend(value).backward(*pair) for pair in zip(windows, cotangents, strict=True)]
        dq = _as_maps(parts[0].q + parts[1].q, query).contiguous()
        # (B, g, c, taps): backward from the kernel makers to their inputs.
        dmakers = torch.cat([part.makers for part in parts], dim=-1)
        wide = dmakers.dtype
        dcenters = (dmakers @ weight.to(wide)).flatten(1, 2)
        dweight = torch.einsum("bhct,bhcl->tl", dmakers, centers.to(wide).unflatten(1, (heads, -1)))
        dbias = torch.cat([part.bias for part in parts])
        dvalue = torch.cat([_as_maps(part.v, value) for part in parts], dim=1)
    found = (dq, dcenters, dweight, dbias, parts[0].table, parts[1].table, dvalue)
    return tuple(gradient.to(x.dtype).contiguous() for gradient, x in zip(found, arguments, strict=True))


@_backward.register_fake
def _(dy: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in arguments)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = torch.ops.gatewise.context_mixing_backward(dy, *ctx.saved_tensors)
    return gradients


register_autograd("gatewise::context_mixing", _differentiate, setup_context=_keep)


def _flops(query_shape: Any, centers_shape: Any, weight_shape: Any, bias_shape: Any, small_shape: Any) -> int:
    """Count as in the paper's tables: affinities, and kernels from them, without the weighted sum.

    The actual computation, including that sum, takes less, since kernels come from queries directly.
    """
    batch, query_dim, height, width = query_shape
    taps, regions = weight_shape
    return 2 * batch * height * width * regions * (query_dim + small_shape[0] * taps)


@register_flop_formula(torch.ops.gatewise.context_mixing)
def _forward_flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    return _flops(*shapes[:5])


@register_flop_formula(torch.ops.gatewise.context_mixing_backward)
def _backward_flops(dy_shape: Any, *shapes: Any, out_shape: Any = None, **_: Any) -> int:
    return 2 * _flops(*shapes[:5])


def _check(
    query: Tensor, centers: Tensor, weight: Tensor, bias: Tensor, small: Tensor, large: Tensor, value: Tensor
) -> None:
    if query.ndim != 4 or value.ndim != 4 or query.shape[0] != value.shape[0] or query.shape[2:] != value.shape[2:]:
        raise ValueError(
            "query and value must be maps (batch, channels, height, width) of one size, not "
            f"{tuple(query.shape)} and {tuple(value.shape)}"
        )
    if centers.ndim != 3 or centers.shape[:2] != query.shape[:2]:
        raise ValueError(f"centers must be {(*query.shape[:2], 'regions')} as the query, not {tuple(centers.shape)}")
    sizes = [_window_size(name, table, small.shape[0]) for name, table in (("small", small), ("large", large))]
    taps = sum(size**2 for size in sizes)
    if tuple(weight.shape) != (taps, centers.shape[2]) or tuple(bias.shape) != (taps,):
        raise ValueError(
            f"windows of {sizes[0]} and {sizes[1]} and {centers.shape[2]} regions need a weight "
            f"{(taps, centers.shape[2])} and a bias {(taps,)}, not {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    check_heads(value.shape[1], query.shape[1], small.shape[0])
    if min(value.shape[2:]) < max(sizes):
        raise ValueError(
            f"a window of {max(sizes)}x{max(sizes)} does not fit into a map of {value.shape[2]}x{value.shape[3]}; "
            "enlarge the map first"
        )


def check_heads(channels: int, query_dim: int, heads: int) -> None:
    """Raise ValueError unless both halves of the value and the query can be split into heads."""
    if channels % (2 * heads) or query_dim % heads:
        raise ValueError(
            f"the value's channels must be divisible by twice the heads ({heads}) and the query's by the heads, "
            f"not {channels} and {query_dim}"
        )


def _window_size(name: str, table: Tensor, heads: int) -> int:
    if table.ndim != 3 or table.shape[0] != heads or table.shape[1] != table.shape[2] or table.shape[1] % 4 != 1:
        raise ValueError(
            f"the {name} table must be ({heads} heads, 2K - 1, 2K - 1) with K odd, not {tuple(table.shape)}"
        )
    return (table.shape[1] + 1) // 2
