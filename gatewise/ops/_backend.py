"""Selection of an operator's implementation."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def suits_triton(x: Tensor) -> bool:
    """Return whether the Triton kernels support this tensor: they need CUDA and do not support float64."""
    return x.device.type == "cuda" and x.dtype != torch.float64 and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
