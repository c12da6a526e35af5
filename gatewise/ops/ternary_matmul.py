"""A linear layer whose weights are stored in two bits each.

    y = scale * x Q^T,   Q: (out, in) of -1, 0 and 1

Storage: the rows are split into four equal blocks (padded with zero rows). The byte (r, c) of a (ceil(out / 4), in)
array holds Q + 1 of row r of block i in bits 2i and 2i + 1. This is the packing used by transformers' BitNet
integration.

Weight traffic is a sixteenth of that in float32. Generation, which reads every weight for every token, is bound by it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

BLOCKS = 4
ROWS_AT_A_TIME = 1024
"""Rows of a block that are unpacked together; with more, the unpacked weights leave the caches."""


def pack_ternary(codes: Float[Tensor, "out in"]) -> UInt8[Tensor, "packed in"]:
    """Pack codes -1, 0 and 1 in two bits each.

    Raises:
        ValueError: if there is any other code.
    """
    if not ((codes == -1) | (codes == 0) | (codes == 1)).all():
        raise ValueError("ternary codes are -1, 0 and 1; quantize the weights first")
    rows = -(-codes.shape[0] // BLOCKS)
    filled = codes.new_zeros(BLOCKS * rows, codes.shape[1])
    filled[: codes.shape[0]] = codes
    blocks = (filled + 1).to(torch.uint8).view(BLOCKS, rows, -1)
    return blocks[0] | blocks[1] << 2 | blocks[2] << 4 | blocks[3] << 6


def unpack_ternary(packed: UInt8[Tensor, "packed in"], out: int) -> Float[Tensor, "out in"]:
    """Return the codes of a packed matrix with `out` rows, in float32."""
    return torch.cat([_codes(packed, block, torch.float32) for block in range(BLOCKS)])[:out]


def ternary_matmul(
    x: Float[Tensor, "*batch in"], packed: UInt8[Tensor, "packed in"], scale: Float[Tensor, ""], out: int
) -> Float[Tensor, "*batch out"]:
    """Return scale * x Q^T in the dtype of `x`, unpacking the codes of a few rows at a time.

    Raises:
        ValueError: if the width of `x` differs from that of the weights, or `out` does not match the packed rows.
    """
    if x.shape[-1] != packed.shape[1]:
        raise ValueError(f"the packed weights take {packed.shape[1]} channels, not {x.shape[-1]}")
    if -(-out // BLOCKS) != packed.shape[0]:
        raise ValueError(f"{packed.shape[0]} packed rows hold up to {BLOCKS * packed.shape[0]} outputs, not {out}")
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_empty(rows.shape[0], BLOCKS * packed.shape[0])
    for block in range(BLOCKS):
        for start in range(0, packed.shape[0], ROWS_AT_A_TIME):
            part = packed[start : start + ROWS_AT_A_TIME]
            first = block * packed.shape[0] + start
            y[:, first : first + part.shape[0]] = rows @ _codes(part, block, x.dtype).T
    return (y[:, :out] * scale.to(x.dtype)).reshape(*x.shape[:-1], out)


def ternary_matmul_int8(
    x: Float[Tensor, "*batch in"],
    x_scale: Float[Tensor, "*batch 1"],
    packed: UInt8[Tensor, "packed in"],
    scale: Float[Tensor, ""],
    out: int,
) -> Float[Tensor, "*batch out"]:
    """Like `ternary_matmul`, for integer activation codes with a scale per token. Products and sums are integers.

    Args:
        x: codes from -128 to 127, as `quantize` returns them.
    """
    rows = x.reshape(-1, x.shape[-1]).to(torch.int8)
    parts = [torch._int_mm(rows, _codes(packed, block, torch.int8).T) for block in range(BLOCKS)]
    y = torch.cat(parts, dim=1)[:, :out].to(x.dtype).reshape(*x.shape[:-1], out)
    return y * (x_scale * scale)


def _codes(packed: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    return ((packed >> (2 * block)) & 3).to(dtype) - 1
