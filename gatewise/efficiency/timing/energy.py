"""Energy used by a processor, where its counters can be read.

Linux reports the energy that a CPU package has used in `/sys/class/powercap` (Intel's RAPL; AMD's counters appear under
the same name), readable only by root on most systems. NVIDIA's driver reports a GPU's energy through NVML. Both include
everything else that the processor does, so a figure is valid only on an otherwise idle machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

POWERCAP = Path("/sys/class/powercap")

Counter = Callable[[], float]
"""Return joules since an arbitrary moment; `Rapl` handles counters that wrap around."""


@dataclass
class Rapl:
    """The sum over a CPU's packages. Counters wrap at their largest value, at most once between two reads."""

    zones: tuple[Path, ...]

    def __post_init__(self) -> None:
        self._last = [self._read(zone) for zone in self.zones]
        self._joules = 0.0

    def __call__(self) -> float:
        for index, zone in enumerate(self.zones):
            now = self._read(zone)
            step = now - self._last[index]
            if step < 0:
                step += float((zone / "max_energy_range_uj").read_text(encoding="ascii"))
            self._joules += step / 1e6
            self._last[index] = now
        return self._joules

    @staticmethod
    def _read(zone: Path) -> float:
        return float((zone / "energy_uj").read_text(encoding="ascii"))


def energy_counter(device: torch.device, powercap: Path = POWERCAP) -> Counter | None:
    """Return the energy counter of a device, or None if there is none that may be read."""
    return _nvml(device) if device.type == "cuda" else _rapl(powercap)


def joules_per_call(
    candidate: Callable[[Tensor], object], example: Tensor, counter: Counter, seconds: float = 1.0
) -> float:
    """Return the energy of one call, averaged over `seconds` of calls: counters update every millisecond or slower."""
    candidate(example)
    start, deadline, calls = counter(), time.monotonic() + seconds, 0
    while calls == 0 or time.monotonic() < deadline:
        candidate(example)
        calls += 1
    if example.device.type == "cuda":
        torch.cuda.synchronize(example.device)
    return (counter() - start) / calls


def _rapl(powercap: Path) -> Counter | None:
    # Packages are intel-rapl:0, intel-rapl:1; their components have a second number.
    zones = tuple(sorted(zone for zone in powercap.glob("intel-rapl:*") if zone.name.count(":") == 1))
    if not zones:
        return None
    try:
        return Rapl(zones)
    except PermissionError:
        return None


def _nvml(device: torch.device) -> Counter | None:
    if find_spec("pynvml") is None:
        return None
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
    try:
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError_NotSupported:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
