"""Measured limits of a processor: arithmetic with large matrix products, memory traffic with large copies.

    ridge = peak / bandwidth     operations per byte above which a kernel is bound by arithmetic, not by memory

The peak depends on the data type, the accumulation and the number of threads; for CPUs no table lists it. Measuring
takes a few seconds, and the result is cached for the user until a refresh is requested.

Source: Lavin 2024, arXiv:2404.03617.
"""

from __future__ import annotations

import os
import re
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from gatewise.efficiency._fields import read_fields
from gatewise.efficiency.cost.operators import DTYPES, dtype_name
from gatewise.efficiency.timing.hardware import processor_name, synchronize, torch_threads
from gatewise.errors import Failure
from gatewise.files import read_json, write_json

SMALLEST_COPY, LARGEST_COPY = 2**26, 2**29
"""Smallest and largest size in bytes of an array in the bandwidth test, which has four times the largest cache."""

SECONDS = 0.4
"""About twice the time of the repeats of one kind of measurement; there are up to six kinds."""

FEWEST, MOST = 5, 25
"""Repeats per kind of measurement."""

NOISY = 0.5
"""Spread of the repeats above which a warning is issued."""

SMALLEST = 256
LARGEST = {"cpu": 4096, "cuda": 16384}
"""Smallest and largest number of rows of the matrices that are multiplied."""

PEAK_DTYPES = {
    # PyTorch multiplies float16 on CPUs too, but only with a routine too slow for anyone to use.
    "cpu": ("float32", "bfloat16", "int8"),
    "cuda": ("float32", "bfloat16", "float16", "int8"),
}


@dataclass(frozen=True)
class Device:
    """Limits of a processor. Measured by `device`, or given manually for another one: `Device(name, peaks, bandwidth)`.

    Attributes:
        peaks: operations per second by data type ("float32", "bfloat16", ...); a multiply-accumulate counts as two.
        bandwidth: bytes per second between memory and processor, reads and writes together.
        in_place_bandwidth: bandwidth of in-place work; 0 if unknown. Most processors read lines from memory before they
            write them, which is not counted. In-place work has read them anyway, so more of the traffic counts.
        noise: largest ratio of interquartile range to median among the repeats, a measure of how busy the machine was.
        threads: number of CPU threads; 0 where it does not matter.
        measured_at: time of the measurement; empty for limits given manually.
    """

    name: str
    peaks: Mapping[str, float]
    bandwidth: float
    noise: float = 0.0
    threads: int = 0
    torch_version: str = ""
    measured_at: str = ""
    in_place_bandwidth: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "peaks", {dtype_name(dtype): float(peak) for dtype, peak in self.peaks.items()})
        if not self.peaks:
            raise ValueError(f"the device {self.name!r} needs a peak for at least one kind of numbers")
        for what, value in (*self.peaks.items(), ("bandwidth", self.bandwidth)):
            if not 0 < value < float("inf"):
                raise ValueError(f"the {what} of the device {self.name!r} must be positive and finite, not {value}")
        for what, value in (("noise", self.noise), ("in_place_bandwidth", self.in_place_bandwidth)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"the {what} of the device {self.name!r} must be 0 or more, not {value}")

    def peak(self, dtype: str | torch.dtype) -> float:
        """Return the peak in operations per second.

        Raises:
            ValueError: if the peak for this data type is not known.
        """
        name = dtype_name(dtype)
        if name not in self.peaks:
            raise ValueError(f"the peak of {self.name} for {name} is not known, only for {', '.join(self.peaks)}")
        return self.peaks[name]

    def ridge(self, dtype: str | torch.dtype) -> float:
        """Return the operations per byte at which arithmetic and memory traffic take equally long."""
        return self.peak(dtype) / self.bandwidth

    def __str__(self) -> str:
        peaks = ", ".join(f"{name} {peak / 1e9:,.1f} GFLOP/s (ridge {self.ridge(name):.1f})"
                          for name, peak in self.peaks.items())  # fmt: skip
        threads = f", {self.threads} threads" if self.threads else ""
        noise = f"; repeats spread by {self.noise:.0%}" if self.measured_at else ""
        return f"{self.name}{threads}: {peaks}; {self.bandwidth / 1e9:,.1f} GB/s{noise}"


def device(device: str | torch.device | None = None, *, threads: int | None = None, refresh: bool = False) -> Device:
    """Return the limits of a processor of this machine, measured once and cached for the user.

    The cache, `$XDG_CACHE_HOME/gatewise` or `~/.cache/gatewise`, is keyed by hardware name, number of threads and
    PyTorch version. Data types that PyTorch cannot multiply on the device are left out. A warning is issued if the
    machine was too busy to be measured well.

    Args:
        device: a CPU or CUDA device; the CPU by default.
        threads: number of CPU threads; PyTorch's current number by default.
        refresh: measure again.
    Raises:
        ValueError: if the device does not exist or is of another kind, or `threads` is not positive.
    """
    where = _present(device)
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be 1 or more, not {threads}")
    count = (threads or torch.get_num_threads()) if where.type == "cpu" else 0
    name = _hardware(where)
    path = _cache_path(name, count)
    if not refresh and (known := _load(path)) is not None:
        return known
    found = _measure(where, name, count)
    if found.noise > NOISY:
        message = f"the machine was busy: repeats were apart by {found.noise:.0%}; measure again with refresh=True"
        warnings.warn(message, stacklevel=2)
    _store(found, path)
    return found


