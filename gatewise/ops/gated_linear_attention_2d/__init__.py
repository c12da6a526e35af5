"""Gated linear attention over maps: every position reads the whole map, at a cost linear in the positions.

A map is read as one sequence, row by row. Two scans of `gated_linear_attention`, one from each end, share queries, keys
and values. Each has its own gates, f and r, indexed by the position that they belong to:

    F_t = diag(exp(f_t)) F_{t-1} + k_t^T v_t        F, R: (key_dim, value_dim) per head
    R_t = diag(exp(r_t)) R_{t+1} + k_t^T v_t        f_t, r_t <= 0
    o_t = scale / 2 q_t (F_t + R_t)

The current position counts in both. Neighbors in a column are a whole row apart in the sequence. A convolution around
the operator has to provide that locality.

On a CPU, both directions are computed at once if the gates decay little (`both_ways`), as in trained networks. For
other gates, and on CUDA, `bidirectional_gated_linear_attention` is used. ONNX supports neither, so exported files
contain matrix products without any loop. With chunks of c positions and, per key channel, D_ij = exp(f_{j+1} + ... +
f_i) for j <= i and 0 else, one direction is

    o_i = scale (sum_j (sum_d q_id k_jd D_ijd) v_j + (q_i * exp(f_1 + ... + f_i)) E)
    E_n = sum_{m < n} D'_nm U_m,     U_m = sum_j (k_j * exp(f_{j+1} + ... + f_c))^T v_j

where j runs over the chunk of i, E is the state at its entry, and D' is the same kind of decay from chunk to chunk. All
exponents are sums of gates, so nothing overflows. The size of the map is then fixed, but the batch is not.

Source: Liao et al. 2024, arXiv:2405.18425, section 3; the form without loops is ours.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.library import custom_op, register_autograd
from torch.utils.flop_counter import register_flop_formula

from gatewise.ops.gated_linear_attention import (
    bidirectional_gated_linear_attention,
    bidirectional_gated_linear_attention_reference,
)
from gatewise.ops.gated_linear_attention.chunked import chunked_backward_both_ways, chunked_forward_both_ways
from gatewise.ops.gated_linear_attention_2d.both_ways import backward_both_ways, forward_both_ways, gentle
from gatewise.ops.precision import without_autocast

Keys = Float[Tensor, "batch height width heads key_dim"]
Values = Float[Tensor, "batch height width heads value_dim"]

SHORTEST_CHUNK = 16


def gated_linear_attention_2d(
    q: Keys, k: Keys, v: Values, g_forward: Keys, g_backward: Keys, *, scale: float | None = None
) -> Values:
    """Return the mean of the scans from both ends over a map's rows, in q's dtype. Accumulated at least in float32.

    Args:
        g_forward: natural logarithm of the decay in the scan from the first position, at most 0.
        g_backward: the same in the scan from the last position.
        scale: scale of the queries; key_dim ** -0.5 if None.
    Raises:
        ValueError: if shapes, dtypes or devices do not fit together, or (only checked in eager mode) a gate is positive
            or NaN.
    """
    _check(q, k, v, g_forward, g_backward)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    grid = q.shape[1:3]
    q, k, v, g_forward, g_backward = (x.flatten(1, 2) for x in (q, k, v, g_forward, g_backward))
    if torch.onnx.is_in_onnx_export():
        return _by_matrices(q, k, v, g_forward, g_backward, scale / 2).unflatten(1, grid)
    if q.device.type == "cuda":
        both = bidirectional_gated_linear_attention(q, k, v, g_forward, g_backward, scale=scale / 2)
    else:
        both = torch.ops.gatewise.gated_linear_attention_2d(q, k, v, g_forward, g_backward, scale / 2)
    return both.unflatten(1, grid)


def gated_linear_attention_2d_reference(
    q: Keys, k: Keys, v: Values, g_forward: Keys, g_backward: Keys, *, scale: float | None = None
) -> Values:
    """Compute both recurrences, position by position, in the given dtype."""
    grid = q.shape[1:3]
    q, k, v, g_forward, g_backward = (x.flatten(1, 2) for x in (q, k, v, g_forward, g_backward))
    both = bidirectional_gated_linear_attention_reference(q, k, v, g_forward, g_backward, scale=scale)
    return (both / 2).unflatten(1, grid)


@custom_op(
    "gatewise::gated_linear_attention_2d",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor g_forward, Tensor g_backward, float scale) -> Tensor",
)
def _scan_rows(q: Tensor, k: Tensor, v: Tensor, g_forward: Tensor, g_backward: Tensor, scale: float) -> Tensor:
    """Return the sum of both scans over rows (batch, time, heads, width)."""
    with without_autocast(q):
        if gentle(g_forward, g_backward):
            return forward_both_ways(q, k, v, g_forward, g_backward, scale)
        return chunked_forward_both_ways(q, k, v, g_forward, g_backward, None, scale)[0]


@custom_op(
    "gatewise::gated_linear_attention_2d_backward",
    mutates_args=(),
    schema="(Tensor do, Tensor q, Tensor k, Tensor v, Tensor g_forward, Tensor g_backward, float scale) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _scan_rows_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, g_forward: Tensor, g_backward: Tensor, scale: float
) -> tuple[Tensor, ...]:
    with without_autocast(q):
        if gentle(g_forward, g_backward):
            return backward_both_ways(do, q, k, v, g_forward, g_backward, scale)
        # States are recomputed, since such hard gates are rare, and keeping states would cost every call.
        _, kept = chunked_forward_both_ways(q, k, v, g_forward, g_backward, None, scale)
        return chunked_backward_both_ways(do, q, k, v, g_forward, g_backward, None, kept, scale)


@_scan_rows.register_fake
def _(q, k, v, g_forward, g_backward, scale):
    return q.new_empty(*q.shape[:-1], v.shape[-1])


@_scan_rows_backward.register_fake
def _(do, q, k, v, g_forward, g_backward, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, g_forward, g_backward))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.gatewise.gated_linear_attention_2d_backward(do, *ctx.saved_tensors, ctx.scale)
    return *gradients, None


register_autograd("gatewise::gated_linear_attention_2d", _differentiate, setup_context=_keep)


def _flops(q_shape: Any, k_shape: Any, v_shape: Any, *_: Any, **__: Any) -> int:
    """Count both recurrences: an outer product and a read of the state per position and head. Chunks change some."""
    batch, time, heads, key_dim = q_shape
    return 8 * batch * time * heads * key_dim * v_shape[-1]


def _backward_flops(do_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * _flops(q_shape, k_shape, v_shape)


register_flop_formula(torch.ops.gatewise.gated_linear_attention_2d)(_flops)
register_flop_formula(torch.ops.gatewise.gated_linear_attention_2d_backward)(_backward_flops)


def _by_matrices(q: Tensor, k: Tensor, v: Tensor, g_forward: Tensor, g_backward: Tensor, scale: float) -> Tensor:
    """Compute the sum of both scans as matrix products: rows (batch, time, heads, width) in and out."""
    wide = torch.promote_types(q.dtype, torch.float32)
    time = q.shape[1]
    size = _chunk_length(time)
    given = (scale * q.to(wide), k.to(wide), v.to(wide))
    # Both directions as one batch, in which heads of the second half see reversed time.
    both = [torch.cat([x, x.flip(1)], dim=2) for x in given]
    gates = torch.cat([g_forward.to(wide), g_backward.to(wide).flip(1)], dim=2)
    blocks = [_chunks(x, size) for x in (*both, gates)]
    o = _scan_by_matrices(*blocks).flatten(2, 3)[:, :, :time].transpose(1, 2)
    forward, backward = o.chunk(2, dim=2)
    return (forward + backward.flip(1)).to(q.dtype)


def _scan_by_matrices(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Compute one direction for all heads: (batch, heads, chunks, size, width) in and out."""
    size, chunks = g.shape[-2], g.shape[-3]
    within = _decays(g)
    # Row i of a chunk: keys decayed until then, times its query.
    scores = (within * k[..., None, :, :]) @ q[..., :, :, None]
    o = scores[..., 0] @ v
    if chunks == 1:
        return o
    to_end = within[..., size - 1, :, :]
    updates = (k * to_end).mT @ v
    # The chunks from m + 1 to n - 1 are between the entry of chunk n and the exit of chunk m.
    between = _decays(g.sum(dim=-2)).permute(0, 1, 4, 2, 3)[..., :-1, :-1]
    entries = (between @ updates[:, :, :-1].transpose(2, 3).contiguous()).transpose(2, 3)
    from_start = g.cumsum(dim=-2).exp()
    later = (q * from_start)[:, :, 1:] @ entries
    return torch.cat([o[:, :, :1], o[:, :, 1:] + later], dim=2)


