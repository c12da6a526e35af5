"""Precision that autocast must not change."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(like: Tensor) -> AbstractContextManager:
    """Within the block, operators compute in the dtypes that they are given; on the device of `like`."""
    # There is no autocast without storage, and asking for it there is an error.
    if like.device.type == "meta":
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)
