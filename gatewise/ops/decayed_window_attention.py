"""Attention along the rows and then the columns of windows, decaying with distance.

Each head h makes two passes within each window, with the same queries and keys. The second acts on the first's output:

    v1_(a,b) = sum_b' W(a, b; a, b') v_(a,b')                    along a row
    y_(a,b)  = sum_a' W(a, b; a', b) v1_(a',b)                   then along a column

    W_ij = act_j(scale q_i . k_j + (L_h + m_h) |i - j|)                             additive decay
    W_ij = act_j(scale q_i . k_j + m_h |i - j|) exp(L_h |i - j|)                    multiplicative decay

act is a softmax over the keys of the window, or a sigmoid, whose weights need not sum to one. L_h = ln(gamma_h) <= 0 is
the log decay of the head and m_h its slope. Along one axis, windows of w positions start at `shift`, as if the map were
rolled back by it: the first `shift` positions form a smaller window, and so do those left at the end. This equals
padding to whole windows and masking positions that were not neighbors before.

Source: Maity et al. 2026, arXiv:2604.06014 (Gated-SwinRMT); the passes and the decay are those of Fan et al. 2023,
arXiv:2309.11523 (RMT), section 3; sigmoid and slopes of both signs those of Fu et al. 2025, arXiv:2502.18845 (SWAT).
"""

from __future__ import annotations

import math
from functools import partial
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from gatewise.ops.precision import without_autocast
from gatewise.ops.window_attention import Keys, Values, Window, window_attention

Activation = Literal["softmax", "sigmoid"]
Decay = Literal["additive", "multiplicative"]
ACTIVATIONS = ("softmax", "sigmoid")
DECAYS = ("additive", "multiplicative")

# Largest window for which a CPU is faster with explicit weights than with fused attention, whose blocks are larger.
_SMALL = 16

PerHead = Float[Tensor, " heads"]


def decayed_window_attention(
    q: Keys,
    k: Keys,
    v: Values,
    log_decay: PerHead | None = None,
    slopes: PerHead | None = None,
    *,
    activation: Activation = "softmax",
    decay: Decay = "additive",
    window: Window | None = None,
    shift: Window = (0, 0),
    scale: float | None = None,
) -> Values:
    """Return the outputs of both passes, for any size of map without padding. Weights are at least float32.

    Args:
        log_decay: log decay L; None for no decay.
        slopes: slopes m; None for none.
        activation: "softmax" or "sigmoid".
        decay: "additive", in the logits, or "multiplicative", after the activation.
        window: rows and columns; None for one window as large as the map.
        shift: row and column where the first whole window starts.
        scale: scale of the logits; None for head_dim ** -0.5.
    Raises:
        ValueError: if shapes do not fit together, or an option is not one of the above.
    """
    _check_maps(q, k, v)
    window = (q.shape[1], q.shape[2]) if window is None else window
    _check_options(activation, decay, window, shift)
    _check_heads(q.shape[3], log_decay, slopes)
    slope, log_factor = _combine(log_decay, slopes, decay)
    attend = partial(
        _attend,
        slope=slope,
        log_factor=log_factor,
        activation=activation,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )
    for axis in (2, 1):
        lengths, extents = zip(*_runs(q.shape[axis], window[axis - 1], shift[axis - 1]), strict=True)
        # Slices would each have a gradient as large as the map.
        parts = zip(*(x.split(lengths, dim=axis) for x in (q, k, v)), strict=True)
        pieces = [attend(*part, axis=axis, extent=extent) for part, extent in zip(parts, extents, strict=True)]
        v = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=axis)
    return v


def manhattan_attention(
    q: Keys, k: Keys, v: Values, log_decay: PerHead | None = None, *, scale: float | None = None
) -> Values:
    """Attend over a whole map at once, with L times the Manhattan distance in the logits: RMT's full form.

    Raises:
        ValueError: if shapes do not fit together.
    """
    _check_maps(q, k, v)
    _check_heads(q.shape[3], log_decay, None)
    table = None
    if log_decay is not None:
        rows, columns = (_offsets(length, log_decay) for length in q.shape[1:3])
        table = log_decay[:, None, None] * (rows[:, None] + columns)
    return window_attention(q, k, v, table=table, scale=scale)


