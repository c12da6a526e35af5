"""Group the operators of a run into kernels: one each, with epilogues merged, or whole residual blocks at once.

A kernel reads what its operators read but none of them makes, and writes what is read outside of it or is the network's
output. Three ways to divide a run into kernels give three bounds:

- *operators*: every operator is a kernel, as in eager mode;
- *epilogues*: element-wise operators, norms, softmax and copies are merged into the kernel that made their (latest)
  input, as if it applied them before it writes;
- *blocks*: in addition, every block is one kernel, which reads its input and all its weights once and writes its output
  once: B = u (N C H W + N K P Q) + u sum(weights).

The second and third leave out biases, scales and statistics of norms, which are vectors. The second still counts the
biases of products.

Source: Lavin 2024, arXiv:2404.03617.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from gatewise.efficiency.cost.count import Trace
from gatewise.efficiency.cost.operators import Operator
from gatewise.efficiency.cost.recorder import distinct_bytes

Block = type[nn.Module] | str | tuple[str, ...]
"""Modules that form one kernel: each module of a class, the module at a path, or the modules at several paths."""


@dataclass(frozen=True)
class Kernel:
    """Operators that run as one kernel. `module` is the path of the block, or of the module with the first product."""

    name: str
    module: str
    ops: float
    bytes_read: int
    bytes_written: int
    weight_bytes: int
    operators: tuple[Operator, ...]

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.ops / self.bytes if self.bytes else 0.0


def operator_kernels(trace: Trace) -> tuple[Kernel, ...]:
    """Return one kernel per operator."""
    return tuple(
        Kernel(
            name=operator.name,
            module=operator.module,
            ops=operator.ops,
            bytes_read=operator.bytes_read,
            bytes_written=operator.bytes_written,
            weight_bytes=operator.weight_bytes,
            operators=(operator,),
        )
        for operator in trace.cost.operators
    )


def epilogue_kernels(trace: Trace) -> tuple[Kernel, ...]:
    """Return kernels with element-wise operators, norms, softmax and copies merged into the producer of their input."""
    return _Run(trace).kernels({})


def block_kernels(trace: Trace, blocks: Iterable[Block] | None = None) -> tuple[Kernel, ...]:
    """Return one kernel per block, and around the blocks those of `epilogue_kernels`.

    Args:
        blocks: modules to treat as blocks; by default the residual blocks (see `residual_blocks`).
    Raises:
        ValueError: if a class or path names no module that ran.
    """
    run = _Run(trace)
    if blocks is None:
        return run.kernels(run.inside(residual_blocks(trace)))
    return run.kernels(_chosen(run, tuple(blocks)))


def residual_blocks(trace: Trace) -> frozenset[int]:
    """Return the module calls that are residual blocks, recognized by what they compute.

    These are the smallest calls that own two or more convolutions or linear layers, and in which, after the last
    product, something is added to what it was computed from. Other calls of the same classes, which change the size and
    so cannot add, are blocks too.
    """
    run = _Run(trace)
    found = {call for operator in trace.cost.operators if (call := run.closes_block(operator)) is not None}
    smallest = {call for call in found if not any(call in run.ancestors(other)[1:] for other in found)}
    kinds = {trace.calls[call].kind for call in smallest} - {nn.Sequential}
    for call, entry in enumerate(trace.calls):
        related = any(call in run.ancestors(other) or other in run.ancestors(call) for other in smallest)
        if entry.kind in kinds and not related and run.weighted_products(call) >= 2:
            smallest.add(call)
    return frozenset(smallest)


class _Run:
    """A trace with cached lookups."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.operators = trace, trace.cost.operators
        self.readers: dict[int, set[int]] = {}
        for position, operator in enumerate(self.operators):
            for use in operator.reads:
                self.readers.setdefault(use.value, set()).add(position)

    def ancestors(self, call: int) -> list[int]:
        """The call itself and its ancestors, innermost first."""
        found = []
        index: int | None = call if call >= 0 else None
        while index is not None:
            found.append(index)
            index = self.trace.calls[index].parent
        return found

    @cached_property
    def members(self) -> dict[int, list[int]]:
        """Positions of the operators that each call runs, including inner calls."""
        found: dict[int, list[int]] = {}
        for position, operator in enumerate(self.operators):
            for call in self.ancestors(operator.call):
                found.setdefault(call, []).append(position)
        return found

    @cached_property
    def writers(self) -> dict[int, int]:
        """Position of the operator that last wrote a value."""
        return {use.value: position for position, operator in enumerate(self.operators) for use in operator.writes}

    def weighted_products(self, call: int) -> int:
        """Number of convolutions and linear layers that a call runs."""
        inside = (self.operators[position] for position in self.members.get(call, ()))
        return sum(operator.macs > 0 and operator.weight_bytes > 0 for operator in inside)

    def closes_block(self, operator: Operator) -> int | None:
        """Return the call whose residual addition this operator is, if any."""
        if operator.name not in ("add", "add_", "addcmul", "addcmul_") or operator.macs:
            return None
        size = operator.writes[0].bytes
        terms = [use.value for use in operator.reads if use.kind == "activation" and use.bytes == size]
        call = next((call for call in self.ancestors(operator.call) if self.weighted_products(call) >= 2), None)
        if len(terms) != 2 or call is None:
            return None
        position = self.writers[operator.writes[0].value]
        inside = self.members[call]
        if any(self.operators[later].macs for later in inside if later > position):
            return None
        before = {earlier for earlier in inside if earlier < position}
        first, second = terms
        shortcut = self._is_computed_from(first, second, before) or self._is_computed_from(second, first, before)
        return call if shortcut else None

    def _is_computed_from(self, value: int, source: int, inside: set[int]) -> bool:
        """Return whether a product makes `value`, from `source` or from what equals it up to element-wise work."""
        made_from, makers = self._sources(value, inside, through_products=True)
        same, _ = self._sources(source, inside, through_products=False)
        return any(self.operators[maker].macs for maker in makers) and not made_from.isdisjoint(same)

    def _sources(self, value: int, inside: set[int], *, through_products: bool) -> tuple[set[int], set[int]]:
        """Return the values that a value is made from by these operators, itself included, and the operators."""
        values, makers, pending = set(), set(), [value]
        while pending:
            value = pending.pop()
            maker = self.writers.get(value)
            if value in values:
                continue
            values.add(value)
            if maker in inside and (through_products or not self.operators[maker].macs):
                makers.add(maker)
                pending += [use.value for use in self.operators[maker].reads if use.kind == "activation"]
        return values, makers

    def inside(self, calls: Iterable[int]) -> dict[int, tuple[int, str]]:
        """Map the positions of operators inside these calls to the number and path of their block."""
        found: dict[int, tuple[int, str]] = {}
        for call in calls:
            path = self.trace.calls[call].path
            found |= dict.fromkeys(self.members.get(call, ()), (call, path))
        return found

    def kernels(self, blocks: dict[int, tuple[int, str]]) -> tuple[Kernel, ...]:
        """Divide the run: operators of one block together, mergeable operators with the producer of their input."""
        groups: list[list[int]] = []
        names: list[str | None] = []
        of_block: dict[int, int] = {}
        made_by: dict[int, int] = {}
        for position, operator in enumerate(self.operators):
            block = blocks.get(position)
            group = of_block.get(block[0]) if block else self._host(operator, made_by)
            if group is None:
                group = len(groups)
                groups.append([])
                names.append(block[1] if block else None)
                if block:
                    of_block[block[0]] = group
            groups[group].append(position)
            made_by |= {use.value: group for use in operator.writes}
        return tuple(self._kernel(group, name) for group, name in zip(groups, names, strict=True))

    def _host(self, operator: Operator, made_by: dict[int, int]) -> int | None:
        """Return the latest kernel that makes one of the operator's inputs, if it can be merged."""
        if not operator.fusible:
            return None
        makers = [made_by[use.value] for use in operator.reads if use.value in made_by]
        return max(makers, default=None)

    def _kernel(self, group: list[int], block: str | None) -> Kernel:
        members = set(group)
        operators = tuple(self.operators[position] for position in group)
        made = {use.value for operator in operators for use in operator.writes}
        reads = {
            (use.value, use.view): use
            for operator in operators
            for use in operator.reads
            if use.value not in made and (use.kind != "vector" or (block is None and operator.macs > 0))
        }
        last = {use.value: use for operator in operators for use in operator.writes}
        writes = [
            use
            for value, use in last.items()
            if value in self.trace.outputs or not self.readers.get(value, set()) <= members
        ]
        lead = next((operator for operator in operators if operator.macs), operators[0])
        return Kernel(
            name=lead.name if block is None else "block",
            module=lead.module if block is None else block,
            ops=sum(operator.ops for operator in operators),
            bytes_read=distinct_bytes(reads.values()),
            bytes_written=sum(use.bytes for use in writes),
            weight_bytes=sum(use.bytes for use in reads.values() if use.kind == "weight"),
            operators=operators,
        )


