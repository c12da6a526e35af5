"""Latency and memory, measured so that comparisons hold on a machine that is not quiet.

Candidates are interleaved: each round runs every one once, and the next round starts with another. A disturbance then
hits all of them alike, and the ratio of two candidates is taken within rounds. The measured state is the steady one, in
which a network runs again and again. So a quick network is called once before its sample, since the other candidates
have evicted its weights from the caches. Medians and quartiles are reported instead of means, which a single
interruption would spoil.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gatewise.efficiency.timing.hardware import synchronize
from gatewise.errors import Failure

Candidate = Callable[[Tensor], object]

SHORTEST_SAMPLE = 0.002
"""Seconds. Quicker calls are repeated within a sample so that the clock's own cost does not count."""

CACHED = 0.05
"""Seconds. For longer calls, refilling the caches costs only a few percent of a call."""

SETTLE = 0.002
"""Seconds of rest before each sample, so that the previous candidate's worker threads stop spinning."""


@dataclass(frozen=True)
class Timing:
    """Times of one candidate, one per round, in seconds per call on `batch_size` samples."""

    name: str
    batch_size: int
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median in seconds."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range in seconds."""
        low, high = _quartiles(self.samples)
        return high - low

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the median in seconds, by a bootstrap over the rounds."""
        return bootstrap_bounds(self.samples)

    @property
    def throughput(self) -> float:
        """Samples per second at the median."""
        return self.batch_size / self.median


@dataclass(frozen=True)
class Ratio:
    """Speedup: the median over rounds and its quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"


def measure(
    candidates: Mapping[str, Candidate],
    example: Tensor,
    *,
    budget_s: float = 10.0,
    min_rounds: int = 5,
    max_rounds: int = 50,
    warm_up: int = 2,
    warm_up_s: float = 0.0,
) -> list[Timing]:
    """Time the candidates on `example` in interleaved rounds, and return timings in the order given.

    Each candidate is first called `warm_up` times, and longer if `warm_up_s` seconds have not passed. Rounds continue
    until `budget_s` is spent or there are `max_rounds`, but at least `min_rounds` are run however long they take. The
    caller decides about gradients.

    Raises:
        ValueError: if there are no candidates, or a limit is not positive.
    """
    if not candidates:
        raise ValueError("there is nothing to measure: pass at least one candidate")
    if min_rounds < 1 or max_rounds < min_rounds or warm_up < 0 or warm_up_s < 0 or not budget_s > 0:
        raise ValueError(
            "measure needs 1 <= min_rounds <= max_rounds, warm_up >= 0, warm_up_s >= 0 and a positive budget_s, "
            f"not {min_rounds}, {max_rounds}, {warm_up}, {warm_up_s} and {budget_s}"
        )
    seconds = {name: _warm_up(candidate, example, warm_up, warm_up_s) for name, candidate in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    deadline = time.monotonic() + budget_s
    for done in range(max_rounds):
        if done >= min_rounds and time.monotonic() > deadline:
            break
        first = done % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(SETTLE)
            samples[name].append(_sample(candidates[name], example, seconds[name]))
    return [Timing(name, example.shape[0], tuple(times)) for name, times in samples.items()]


def bootstrap_bounds(
    samples: Sequence[float],
    statistic: Callable[[Sequence[float]], float] = statistics.median,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> tuple[float, float]:
    """Return bounds of a statistic by the percentile bootstrap. The resamples are always the same."""
    import numpy as np

    values = np.asarray(samples, dtype=np.float64)
    drawn = values[np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))]
    estimates = sorted(statistic(row.tolist()) for row in drawn)
    tail = round((1 - confidence) / 2 * (resamples - 1))
    return estimates[tail], estimates[-1 - tail]


def ratio(before: Timing, after: Timing) -> Ratio:
    """Return how many times faster `after` is than `before`. Both must come from one call of `measure`.

    Raises:
        ValueError: if they do not come from the same rounds.
    """
    if len(before.samples) != len(after.samples):
        raise ValueError(
            f"a ratio is taken within rounds: {before.name!r} has {len(before.samples)}, "
            f"{after.name!r} {len(after.samples)}; measure them together"
        )
    ratios = [slow / fast for slow, fast in zip(before.samples, after.samples, strict=True)]
    low, high = _quartiles(ratios)
    return Ratio(statistics.median(ratios), low, high)


def peak_memory(candidate: Candidate, example: Tensor) -> int:
    """Return the bytes that one call needs at its peak, beyond those allocated before it.

    On CUDA this is the allocator's own peak. On a CPU it is the rise of the process's resident memory, which includes
    every allocator (oneDNN's and onnxruntime's too): free memory is returned to the system first, and the kernel's
    high-water mark is reset. A runtime that keeps its working memory between calls shows it only in its first call.

    Raises:
        Failure: on a CPU where Linux's high-water mark cannot be reset.
    """
    if example.device.type == "cuda":
        torch.cuda.synchronize(example.device)
        torch.cuda.reset_peak_memory_stats(example.device)
        held = torch.cuda.memory_allocated(example.device)
        candidate(example)
        torch.cuda.synchronize(example.device)
        return torch.cuda.max_memory_allocated(example.device) - held
    gc.collect()
    _return_free_memory()
    held = _reset_high_water_mark()
    candidate(example)
    return max(0, _resident("VmHWM") - held)


def _warm_up(candidate: Candidate, example: Tensor, calls: int, seconds: float) -> float:
    """Call a few times, and return the seconds of one more call."""
    deadline, done = time.monotonic() + seconds, 0
    while done < calls or time.monotonic() < deadline:
        candidate(example)
        done += 1
    return _time(candidate, example, 1)


def _sample(candidate: Candidate, example: Tensor, seconds: float) -> float:
    """Return seconds per call, with data in the caches, for a call that takes about `seconds`."""
    if seconds < CACHED:
        candidate(example)
    return _time(candidate, example, max(1, round(SHORTEST_SAMPLE / max(seconds, 1e-9))))


def _time(candidate: Candidate, example: Tensor, repeats: int) -> float:
    synchronize(example.device)
    start = time.perf_counter()
    for _ in range(repeats):
        candidate(example)
    synchronize(example.device)
    return (time.perf_counter() - start) / repeats


def _quartiles(values: tuple[float, ...] | list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _return_free_memory() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _reset_high_water_mark() -> int:
    """Restart the high-water mark, and return the current resident bytes."""
    try:
        # 5 resets VmHWM to the current resident size (proc(5), clear_refs).
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _resident("VmRSS")
    except OSError as error:
        raise Failure(f"peak memory on a CPU is read from Linux's /proc/self, which refused: {error}") from error


def _resident(field: str) -> int:
    for line in Path(f"/proc/{os.getpid()}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise Failure(f"Linux's /proc/self/status has no field {field}")
