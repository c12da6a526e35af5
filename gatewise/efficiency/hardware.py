"""What this machine is called."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """The CPU's model, as Linux knows it, or what Python can tell."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
