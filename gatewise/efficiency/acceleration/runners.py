"""Runners: functions from a float32 batch of any size to a float32 output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Runner = Callable[[Tensor], Tensor]

PIECE = 4
"""Images per chunk when a larger batch is split. Beyond it the activations of usual networks leave the caches, and
buffers outgrow the size up to which the C library reuses memory without asking the system for fresh pages."""


class NotApplicableError(Exception):
    """The plan does not apply to this network, device or batch; the message says why."""


def in_pieces(run: Runner, size: int) -> Runner:
    """Extend a runner for batches of `size` to any batch, in chunks of which the last is padded with copies."""

    def run_any(x: Tensor) -> Tensor:
        if x.shape[0] == size:
            return run(x)
        outputs = []
        for piece in x.split(size):
            missing = size - piece.shape[0]
            filled = torch.cat([piece, piece[-1:].expand(missing, *piece.shape[1:])]) if missing else piece
            outputs.append(run(filled)[: piece.shape[0]])
        return torch.cat(outputs)

    return run_any
