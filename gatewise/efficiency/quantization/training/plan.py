"""Find which values of a network become integer codes in its simulation, by running it once.

One pass is recorded (`trace`). Codes are placed where `gatewise.efficiency.quantization.placement` puts them in the
integer network: around convolutions with their batch norm and ReLU, before products with a weight, and around sums,
products, averages and concatenations between two of those. Operators without an integer kernel stay float.

A value becomes codes where it is produced, so that all its readers see codes, as in the integer network. If its
producer is replaced by another function in training, the value becomes codes where layers read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gatewise.efficiency.quantization.training.trace import KINDS, SUMS, Call, CallKey, Recording, record

_RECIPROCALS = ("rsqrt", "reciprocal")


class Site(NamedTuple):
    """Location of a range: the path of the module that owns the buffer, and the buffer's name."""

    path: str
    buffer: str

    def __str__(self) -> str:
        what = self.buffer.removesuffix("_range").replace("_", " ")
        return f"{what} of {self.path or 'the network'}"


@dataclass
class CallPlan:
    """Actions of the simulation at one call.

    Attributes:
        inputs: ranges for those of its tensors that are not codes yet, in the order of its operands.
        input_spans: ranges that give a layer's input grid, whether or not the input is codes already.
        output: range of its result, if that becomes codes here.
        parts: ranges for a result of several tensors, by position.
        norm: path of the batch norm after a convolution or linear layer, which is computed with it.
        is_folded: whether this is a batch norm that has already been computed.
    """

    inputs: dict[int, Site] = field(default_factory=dict)
    input_spans: tuple[Site, ...] = ()
    output: Site | None = None
    parts: dict[int, Site] = field(default_factory=dict)
    norm: str | None = None
    is_folded: bool = False


@dataclass(frozen=True)
class Plan:
    """All calls at which the simulation acts, in the order of the pass.

    Attributes:
        groups: for each range, the ranges that share its grid, itself included.
        origins: for each range, its call, and the operand's position or None for the result.
        fixed: ranges that are known in advance.
    """

    calls: dict[CallKey, CallPlan]
    groups: dict[Site, tuple[Site, ...]]
    origins: dict[Site, tuple[CallKey, int | None]]
    fixed: dict[Site, tuple[float, float]]