def _decays(g: Tensor) -> Tensor:
    """Return decays from row j to row i, exp(g_{j+1} + ... + g_i) for j <= i, else 0: (..., n, K) -> (..., i, j, K).

    Every sum is built from its own terms, since differences of running sums would lose small terms after large ones.
    """
    n = g.shape[-2]
    rows = torch.arange(n, device=g.device)
    later = (rows[:, None] > rows)[..., None]
    sums = torch.where(later, g[..., :, None, :], 0.0).cumsum(dim=-3)
    return torch.where((rows[:, None] >= rows)[..., None], sums.exp(), 0.0)


def _chunks(x: Tensor, size: int) -> Tensor:
    """Split (batch, time, heads, width) into (batch, heads, chunks, size, width), with zeros after the last row."""
    missing = -x.shape[1] % size
    return F.pad(x, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4)


def _chunk_length(time: int) -> int:
    """Balance decays within chunks (time * length numbers) and between chunks ((time / length)^2 numbers)."""
    return max(SHORTEST_CHUNK, 1 << math.ceil(math.log2(time) / 3))


def _check(q: Tensor, k: Tensor, v: Tensor, g_forward: Tensor, g_backward: Tensor) -> None:
    tensors = {"q": q, "k": k, "v": v, "g_forward": g_forward, "g_backward": g_backward}
    for name, tensor in tensors.items():
        if tensor.ndim != 5:
            raise ValueError(f"{name} must be (batch, height, width, heads, width of a head), not {_text(tensor)}")
        if tensor.shape[:4] != q.shape[:4]:
            raise ValueError(
                f"{name} must have the batch, height, width and heads of q, {_text(q)}, not {_text(tensor)}"
            )
        if name != "v" and tensor.shape[4] != q.shape[4]:
            raise ValueError(f"{name} must have the width of q, {q.shape[4]}, not {tensor.shape[4]}")
        if not tensor.is_floating_point() or tensor.device != q.device:
            raise ValueError(
                f"{name} must have a floating-point dtype on {q.device}, as q, not {tensor.dtype} on {tensor.device}"
            )
    if 0 in q.shape:
        raise ValueError(f"there must be at least one position, but q is {_text(q)}")
    for name in ("g_forward", "g_backward"):
        _check_gates(name, tensors[name])


def _check_gates(name: str, gates: Tensor) -> None:
    # There are no values to check while tracing or on the meta device.
    if torch.compiler.is_compiling() or gates.device.type == "meta":
        return
    largest = gates.detach().amax().item()
    if not largest <= 0:
        raise ValueError(f"log gates must be at most 0, but {name} reaches {largest}: pass the logarithm of the decay")


def _text(tensor: Tensor) -> str:
    return "(" + ", ".join(str(size) for size in tensor.shape) + ")"
