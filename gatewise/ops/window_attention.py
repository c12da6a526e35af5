"""Attention within the windows of a map, with an additive bias that depends on relative position.

A map is split into non-overlapping windows of h x w positions; positions of a window attend to each other, per head:

    y_i = sum_j softmax_j(scale q_i . k_j + R_ij) v_j
    R_(a,b),(a',b') = table[a' - a + h - 1, b' - b + w - 1]              key minus query; table: (2h - 1) x (2w - 1)

One window as large as the map is global attention; windows of a single row or column are axis attention. With `pad`, a
map of any size is treated as if it were padded at the bottom and right to whole windows, with the padded keys masked.
This is computed with smaller windows at the end.

Source: Yang et al. 2022, arXiv:2210.01820 (MOAT), section 3, with the bias of Liu et al. 2021, arXiv:2103.14030 (Swin),
section 3.2.
"""

from __future__ import annotations

from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Window = tuple[int, int]
"""Rows and columns."""

Keys = Float[Tensor, "batch height width heads head_dim"]
Values = Float[Tensor, "batch height width heads value_dim"]
Bias = Float[Tensor, "heads tokens tokens"]
Table = Float[Tensor, "heads rows columns"]

# Largest number of bias entries that is formed at once; larger biases are formed for a few query rows at a time. On a
# CPU they then stay in the cache; elsewhere, and for compilers, which unroll the loop, only memory matters.
_LARGEST_BIAS_ON_CPU = 2**20
_LARGEST_BIAS = 2**25


def window_attention(
    q: Keys,
    k: Keys,
    v: Values,
    bias: Bias | None = None,
    *,
    table: Table | None = None,
    window: Window | None = None,
    scale: float | None = None,
    pad: bool = False,
) -> Values:
    """Return the outputs of attention within windows. The softmax is computed at least in float32.

    Args:
        bias: bias added to the logits, queries first; positions of a window count row by row.
        table: bias by offset (R above), instead of `bias`. Large windows then need less memory, since their bias is
            never formed as a whole.
        window: rows and columns; None for one window as large as the map.
        scale: scale of the logits; None for head_dim ** -0.5.
        pad: accept maps that are not multiples of the window.
    Raises:
        ValueError: if shapes do not fit together, both a bias and a table are given, or the map cannot be cut.
    """
    size = (q.shape[1], q.shape[2]) if q.ndim == 5 else (0, 0)
    window = size if window is None else window
    _check_maps(q, k, v)
    _check_window(size, window, pad)
    _check_bias(bias, table, window, q.shape[3])
    stripes = []
    for top, bottom, rows in _spans(size[0], window[0]):
        pieces = []
        for left, right, columns in _spans(size[1], window[1]):
            query, key, value = (x[:, top:bottom, left:right] for x in (q, k, v))
            cut_bias = None if bias is None else _crop_bias(bias, window, (rows, columns))
            cut_table = None if table is None else _crop_table(table, window, (rows, columns))
            pieces.append(_attend(query, key, value, cut_bias, cut_table, (rows, columns), scale))
        stripes.append(_join(pieces, dim=2))
    return _join(stripes, dim=1)


def window_attention_reference(
    q: Keys,
    k: Keys,
    v: Values,
    bias: Bias | None = None,
    *,
    table: Table | None = None,
    window: Window | None = None,
    scale: float | None = None,
    pad: bool = False,
) -> Values:
    """Compute the definition, window by window, with zeros around the map and masked keys where it is padded."""
    height, width = q.shape[1:3]
    rows, columns = (height, width) if window is None else window
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    added = (0, 0, 0, 0, 0, -width % columns, 0, -height % rows) if pad else (0,) * 8
    q, k, v = (F.pad(x, added) for x in (q, k, v))
    outside = F.pad(torch.zeros(1, height, width, 1, 1), added, value=1.0).bool().to(q.device)
    if table is not None:
        bias = relative_position_bias_reference(table, (rows, columns))
    y = torch.zeros_like(v)
    for top, left in product(range(0, q.shape[1], rows), range(0, q.shape[2], columns)):
        here = (slice(None), slice(top, top + rows), slice(left, left + columns))
        query, key, value, masked = (x[here].flatten(1, 2) for x in (q, k, v, outside))
        logits = scale * torch.einsum("bihd,bjhd->bhij", query, key)
        logits = logits if bias is None else logits + bias
        weights = logits.masked_fill(masked[:, None, None, :, 0, 0], -torch.inf).softmax(dim=-1)
        y[here] = torch.einsum("bhij,bjhd->bihd", weights, value).unflatten(1, (rows, columns))
    return y[:, :height, :width]