def _present(device: str | torch.device | None) -> torch.device:
    try:
        where = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise ValueError(f"there is no device {device!r}: {str(error).splitlines()[0]}") from error
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"limits are measured on cpu and cuda devices, not on {where}; create a Device manually")
    if where.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"the device {where} is not there: PyTorch finds no CUDA device")
        index = torch.cuda.current_device() if where.index is None else where.index
        if index >= torch.cuda.device_count():
            raise ValueError(f"the device {where} is not there: PyTorch finds {torch.cuda.device_count()}")
        return torch.device("cuda", index)
    return where


def _hardware(where: torch.device) -> str:
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    return f"{processor_name()} ({torch.backends.cpu.get_cpu_capability()})"


def _measure(where: torch.device, name: str, threads: int) -> Device:
    with torch_threads(threads), torch.no_grad():
        rates = {dtype: _matrix_rate(where, dtype) for dtype in PEAK_DTYPES[where.type]}
        bandwidth, in_place, spread = _memory_rate(where)
    known = {dtype: rate for dtype, rate in rates.items() if rate is not None}
    return Device(
        name=name,
        peaks={dtype: peak for dtype, (peak, _) in known.items()},
        bandwidth=bandwidth,
        noise=max(spread, *(noise for _, noise in known.values())),
        threads=threads,
        torch_version=torch.__version__,
        measured_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        in_place_bandwidth=in_place,
    )


def _matrix_rate(where: torch.device, dtype: str) -> tuple[float, float] | None:
    """Return the best operations per second, and the spread; None if PyTorch has no such product."""
    size = SMALLEST
    try:
        while size < LARGEST[where.type] and _time(_products(where, dtype, size)[0], where) < SECONDS / 20:
            # Larger matrices come closer to the peak, but short samples are more likely to run undisturbed.
            size *= 2
        runs = [_repeat(multiply, where) for multiply in _products(where, dtype, size)]
    except RuntimeError:
        # This is how PyTorch reports that it has no product of this data type on this device.
        return None
    best = min(runs, key=min)
    return 2 * size**3 / min(best), _spread(best)


def _products(where: torch.device, dtype: str, size: int) -> list[Callable[[], Tensor]]:
    """Return products of two square matrices, by all libraries that PyTorch has for them."""
    if dtype == "int8":
        a, b = (torch.randint(-8, 8, (size, size), dtype=torch.int8, device=where) for _ in range(2))
        return [lambda: torch._int_mm(a, b)]
    a, b = (torch.randn(size, size, device=where).to(DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(a)
    # A pointwise convolution is the same product from another library, which is faster on some processors.
    maps = a.T.reshape(1, size, size // 16, 16).contiguous(memory_format=torch.channels_last)
    kernels = b[:, :, None, None].contiguous(memory_format=torch.channels_last)
    return [lambda: torch.mm(a, b, out=out), lambda: torch.conv2d(maps, kernels)]


def _memory_rate(where: torch.device) -> tuple[float, float, float]:
    """Return the best bytes per second of a copy (read, write) or triad (read, read, write), the best of an in-place
    scaling (read, write), and the spread."""
    elements = min(max(4 * largest_cache(where), SMALLEST_COPY), LARGEST_COPY) // 4
    a, b, c = (torch.ones(elements, device=where) for _ in range(3))
    copy = _repeat(lambda: a.copy_(b), where)
    triad = _repeat(lambda: torch.add(b, c, alpha=0.5, out=a), where)
    in_place = _repeat(lambda: a.mul_(1.0), where)
    best = max(2 * a.nbytes / min(copy), 3 * a.nbytes / min(triad))
    return best, 2 * a.nbytes / min(in_place), max(_spread(copy), _spread(triad), _spread(in_place))


def largest_cache(where: torch.device) -> int:
    """Return the size of the last-level cache in bytes; 0 if the system does not report it."""
    if where.type == "cuda":
        return torch.cuda.get_device_properties(where).L2_cache_size
    sizes = [
        path.read_text(encoding="ascii").strip()
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=0)


def _repeat(call: Callable[[], object], where: torch.device) -> list[float]:
    _time(call, where)
    times: list[float] = []
    while len(times) < FEWEST or (sum(times) < SECONDS / 2 and len(times) < MOST):
        times.append(_time(call, where))
    return times


def _time(call: Callable[[], object], where: torch.device) -> float:
    synchronize(where)
    start = time.perf_counter()
    call()
    synchronize(where)
    return time.perf_counter() - start


def _spread(times: list[float]) -> float:
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / statistics.median(times)


def _cache_path(name: str, threads: int) -> Path | None:
    """Return the path of the cached limits; None for a user without a home directory."""
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    key = re.sub(r"[^A-Za-z0-9.]+", "-", f"{name} {threads} threads torch {torch.__version__}").strip("-")
    return caches / "gatewise" / "devices" / f"{key}.json"


def _load(path: Path | None) -> Device | None:
    """Return the cached limits; None if the file is missing or holds something else."""
    if path is None or not path.exists():
        return None
    try:
        return read_fields(Device, read_json(path, "cache"), "its content")
    except ValueError as error:
        warnings.warn(f"{path} does not hold the limits of a device ({error}); measuring them anew", stacklevel=3)
        return None


def _store(found: Device, path: Path | None) -> None:
    try:
        if path is not None:
            write_json(path, asdict(found))
    except Failure as error:
        warnings.warn(f"the limits of the device cannot be kept: {error}", stacklevel=3)
