"""Waterline analysis: how efficiently a network can run at best, kernel after kernel, and which kernels hold it back.

With W_i operations and B_i bytes of kernel i, a device's peak F and its bandwidth BW:

    OI_i = W_i / B_i                               operational intensity
    r = F / BW                                     ridge: the waterline
    t_i = max(W_i / F, B_i / BW)                   bound of a kernel, = (W_i / F) max(1, r / OI_i)
    T_min = sum t_i                                bound of the network
    e_max = (sum W_i / F) / T_min                  most that it can use of the peak

A kernel below the waterline waits for memory and loses the factor r / OI_i, whatever the kernel's quality. This is not
the roofline of the whole: what one kernel leaves of the bandwidth cannot be lent to another. The same is computed for
three ways to cut the network into kernels (see `kernels`): operator by operator, with element-wise
work in the kernels before it, and with each residual block as one kernel.

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
"""The ways to cut a network into kernels, from the most to the fewest."""


@dataclass(frozen=True)
class BoundKernel:
    """A kernel on a device. Times in seconds."""

    kernel: Kernel
    ideal_s: float
    memory_s: float

    @property
    def min_s(self) -> float:
        """The bound t_i."""
        return max(self.ideal_s, self.memory_s)

    @property
    def is_drop(self) -> bool:
        """Whether it computes nothing that counts: it only moves data."""
        return self.kernel.ops == 0

    @property
    def is_memory_bound(self) -> bool:
        """Whether it computes, and is under water."""
        return not self.is_drop and self.memory_s > self.ideal_s

    @property
    def loss(self) -> float:
        """How many times longer than its arithmetic it must take, r / OI_i or 1; infinite for a drop."""
        return self.min_s / self.ideal_s if self.ideal_s else float("inf")

    @property
    def max_efficiency(self) -> float:
        """Most that it can use of the peak."""
        return self.ideal_s / self.min_s if self.min_s else 0.0

    @property
    def lost_s(self) -> float:
        """Seconds beyond its arithmetic."""
        return self.min_s - self.ideal_s


@dataclass(frozen=True)
class Bound:
    """A network as a sequence of kernels that run one after the other."""

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
        """The kernels under water, those first that lose most; what only moves data is in `drops`."""
        return tuple(sorted((b for b in self.kernels if b.is_memory_bound), key=lambda b: -b.lost_s))

    @property
    def drops(self) -> tuple[BoundKernel, ...]:
        """The kernels that only move data, in order."""
        return tuple(bound for bound in self.kernels if bound.is_drop)


@dataclass(frozen=True)
class Waterline:
    """The bounds of a network on a device; `str()` is the table of the loss.

    Attributes:
        operators: each operator a kernel of its own.
        epilogues: element-wise operators, norms and copies in the kernel before them.
        blocks: each residual block (or what was asked for) one kernel, too.
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
        """The bound at one of `LEVELS`.

        Raises:
            ValueError: for another level.
        """
        if level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(LEVELS)}, not {level!r}")
        return getattr(self, level)

    def summary(self) -> list[tuple[str, str, str, str, str, str]]:
        """Level, kernels, bytes, bound, most efficiency and kernels under water, as text, from a header on."""
        rows = [("kernels are", "number", "MB moved", "T_min", "e_max", "under water")]
        for level in LEVELS:
            bound = self.at(level)
            number, moved = f"{len(bound.kernels)}", f"{bound.bytes / 1e6:,.1f}"
            under = f"{len(bound.memory_bound)} + {len(bound.drops)} drops"
            rows.append((level, number, moved, duration(bound.min_s), f"{bound.max_efficiency:.3f}", under))
        return rows

    def table(self, level: str = "operators", most: int | None = 20) -> str:
        """What each kernel loses, the largest losses first, as text.

        Args:
            most: rows; None for all.
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
        """One line per kernel, of all three levels, in order."""
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
        """A section of a web page that needs nothing else: the drawing at all three levels, and what each kernel is."""
        from gatewise.efficiency.bounds.waterline_page import section

        return section(self)

    def measured(
        self, seconds: Sequence[float] | None = None, *, budget_s: float = 10.0, noise: float | None = None
    ) -> MeasuredWaterline:
        """Each operator timed alone and by turns, beside its bound; those that write in place beside the bound by the
        bandwidth of such work, where the device has it.

        Args:
            seconds: times of the operators, in order, where they were measured otherwise (by a profiler, say).
            budget_s: seconds of measuring; at least three rounds are run.
            noise: relative excess over a bound that passes for noise; that of the device by default.
        Raises:
            ValueError: if the number of times is not that of the operators, or the operators cannot be timed: the
                network was on the meta device, or is counted in other numbers than it ran in.
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
        """The bounds of single operators."""
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
    """The bounds of `model(example)` at inference.

    Args:
        device: limits to hold the network against; those of the device that `example` is on by default, measured.
        dtype: count as if all numbers were of this kind; that of the example (or network) by default.
        fold: fold batch norms and merge branches first, as for inference (`gatewise.efficiency.fold`).
        blocks: what is one kernel at the level `blocks`: classes of modules, paths of modules, or tuples of paths that
            belong together. By default the residual blocks: the smallest modules with two or more convolutions or
            linear maps that end by adding a branch to what it was computed from, and the others of their classes.
    Raises:
        TypeError, ValueError: as `count`; if the device has no peak for `dtype`; if a block names nothing that ran.
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
    """What these kernels can reach on a device when they run one after the other."""
    peak = device.peak(dtype)
    return Bound(
        level=level,
        ridge=device.ridge(dtype),
        kernels=tuple(BoundKernel(kernel, kernel.ops / peak, kernel.bytes / device.bandwidth) for kernel in kernels),
    )