def head_log_decay(num_heads: int, init: float, spread: float, device: torch.device | None = None) -> PerHead:
    """Return L_h = ln(1 - 2^(-init - spread h / H)) for h = 0 .. H - 1 in float32, from near- to far-sighted heads.

    Source: RMT, section 3.1, as in its published code.

    Raises:
        ValueError: if a decay would not be in (0, 1).
    """
    if init <= 0 or init + spread * (num_heads - 1) / num_heads <= 0:
        raise ValueError(f"decay needs a positive init, and init + spread too, not {init} and {spread}")
    heads = torch.arange(num_heads, dtype=torch.float32, device=device)
    return torch.log1p(-torch.exp2(-init - spread / num_heads * heads))


def balanced_slopes(num_heads: int, device: torch.device | None = None) -> PerHead:
    """Return slopes of both signs in float32: -2^(-8 i / n) for the first half of the heads, positive for the other.

    i counts from 1 to n, the number of heads in a half; with an odd number, the extra head is negative. Half of the
    heads favor near positions and half far ones. Source: SWAT, "balanced ALiBi"; the exponents are those of Press et
    al. 2021, arXiv:2108.12409.
    """
    halves = [
        sign * torch.exp2(torch.arange(1, count + 1, dtype=torch.float32, device=device) * (-8 / max(count, 1)))
        for sign, count in ((-1, math.ceil(num_heads / 2)), (1, num_heads // 2))
    ]
    return torch.cat(halves)


def adaptive_window(length: int, base: int | None) -> int:
    """Return the window along an axis: `base`, or the whole axis if shorter than two of them or `base` is None."""
    return length if base is None or length < 2 * base else base


def _runs(length: int, window: int, shift: int) -> list[tuple[int, int]]:
    """Split an axis into runs of whole windows of equal extent, as pairs of length and extent."""
    shift = min(shift, length)
    rest = (length - shift) % window
    return [run for run in ((shift, shift), (length - shift - rest, window), (rest, rest)) if run[0]]


def _offsets(length: int, like: Tensor) -> Tensor:
    """Return |i - j| for j - i from 1 - length to length - 1."""
    return torch.arange(1 - length, length, device=like.device).abs().to(like.dtype)


def _distances(length: int, like: Tensor) -> Tensor:
    """Return |i - j| for all pairs."""
    places = torch.arange(length, device=like.device)
    return (places[:, None] - places).abs().to(like.dtype)


def _combine(log_decay: Tensor | None, slopes: Tensor | None, decay: Decay) -> tuple[Tensor | None, Tensor | None]:
    """Return the factors of the distance in the logits, and in the logarithm of a factor after the activation."""
    if decay == "multiplicative" or log_decay is None:
        return slopes, log_decay
    return log_decay if slopes is None else log_decay + slopes, None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    axis: int,
    extent: int,
    slope: Tensor | None,
    log_factor: Tensor | None,
    activation: Activation,
    scale: float,
) -> Tensor:
    """Attend along an axis that consists of whole windows of this extent."""
    if activation == "softmax" and log_factor is None and (extent > _SMALL or q.device.type != "cpu"):
        table = None if slope is None else (slope[:, None] * _offsets(extent, slope)).unsqueeze(3 - axis)
        return window_attention(q, k, v, table=table, window=(extent, 1) if axis == 1 else (1, extent), scale=scale)
    query, key, value = (_group(x, axis, extent) for x in (q, k, v))
    with without_autocast(q):
        wide = torch.promote_types(query.dtype, torch.float32)
        logits = scale * (query.to(wide) @ key.to(wide).mT)
        if slope is not None:
            logits = logits + (slope[:, None, None] * _distances(extent, slope)).to(wide)
        weights = logits.softmax(dim=-1) if activation == "softmax" else logits.sigmoid()
        if log_factor is not None:
            weights = weights * (log_factor[:, None, None] * _distances(extent, log_factor)).exp().to(wide)
        y = weights.to(value.dtype) @ value
    return y.movedim(-2, axis + 1).flatten(axis, axis + 1)


def _group(x: Tensor, axis: int, extent: int) -> Tensor:
    """Split an axis of a map into windows: (batch, ..., heads, extent, dim)."""
    return x.unflatten(axis, (x.shape[axis] // extent, extent)).movedim(axis + 1, -2).contiguous()


def decayed_window_attention_reference(
    q: Keys,
    k: Keys,
    v: Values,
    log_decay: PerHead | None = None,
    slopes: PerHead | None = None,
    *,
    activation: Activation = "softmax",
    decay: Decay = "additive",
    window: Window | None = None,
    shift: Window = (0, 0),
    scale: float | None = None,
) -> Values:
    """Compute the definition with padding, a cyclic shift and masks, window by window."""
    height, width, heads, dim = q.shape[1:]
    rows, columns = (height, width) if window is None else window
    scale = dim**-0.5 if scale is None else scale
    zero = q.new_zeros(heads)
    log_decay, slopes = (zero if x is None else x for x in (log_decay, slopes))
    added = (0, 0, 0, 0, 0, -width % columns, 0, -height % rows)
    q, k, v = (F.pad(x, added).roll((-shift[0], -shift[1]), dims=(1, 2)) for x in (q, k, v))
    masks = [window_mask_reference(*one) for one in ((height, rows, shift[0]), (width, columns, shift[1]))]

    def weights(query: Tensor, key: Tensor, allowed: Tensor) -> Tensor:
        """Map (lines, w, heads, dim) to (lines, heads, w, w)."""
        distance = _distances(query.shape[1], query)
        logits = scale * torch.einsum("nihd,njhd->nhij", query, key) + slopes[:, None, None] * distance
        faded = log_decay[:, None, None] * distance
        logits = logits + faded if decay == "additive" else logits
        factor = faded.exp() if decay == "multiplicative" else torch.ones_like(faded)
        if activation == "softmax":
            return logits.masked_fill(~allowed, -torch.inf).softmax(dim=-1) * factor
        return logits.sigmoid() * factor * allowed

    y = torch.zeros_like(v)
    for down, across in product(range(q.shape[1] // rows), range(q.shape[2] // columns)):
        here = (slice(None), slice(down * rows, (down + 1) * rows), slice(across * columns, (across + 1) * columns))
        query, key, value = (x[here] for x in (q, k, v))
        across_row = weights(query.flatten(0, 1), key.flatten(0, 1), masks[1][across].to(q.device))
        value = torch.einsum("nhij,njhd->nihd", across_row, value.flatten(0, 1)).unflatten(0, (-1, rows))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        along_column = weights(query.flatten(0, 1), key.flatten(0, 1), masks[0][down].to(q.device))
        value = torch.einsum("nhij,njhd->nihd", along_column, value.flatten(0, 1)).unflatten(0, (-1, columns))
        y[here] = value.transpose(1, 2)
    return y.roll(shift, dims=(1, 2))[:, :height, :width]


def window_mask_reference(length: int, window: int, shift: int) -> Bool[Tensor, "windows queries keys"]:
    """Return which pairs in the windows of a padded and rolled axis may attend to each other.

    These are pairs that were neighbors before rolling, with keys only on the map. Any position may attend to itself, so
    that no row is empty.
    """
    padded = math.ceil(length / window) * window
    rolled = torch.arange(padded)
    regions = (rolled >= padded - window).long() + (rolled >= padded - shift).long() if shift else 0 * rolled
    on_map = ((rolled + shift) % padded < length).reshape(-1, 1, window)
    regions = regions.reshape(-1, window)
    together = regions[:, :, None] == regions[:, None, :]
    return together & on_map | torch.eye(window, dtype=torch.bool)


def _check_maps(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 5 or k.shape != q.shape or v.ndim != 5 or v.shape[:4] != q.shape[:4]:
        raise ValueError(
            "q and k must be (batch, height, width, heads, head_dim), and v the same but for its last axis, not "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )


def _check_options(activation: str, decay: str, window: Window, shift: Window) -> None:
    for name, value, known in (("activation", activation, ACTIVATIONS), ("decay", decay, DECAYS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    if min(window) < 1:
        raise ValueError(f"a window must have at least one row and one column, not {window[0]}x{window[1]}")
    if not all(0 <= start < extent for start, extent in zip(shift, window, strict=True)):
        raise ValueError(f"a shift must be from 0 to below the window {window[0]}x{window[1]}, not {shift}")


def _check_heads(heads: int, log_decay: Tensor | None, slopes: Tensor | None) -> None:
    for name, values in (("log_decay", log_decay), ("slopes", slopes)):
        if values is not None and tuple(values.shape) != (heads,):
            raise ValueError(f"{name} must have one entry per head, ({heads},), not shape {tuple(values.shape)}")
