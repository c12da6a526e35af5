"""Waterline analysis: the best possible efficiency of a network, kernel by kernel, and the kernels that limit it.

For W_i operations and B_i bytes of kernel i, a device's peak F and its bandwidth BW:

    OI_i = W_i / B_i                               operational intensity
    r = F / BW                                     ridge: the waterline
    t_i = max(W_i / F, B_i / BW)                   bound of a kernel, = (W_i / F) max(1, r / OI_i)
    T_min = sum t_i                                bound of the network
    e_max = (sum W_i / F) / T_min                  largest usable fraction of the peak

A kernel below the waterline waits for memory and loses the factor r / OI_i, however good the kernel is. This is
stricter than the roofline of the whole network: bandwidth that one kernel leaves unused cannot be lent to another.
Bounds are computed for three ways to divide the network into kernels (see `kernels`): one per operator, element-wise
work merged into the kernels before it, and one per residual block.

Source: Lavin 2024, arXiv:2404.03617.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gatewise.efficiency._figures import save_table
from gatewise.efficiency._text import columns, duration
from gatewise.efficiency.acceleration.fold import fold as fold_network
from gatewise.efficiency.bounds.device import Device
from gatewise.efficiency.bounds.device import device as measured_device
from gatewise.efficiency.bounds.kernels import Block, Kernel, block_kernels, epilogue_kernels, operator_kernels
from gatewise.efficiency.bounds.operator_times import KernelTime, MeasuredWaterline, time_operators, writes
from gatewise.efficiency.cost.count import Trace, trace
from gatewise.efficiency.cost.operators import dtype_name

LEVELS = ("operators", "epilogues", "blocks")
"""Ways to divide a network into kernels, from the most kernels to the fewest."""


@dataclass(frozen=True)
class BoundKernel:
    """A kernel on a device, with times in seconds."""

    kernel: Kernel
    ideal_s: float
    memory_s: float

    @property
    def min_s(self) -> float:
        """The bound t_i."""
        return max(self.ideal_s, self.memory_s)

    @property
    def is_drop(self) -> bool:
        """Whether it only moves data and computes nothing that counts."""
        return self.kernel.ops == 0

    @property
    def is_memory_bound(self) -> bool:
        """Whether it computes and is below the waterline."""
        return not self.is_drop and self.memory_s > self.ideal_s

    @property
    def loss(self) -> float:
        """Factor by which it must exceed its arithmetic time: r / OI_i, at least 1; infinite for a drop."""
        return self.min_s / self.ideal_s if self.ideal_s else float("inf")

    @property
    def max_efficiency(self) -> float:
        """Largest usable fraction of the peak."""
        return self.ideal_s / self.min_s if self.min_s else 0.0

    @property
    def lost_s(self) -> float:
        """Seconds beyond its arithmetic time."""
        return self.min_s - self.ideal_s


@dataclass(frozen=True)
class Bound:
    """Bound of a network as a sequence of kernels that run one after the other."""

    level: str
    ridge: float
    kernels: tuple[BoundKernel, ...]

    @property
    def ops(self) -> float:
        return sum(bound.kernel.ops for bound in self.kernels)

    @property
    def bytes(self) -> int:
        return sum(bound.kernel.bytes for bound in self.kernels)

    @property
    def ideal_s(self) -> float:
        """Seconds at the peak."""
        return sum(bound.ideal_s for bound in self.kernels)

    @property
    def min_s(self) -> float:
        """T_min in seconds."""
        return sum(bound.min_s for bound in self.kernels)

    @property
    def max_efficiency(self) -> float:
        """e_max, between 0 and 1."""
        return self.ideal_s / self.min_s if self.min_s else 0.0

    @property
    def memory_bound(self) -> tuple[BoundKernel, ...]:
        """Kernels below the waterline, largest loss first; those that only move data are in `drops`."""
        return tuple(sorted((b for b in self.kernels if b.is_memory_bound), key=lambda b: -b.lost_s))

    @property
    def drops(self) -> tuple[BoundKernel, ...]:
        """Kernels that only move data, in order."""
        return tuple(bound for bound in self.kernels if bound.is_drop)


@dataclass(frozen=True)
class Waterline:
    """Bounds of a network on a device; `str()` gives the table of losses.

    Attributes:
        operators: bound with each operator as its own kernel.
        epilogues: bound with element-wise operators, norms and copies merged into the kernel before them.
        blocks: bound with, in addition, each residual block (or the given blocks) as one kernel.
    """

    name: str
    device: Device
    dtype: str
    input_shape: tuple[int, ...]
    operators: Bound
    epilogues: Bound
    blocks: Bound
    trace: Trace = field(repr=False)

    @property
    def ridge(self) -> float:
        """Operations per byte of the device."""
        return self.device.ridge(self.dtype)

    def at(self, level: str) -> Bound:
        """Return the bound at one of `LEVELS`.

        Raises:
            ValueError: for another level.
        """
        if level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(LEVELS)}, not {level!r}")
        return getattr(self, level)

    def summary(self) -> list[tuple[str, str, str, str, str, str]]:
        """Return level, kernels, bytes, bound, largest efficiency and kernels below the waterline, after a header."""
        rows = [("kernels are", "number", "MB moved", "T_min", "e_max", "under water")]
        for level in LEVELS:
            bound = self.at(level)
            number, moved = f"{len(bound.kernels)}", f"{bound.bytes / 1e6:,.1f}"
            under = f"{len(bound.memory_bound)} + {len(bound.drops)} drops"
            rows.append((level, number, moved, duration(bound.min_s), f"{bound.max_efficiency:.3f}", under))
        return rows

    def table(self, level: str = "operators", most: int | None = 20) -> str:
        """Return the loss of each kernel as a text table, largest first.

        Args:
            most: maximum number of rows; None for all.
        """
        bound = self.at(level)
        head = (
            f"{self.name}, input {self.input_shape}, {self.dtype} on {self.device.name}: ridge {self.ridge:.1f} op:byte"
        )
        rows = [("module", "kernel", "MMACs", "MB", "op:byte", "t_i", "bound by", "loses", "of T_min")]
        total = bound.min_s
        for entry in sorted(bound.kernels, key=lambda b: -b.lost_s)[:most]:
            kernel = entry.kernel
            by = "memory" if entry.memory_s > entry.ideal_s else "arithmetic"
            loss = "-" if entry.is_drop else f"{entry.loss:.2f}x"
            share = f"{entry.lost_s / total:.1%}" if total else "-"
            figures = (f"{kernel.ops / 2e6:,.2f}", f"{kernel.bytes / 1e6:,.2f}", f"{kernel.intensity:.1f}")
            rows.append((kernel.module or "-", kernel.name, *figures, duration(entry.min_s), by, loss, share))
        return "\n".join([head, "", columns(self.summary()), "", columns(rows)])

    def __str__(self) -> str:
        return self.table()

    def write_csv(self, path: str | Path) -> None:
        """Write one line per kernel, for all three levels, in order."""
        header = ["level", "position", "module", "kernel", "macs", "bytes_read", "bytes_written", "weight_bytes",
                  "op_byte", "ideal_s", "memory_s", "min_s", "memory_bound", "loss"]  # fmt: skip
        rows: list[Sequence[object]] = [header]
        for level in LEVELS:
            for position, bound in enumerate(self.at(level).kernels):
                kernel = bound.kernel
                of_kernel = (kernel.module, kernel.name, kernel.ops / 2, kernel.bytes_read, kernel.bytes_written)
                figures = (kernel.weight_bytes, kernel.intensity, bound.ideal_s, bound.memory_s, bound.min_s)
                rows.append([level, position, *of_kernel, *figures, bound.is_memory_bound, bound.loss])
        save_table(rows, path)

    def plot(self, path: str | Path, level: str = "operators") -> None:
        """Draw the kernels (png, svg or pdf): width by operations, height by intensity, the waterline at the ridge."""
        from gatewise.efficiency.bounds.waterline_figure import draw

        draw(self, self.at(level), path)

    def html(self) -> str:
        """Return a self-contained section of a web page: the drawing at all three levels, and a legend of kernels."""
        from gatewise.efficiency.bounds.waterline_page import section

        return section(self)

    def measured(
        self, seconds: Sequence[float] | None = None, *, budget_s: float = 10.0, noise: float | None = None
    ) -> MeasuredWaterline:
        """Time each operator in isolation, interleaved with the others, and compare it with its bound.

        In-place operators are bound by the bandwidth of in-place work, if the device has one.

        Args:
            seconds: times of the operators, in order, if they were measured otherwise (such as by a profiler).
            budget_s: measuring time in seconds; at least three rounds are run.
            noise: relative excess over a bound that counts as noise; the device's by default.
        Raises:
            ValueError: if the number of times differs from that of the operators, or the operators cannot be timed
                because the network was on the meta device or is counted in another dtype than it ran in.
        """
        kernels = self._own_bounds()
        if seconds is None:
            self._check_can_run()
            samples = time_operators(self.trace.invocations, budget_s=budget_s)
        else:
            if len(seconds) != len(kernels):
                raise ValueError(f"there are {len(kernels)} operators, so {len(kernels)} times, not {len(seconds)}")
            samples = [(float(second),) for second in seconds]
        times = tuple(KernelTime(bound, tuple(sample)) for bound, sample in zip(kernels, samples, strict=True))
        return MeasuredWaterline(times, self.device.noise if noise is None else noise)

    def _own_bounds(self) -> tuple[BoundKernel, ...]:
        """Return the bounds of single operators."""
        kernels, in_place = self.operators.kernels, self.device.in_place_bandwidth
        if not in_place or not self.trace.invocations:
            return kernels
        return tuple(
            replace(entry, memory_s=entry.kernel.bytes / in_place) if writes(invocation.function) else entry
            for entry, invocation in zip(kernels, self.trace.invocations, strict=True)
        )

    def _check_can_run(self) -> None:
        if not self.trace.invocations:
            raise ValueError("the operators of a network on the meta device cannot be timed; build it on a real device")
        actual = self.trace.actual_dtype
        if actual != self.dtype:
            raise ValueError(
                f"the network ran in {actual} and its bounds are for {self.dtype}: convert it and the example first"
            )


def waterline(
    model: nn.Module,
    example: Tensor,
    device: Device | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    fold: bool = True,
    blocks: Iterable[Block] | None = None,
) -> Waterline:
    """Return the bounds of `model(example)` at inference.

    Args:
        device: limits to compare the network with; by default, measured on the example's device.
        dtype: data type that all numbers are counted in; by default, that of the example (or network).
        fold: fold batch norms and merge branches first, as for inference (`gatewise.efficiency.fold`).
        blocks: modules that form one kernel at the level `blocks`: module classes, module paths, or tuples of paths
            that belong together. By default these are the residual blocks: the smallest modules with two or more
            convolutions or linear layers that end by adding a branch to its input, and all others of their classes.
    Raises:
        TypeError, ValueError: as for `count`; if the device has no peak for `dtype`; if a block names nothing that ran.
    """
    network = fold_network(deepcopy(model).eval()) if fold else model
    on_meta = isinstance(example, Tensor) and example.device.type == "meta"
    run = trace(network, example, dtype=dtype, keep_invocations=not on_meta)
    numbers = dtype_name(run.actual_dtype if dtype is None else dtype)
    if device is None:
        if on_meta:
            raise ValueError("a network on the meta device has no device to be bound by: pass one, such as `device()`")
        device = measured_device(example.device)
    return Waterline(
        name=type(model).__name__,
        device=device,
        dtype=numbers,
        input_shape=tuple(example.shape),
        operators=bound(operator_kernels(run), device, numbers, "operators"),
        epilogues=bound(epilogue_kernels(run), device, numbers, "epilogues"),
        blocks=bound(block_kernels(run, blocks), device, numbers, "blocks"),
        trace=run,
    )


def bound(kernels: Iterable[Kernel], device: Device, dtype: str | torch.dtype, level: str = "operators") -> Bound:
    """Return the bound of these kernels on a device when they run one after the other."""
    peak = device.peak(dtype)
    return Bound(
        level=level,
        ridge=device.ridge(dtype),
        kernels=tuple(BoundKernel(kernel, kernel.ops / peak, kernel.bytes / device.bandwidth) for kernel in kernels),
    )