def relative_position_bias(table: Table, window: Window) -> Float[Tensor, "heads tokens tokens"]:
    """Expand a table (heads, 2h - 1, 2w - 1) to R of a window: (heads, queries, keys), positions row by row."""
    # The biases of the query at (a, b) are the h x w part of the table from (h - 1 - a, w - 1 - b) on. The parts in the
    # table's order are therefore those of the queries from the last to the first.
    return _parts(table, window).flip(1, 2).flatten(3, 4).flatten(1, 2)


def _parts(table: Tensor, window: Window) -> Tensor:
    """Return a view of all parts of a table that have a window's size: (heads, down, across, rows, columns)."""
    return table.unfold(1, window[0], 1).unfold(2, window[1], 1)


def relative_position_bias_reference(table: Table, window: Window) -> Bias:
    """Compute the definition, entry by entry."""
    height, width = window
    positions = list(product(range(height), range(width)))
    entries = [
        table[:, key_row - row + height - 1, key_column - column + width - 1]
        for row, column in positions
        for key_row, key_column in positions
    ]
    return torch.stack(entries, dim=1).unflatten(1, (len(positions), len(positions)))


def resize_table(table: Table, window: Window) -> Float[Tensor, "heads _ _"]:
    """Resize a table of relative positions to another window: bilinear, half-pixel centers, no antialiasing.

    A table that fits is returned unchanged; half precision is resized in float32.
    """
    rows, columns = (2 * length - 1 for length in window)
    if tuple(table.shape[1:]) == (rows, columns):
        return table
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    return F.interpolate(wide[None], (rows, columns), mode="bilinear", align_corners=False)[0]


def fit_window(window: Window | None, height: int, width: int) -> Window:
    """Return the window for a map of this size: clipped to the map, or the whole map if `window` is None."""
    return (height, width) if window is None else (min(window[0], height), min(window[1], width))


