"""What this machine is called, and settings of it that a measurement makes for itself."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def processor_name() -> str:
    """The CPU's model, as Linux knows it, or what Python can tell."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """So many threads of the CPU within the block; for 0 as many as before."""
    before = torch.get_num_threads()
    try:
        if number:
            torch.set_num_threads(number)
        yield
    finally:
        torch.set_num_threads(before)


def synchronize(where: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)