class Planner:
    """Decides from a recording what becomes codes, by the rules of `placement.place`."""

    def __init__(self, recording: Recording, model: nn.Module) -> None:
        self.calls, self.ranks, self.model = _without_padding(recording.calls), recording.ranks, model
        self.readers = _readers(self.calls)
        self.givers = {value: call for call in self.calls for value in call.gives}
        self.plans: dict[CallKey, CallPlan] = {}
        self.parent: dict[int, int] = {}
        self.sites: dict[int, Site] = {}
        self.origins: dict[Site, tuple[CallKey, int | None]] = {}
        self.fixed: dict[Site, tuple[float, float]] = {}
        self.integer: set[int] = set()
        self.behind: set[int] = set()
        self.takes_input: list[tuple[CallKey, int, int]] = []

    def plan(self) -> Plan:
        """Return the plan.

        Raises:
            ValueError: if a batch norm is not the only reader of a convolution or linear layer.
        """
        self._pair_norms()
        for call in self.calls:
            self._visit(call)
        for key, position, value in self.takes_input:
            self._round_before(key, position, value, self.givers.get(value))
        groups = self._groups()
        for call in self.calls:
            if call.is_layer and 0 in call.takes and call.takes[0] in self.parent:
                self._plan(call.key).input_spans = self._members(call.takes[0])
        ordered = {call.key: self.plans[call.key] for call in self.calls if call.key in self.plans}
        return Plan(ordered, groups, self.origins, self.fixed)

    def _plan(self, key: CallKey) -> CallPlan:
        return self.plans.setdefault(key, CallPlan())

    def _pair_norms(self) -> None:
        for call in self.calls:
            if call.key.kind != "norm":
                continue
            path = call.key.path
            before = self.givers.get(call.takes[0])
            paired = before is not None and before.is_layer and len(self.readers[call.takes[0]]) == 1
            if before is None or not paired or (before.key.kind == "linear" and self.ranks[call.takes[0]] != 2):
                raise ValueError(
                    f"the batch norm {path or 'of the network'} must directly follow a convolution or linear layer "
                    "with no other reader, so that it can be folded into the weights; pass folded=True if the network "
                    "can be folded otherwise"
                )
            norm = self.model.get_submodule(path)
            if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
                raise ValueError(f"the batch norm {path or 'of the network'} must be a module with running statistics")
            self._plan(before.key).norm = path
            self._plan(call.key).is_folded = True

    def _visit(self, call: Call) -> None:
        if call.gives and call.gives[0] in self.behind:
            return
        kind, arrives = call.key.kind, [value in self.integer for value in call.takes.values()]
        if kind in ("conv", "linear"):
            if call.is_layer:
                self._take(call)
                if kind == "conv":
                    self._give(call, self._behind_norm(call))
        elif kind == "norm" or not any(arrives):
            return
        elif call.moves and arrives[0]:
            for value in call.gives:
                self._share(next(iter(call.takes.values())), value)
                self.integer.add(value)
        elif kind in SUMS and len(call.takes) == 2 and not self._divides(call):
            self._take(call)
            self._give(call, call)
        elif kind == "cat":
            for value in call.takes.values():
                self._share(value, call.gives[0])
            self._take(call)
            self._give(call, call)
        elif kind in ("sigmoid", "curve", "clamp") or (kind == "average" and self._averages_positions(call)):
            self._give(call, call)

    def _behind_norm(self, call: Call) -> Call:
        if self._plan(call.key).norm is None:
            return call
        return self.readers[call.gives[0]][0]

    def _divides(self, call: Call) -> bool:
        """Return whether a factor is a reciprocal, as in a norm, which stays float."""
        return any(self.givers[value].name in _RECIPROCALS for value in call.takes.values() if value in self.givers)

    def _averages_positions(self, call: Call) -> bool:
        rank = self.ranks[call.takes[0]]
        return call.name != "mean" or (rank == 4 and sorted(axis % 4 for axis in call.axes) == [2, 3])

    def _take(self, call: Call) -> None:
        """Make the inputs of a call codes; those that are not codes yet are rounded where they are read."""
        for position, value in call.takes.items():
            self.parent.setdefault(value, value)
            if value not in self.integer:
                self.takes_input.append((call.key, position, value))

    def _give(self, call: Call, last: Call) -> None:
        """Make the output of a call, its norm (`last`) and the ReLU after it codes."""
        value = last.gives[0]
        readers = self.readers.get(value, [])
        if len(readers) == 1 and readers[0].key.kind == "clamp" and list(readers[0].takes.values()) == [value]:
            last = readers[0]
            value = last.gives[0]
            self.behind.add(value)
        self.parent.setdefault(value, value)
        self.integer.add(value)
        self.sites[value] = site = Site(call.key.path, _buffer(call.key, "output"))
        self.origins[site] = call.key, None
        self._plan(call.key)
        self._plan(last.key).output = site
        if last is call and call.key.kind == "sigmoid":
            self.fixed[site] = (0.0, 255 / 256)

    def _round_before(self, key: CallKey, position: int, value: int, giver: Call | None) -> None:
        """Round a value where it is produced. If another function may produce it in training, round it also where it
        is read. All places share its range."""
        known = giver is not None and giver.key.kind in KINDS
        if value not in self.sites:
            named = known and giver is not None and giver.key.kind not in ("conv", "linear", "norm")
            origin: tuple[CallKey, int | None] = (giver.key, None) if named and giver is not None else (key, position)
            what = "output" if origin[1] is None else f"input{position or ''}"
            self.sites[value] = site = Site(origin[0].path, _buffer(origin[0], what))
            self.origins[site] = origin
        if giver is not None and (known or self._has_float_readers(value, giver)):
            self._round_given(giver, value)
        if not known:
            self._plan(key).inputs[position] = self.sites[value]

    def _has_float_readers(self, value: int, giver: Call) -> bool:
        """Return whether the output of an uncounted kind of call is also read by a call that takes no codes."""
        takers = {key for key, _, taken in self.takes_input if taken == value}
        # The number of attribute reads varies between passes, so such a call cannot be identified.
        return giver.name != "__get__" and any(call.key not in takers for call in self.readers[value])

    def _round_given(self, giver: Call, value: int) -> None:
        plan = self._plan(giver.key)
        if giver.gives == (value,):
            plan.output = self.sites[value]
        else:
            plan.parts[giver.gives.index(value)] = self.sites[value]

    def _root(self, value: int) -> int:
        while self.parent[value] != value:
            value = self.parent[value]
        return value

    def _share(self, first: int, second: int) -> None:
        self.parent.setdefault(first, first)
        self.parent.setdefault(second, second)
        self.parent[self._root(second)] = self._root(first)

    def _members(self, value: int) -> tuple[Site, ...]:
        root = self._root(value)
        return tuple(dict.fromkeys(self.sites[own] for own in self.sites if self._root(own) == root))

    def _groups(self) -> dict[Site, tuple[Site, ...]]:
        return {site: self._members(value) for value, site in self.sites.items()}


def _readers(calls: list[Call]) -> dict[int, list[Call]]:
    found: dict[int, list[Call]] = {}
    for call in calls:
        for value in dict.fromkeys(call.takes.values()):
            found.setdefault(value, []).append(call)
    return found


def _without_padding(calls: list[Call]) -> list[Call]:
    """Return the calls without zero padding before convolutions, which merges into them when exported.

    A padded value is codes if the value is, since zero is one of the codes.
    """
    readers = _readers(calls)
    same: dict[int, int] = {}
    for call in calls:
        if call.pads and all(reader.key.kind == "conv" for reader in readers.get(call.gives[0], [])):
            same[call.gives[0]] = same.get(call.takes[0], call.takes[0])
    kept = [call for call in calls if not (call.pads and call.gives[0] in same)]
    return [
        replace(call, takes={position: same.get(value, value) for position, value in call.takes.items()})
        for call in kept
    ]


def _buffer(key: CallKey, what: str) -> str:
    """Return a buffer's name: input_range of a layer, add_output_range of a block; later calls are numbered."""
    layer = "" if key.kind in ("conv", "linear") else f"{key.kind}_"
    return f"{layer}{what}{key.number or ''}_range"


def make_plan(model: nn.Module, images: Tensor) -> Plan:
    """Run `model` on `images` (B, C, H, W) in its current mode, as it is exported, and plan its simulation.

    Raises:
        ValueError: if a batch norm is not the only reader of a convolution or linear layer.
    """
    return Planner(record(model, images), model).plan()