def partition(
    x: Float[Tensor, "batch height width *features"], window: Window
) -> Float[Tensor, "windows tokens *features"]:
    """Split a map that is a multiple of the window into windows, sample by sample and row by row."""
    batch, height, width, *features = x.shape
    rows, columns = window
    x = x.reshape(batch, height // rows, rows, width // columns, columns, *features).transpose(2, 3)
    return x.reshape(batch * (height // rows) * (width // columns), rows * columns, *features)


def merge(
    windows: Float[Tensor, "windows tokens *features"], window: Window, height: int, width: int
) -> Float[Tensor, "batch height width *features"]:
    """Join windows to a map of this size: the inverse of `partition`."""
    down, across = height // window[0], width // window[1]
    batch, features = windows.shape[0] // (down * across), windows.shape[2:]
    x = windows.reshape(batch, down, across, *window, *features).transpose(2, 3)
    return x.reshape(batch, height, width, *features)


def _spans(length: int, window: int) -> list[tuple[int, int, int]]:
    """Return start, end and window length of the part covered by whole windows, and of the rest if there is any."""
    whole = length // window * window
    spans = [(0, whole, window), (whole, length, length - whole)]
    return [(start, end, extent) for start, end, extent in spans if end > start]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, table: Tensor | None, window: Window, scale: float | None
) -> Tensor:
    """Attend within the windows of a map that is a multiple of them."""
    height, width = q.shape[1:3]
    query, key, value = (partition(x, window).transpose(1, 2) for x in (q, k, v))
    if table is not None and table.shape[0] * prod(window) ** 2 > _largest_bias(q):
        y = _attend_by_rows(query, key, value, table.to(q.dtype), window, scale)
    else:
        bias = bias if table is None else relative_position_bias(table.to(q.dtype), window)
        y = _softmax_attention(query, key, value, bias, scale)
    return merge(y.transpose(1, 2), window, height, width)


def _largest_bias(q: Tensor) -> int:
    return _LARGEST_BIAS_ON_CPU if q.device.type == "cpu" and not torch.compiler.is_compiling() else _LARGEST_BIAS


def _attend_by_rows(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, window: Window, scale: float | None
) -> Tensor:
    """Attend with a few query rows of all windows at a time.

    Keys are taken from the last to the first, which does not affect a softmax. Parts of the table, read backwards, are
    then those of the queries in order, and are copied row by row.
    """
    height, width = window
    step = max(1, _largest_bias(query) // (table.shape[0] * width * height * width))
    key, value, table = key.flip(2), value.flip(2), table.flip(1, 2)
    pieces = []
    for first in range(0, height, step):
        last = min(first + step, height)
        bias = _parts(table[:, first : last + height - 1], window).flatten(3, 4).flatten(1, 2)
        pieces.append(_softmax_attention(query[:, :, first * width : last * width], key, value, bias, scale))
    return _join(pieces, dim=2)


def _softmax_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """Attend with tensors of shape (windows, heads, tokens, dim)."""
    mask = None if bias is None else bias.to(query.dtype)[None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _crop_table(table: Tensor, window: Window, smaller: Window) -> Tensor:
    """Return the table of a window's upper left part: the offsets that occur in it."""
    (height, width), (rows, columns) = window, smaller
    return table[:, height - rows : height + rows - 1, width - columns : width + columns - 1]


def _crop_bias(bias: Tensor, window: Window, smaller: Window) -> Tensor:
    """Return the bias of a window's upper left part."""
    if smaller == window:
        return bias
    rows, columns = smaller
    by_position = bias.unflatten(2, window).unflatten(1, window)[:, :rows, :columns, :rows, :columns]
    return by_position.flatten(3, 4).flatten(1, 2)


def _join(pieces: list[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)


def _check_maps(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 5 or k.shape != q.shape or v.ndim != 5 or v.shape[:4] != q.shape[:4]:
        raise ValueError(
            "q and k must be (batch, height, width, heads, head_dim), and v the same but for its last axis, not "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )


def _check_window(size: Window, window: Window, pad: bool) -> None:
    if min(window) < 1:
        raise ValueError(f"a window must have at least one row and one column, not {window[0]}x{window[1]}")
    if not pad and any(length % extent for length, extent in zip(size, window, strict=True)):
        raise ValueError(
            f"map {size[0]}x{size[1]} is not divisible by window {window[0]}x{window[1]}; pad the map or pass pad=True"
        )


def _check_bias(bias: Tensor | None, table: Tensor | None, window: Window, heads: int) -> None:
    if bias is not None and table is not None:
        raise ValueError("logits take a bias or a table of relative positions, not both")
    tokens = window[0] * window[1]
    if bias is not None and tuple(bias.shape) != (heads, tokens, tokens):
        raise ValueError(
            f"the bias must be (heads, tokens, tokens), {(heads, tokens, tokens)} for windows of "
            f"{window[0]}x{window[1]}, not {tuple(bias.shape)}"
        )
    offsets = (heads, 2 * window[0] - 1, 2 * window[1] - 1)
    if table is not None and tuple(table.shape) != offsets:
        raise ValueError(
            f"the table must be (heads, 2h - 1, 2w - 1), {offsets} for windows of {window[0]}x{window[1]}, not "
            f"{tuple(table.shape)}"
        )
