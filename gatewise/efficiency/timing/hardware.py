"""The name of this machine's processor, and settings that a measurement changes temporarily."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def processor_name() -> str:
    """Return the CPU's model as Linux reports it, or else what Python can tell."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Use this number of CPU threads within the block; 0 keeps the current number."""
    before = torch.get_num_threads()
    try:
        if number:
            torch.set_num_threads(number)
        yield
    finally:
        torch.set_num_threads(before)


def synchronize(where: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)