def _chosen(run: _Run, blocks: Sequence[Block]) -> dict[int, tuple[int, str]]:
    """Return positions of the operators in the blocks that a caller names; of nested blocks the outer one counts."""
    named = {call for block in blocks if not isinstance(block, tuple) for call in _named(run, block)}
    outermost = [call for call in named if not named.intersection(run.ancestors(call)[1:])]
    found = run.inside(outermost)
    for block in blocks:
        if isinstance(block, tuple):
            found = _joined(run, block, len(run.trace.calls) + len(found)) | found
    return found


def _named(run: _Run, block: type[nn.Module] | str) -> list[int]:
    calls = run.trace.calls
    if isinstance(block, type):
        found = [call for call, entry in enumerate(calls) if issubclass(entry.kind, block)]
        what = f"no module of the class {block.__name__} ran"
    else:
        found = [call for call, entry in enumerate(calls) if entry.path == block]
        what = f"no module at {block!r} ran"
    if not found:
        raise ValueError(f"{what}, so it cannot be a block")
    return found


def _joined(run: _Run, paths: tuple[str, ...], number: int) -> dict[int, tuple[int, str]]:
    """Treat the operators of several modules as one block, each time that these run one after the other."""
    calls = run.trace.calls
    for path in paths:
        if not any(entry.path == path for entry in calls):
            raise ValueError(f"no module at {path!r} ran, so it cannot be part of a block")
    found: dict[int, tuple[int, str]] = {}
    before = False
    for position, operator in enumerate(run.operators):
        within = any(calls[call].path in paths for call in run.ancestors(operator.call))
        number += within and not before
        if within:
            found[position] = (number, " + ".join(paths))
        before = within
    return found
