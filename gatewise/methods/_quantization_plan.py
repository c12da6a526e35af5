"""Which values of a network become integer codes when it is simulated, found by running it once.

The calls of PyTorch functions that make up one pass are recorded: what each takes and gives, and the module whose code
makes it. Looking at calls instead of modules finds sums, concatenations and functional activations, in any network that
runs. Codes go where `gatewise.efficiency.quantization.placement` puts them in the integer network: around convolutions
with their batch norm and ReLU, before products with a weight, and around sums, products, averages and concatenations on
the way between two of those. What has no integer kernel stays float.

A value becomes codes where it is given, so that all its readers see them, as in the integer network. Where it is given
by a function that takes another's place in training, it becomes codes where layers read it.

A call is known by the path of its module, what it does and how many of its kind that module made before, so that calls
which happen in training alone (drop path) change nothing elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_KINDS = {
    # Our own operator, which takes the place of conv2d in training, has the same first three arguments.
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "large_depthwise_conv"), "conv"),
    "linear": "linear",
    "batch_norm": "norm",
    **dict.fromkeys(("relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "clamp_", "clip", "clip_"), "clamp"),
    **dict.fromkeys(("add", "add_", "__add__", "__radd__", "__iadd__"), "add"),
    **dict.fromkeys(("mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply"), "mul"),
    **dict.fromkeys(("cat", "concat", "concatenate"), "cat"),
    **dict.fromkeys(("avg_pool2d", "adaptive_avg_pool2d", "mean"), "average"),
    **dict.fromkeys(("silu", "silu_"), "silu"),
    **dict.fromkeys(("sigmoid", "sigmoid_"), "sigmoid"),
    **dict.fromkeys(("hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_", "leaky_relu", "leaky_relu_"), "curve"),
}
_MOVES = (
    *("max_pool2d", "_max_pool2d", "flatten", "unflatten", "reshape", "view", "view_as", "permute", "transpose"),
    *("movedim", "squeeze", "unsqueeze", "split", "chunk", "narrow"),
)
_SAME = ("contiguous", "clone", "detach", "to", "float", "type_as", "dropout", "dropout1d", "dropout2d", "dropout3d")
"""What gives at inference what it takes: exporters leave it out."""
_SUMS = ("add", "mul")
_RECIPROCALS = ("rsqrt", "reciprocal")
KINDS = frozenset(_KINDS.values())
"""What calls do at which something may become codes."""


class Site(NamedTuple):
    """Where a range is kept: the path of the module whose buffer it is, and the buffer's name."""

    path: str
    buffer: str

    def __str__(self) -> str:
        what = self.buffer.removesuffix("_range").replace("_", " ")
        return f"{what} of {self.path or 'the network'}"


class CallKey(NamedTuple):
    """One call in a pass: the module that makes it, what it does, and how many of the kind come before it there."""

    path: str
    kind: str
    number: int


@dataclass
class CallPlan:
    """What the simulation does at one call.

    Attributes:
        inputs: ranges for those of its tensors that are no codes yet, in the order of its operands.
        input_spans: ranges that tell a layer's input grid, whether or not it is codes already.
        output: the range of its result, where that becomes codes here.
        parts: the same for a result of several tensors, by their positions.
        norm: the path of the batch norm behind a convolution or linear map, which is computed with it.
        is_folded: for a batch norm, that it has been computed already.
    """

    inputs: dict[int, Site] = field(default_factory=dict)
    input_spans: tuple[Site, ...] = ()
    output: Site | None = None
    parts: dict[int, Site] = field(default_factory=dict)
    norm: str | None = None
    is_folded: bool = False


@dataclass(frozen=True)
class Plan:
    """All calls at which the simulation does something, in the order of the pass.

    Attributes:
        groups: for each range, the ranges that share its grid, itself included.
        origins: for each range, the call whose result (None) or operand (its position) it is of.
        fixed: ranges that are known beforehand.
    """

    calls: dict[CallKey, CallPlan]
    groups: dict[Site, tuple[Site, ...]]
    origins: dict[Site, tuple[CallKey, int | None]]
    fixed: dict[Site, tuple[float, float]]


def kind_of(function: Callable[..., Any]) -> str | None:
    """What a PyTorch function does, for those at which something may become codes."""
    return _KINDS.get(getattr(function, "__name__", ""))


def name_of(function: Callable[..., Any]) -> str:
    """What a call of this function is counted as: what it does, else its name."""
    return kind_of(function) or str(getattr(function, "__name__", function))


def operands(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of a call that can be activations: both of a sum, all of a concatenation, else the first."""
    if kind == "cat":
        return list(args[0] if args else kwargs["tensors"])
    if kind in _SUMS:
        return [*args, *(kwargs[name] for name in ("other",) if name in kwargs)][:2]
    return [args[0] if args else kwargs["input"]]


class Pass(TorchFunctionMode):
    """One pass of a network, whose calls are counted by module; modules tell when they start and end."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = [""]
        self._counts: Counter[tuple[str, str]] = Counter()

    def key(self, kind: str) -> CallKey:
        """The key of the next call of this kind."""
        place = self.paths[-1], kind
        self._counts[place] += 1
        return CallKey(*place, self._counts[place] - 1)


@dataclass(frozen=True)
class Call:
    """A recorded call: what it takes that depends on the network's input, by operand, and what it gives.

    Attributes:
        name: of the function.
        is_layer: a convolution or linear map with a weight of the network's own.
        moves: it gives values that it takes, unchanged.
        pads: it puts zeros around what it takes.
        axes: of a mean.
    """

    key: CallKey
    takes: dict[int, int]
    gives: tuple[int, ...]
    name: str
    is_layer: bool = False
    moves: bool = False
    pads: bool = False
    axes: tuple[int, ...] = ()


class Recording(Pass):
    """Records a pass. Values are numbered; a tensor that is changed in place is a new value."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.ranks = {0: images.ndim}
        self._numbers = {id(images): 0}
        # Identities stay unique as long as the tensors live.
        self._alive: list[Any] = [images]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = kind_of(func)
        if kind == "silu":
            gate = torch.sigmoid(args[0])
            return self.__torch_function__(torch.mul, types, (args[0], self._record(torch.sigmoid, (args[0],), gate)))
        found = {id(leaf): self._numbers[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in self._numbers}
        result = func(*args, **kwargs)
        if kind is not None:
            return self._record(func, args, result, kwargs)
        key = self.key(name_of(func))
        if found and key.kind in _SAME and isinstance(result, Tensor):
            self._numbers[id(result)] = next(iter(found.values()))
            self._alive.append(result)
        elif found and any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            moves = key.kind in _MOVES or (key.kind == "__getitem__" and _keeps_axes(args[1]))
            takes, gives = dict(enumerate(found.values())), self._number(result)
            pads = key.kind == "pad" and _pads_zeros(*args, **kwargs)
            self.calls.append(Call(key, takes, gives, key.kind, moves=moves, pads=pads))
        return result

    def _record(self, func: Any, args: Any, result: Any, kwargs: Any = None) -> Any:
        kwargs, kind = kwargs or {}, kind_of(func)
        assert kind is not None
        key = self.key(kind)
        takes = {
            position: self._numbers[id(value)]
            for position, value in enumerate(operands(kind, args, kwargs))
            if id(value) in self._numbers
        }
        if not takes:
            return result
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        layer = kind in ("conv", "linear") and id(weight) not in self._numbers
        axes = kwargs.get("dim", args[1] if len(args) > 1 else ()) if func.__name__ == "mean" else ()
        axes = (axes,) if isinstance(axes, int) else tuple(axes or ())
        self.calls.append(Call(key, takes, self._number(result), func.__name__, layer, axes=axes))
        return result

    def _number(self, result: Any) -> tuple[int, ...]:
        numbers = []
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                number = len(self.ranks)
                self._numbers[id(leaf)], self.ranks[number] = number, leaf.ndim
                self._alive.append(leaf)
                numbers.append(number)
        return tuple(numbers)


def _pads_zeros(x: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> bool:
    return mode == "constant" and not value


def _keeps_axes(index: Any) -> bool:
    entries = index if isinstance(index, tuple) else (index,)
    return all(entry is None or entry is Ellipsis or isinstance(entry, slice) for entry in entries)


class Planner:
    """Reads a recording and decides what becomes codes; the rules are those of `placement.place`."""

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
        """The plan.

        Raises:
            ValueError: for a batch norm that does not stand behind a convolution or linear map alone.
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
                    f"the batch norm {path or 'of the network'} must stand behind a convolution or linear map that "
                    "nothing else reads, whose weights can hold it; pass folded=True where the network can fold it "
                    "otherwise"
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
        elif kind in _SUMS and len(call.takes) == 2 and not self._divides(call):
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
        """Whether a factor is a reciprocal, as in a norm, which stays float."""
        return any(self.givers[value].name in _RECIPROCALS for value in call.takes.values() if value in self.givers)

    def _averages_positions(self, call: Call) -> bool:
        rank = self.ranks[call.takes[0]]
        return call.name != "mean" or (rank == 4 and sorted(axis % 4 for axis in call.axes) == [2, 3])

    def _take(self, call: Call) -> None:
        """Let the inputs of a call be codes; those that are none yet become codes where they are read."""
        for position, value in call.takes.items():
            self.parent.setdefault(value, value)
            if value not in self.integer:
                self.takes_input.append((call.key, position, value))

    def _give(self, call: Call, last: Call) -> None:
        """Let what comes out of a call, its norm (`last`) and the ReLU behind it be codes."""
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
        """Let a value become codes where it is given and, in case another function gives it in training, where it is
        read. All places share its range."""
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
        """Whether what is given by no counted kind is also read by what takes no codes."""
        takers = {key for key, _, taken in self.takes_input if taken == value}
        # Attributes are read more or less often from pass to pass: such a call cannot be told from others.
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
    """The calls without zero padding in front of convolutions, of which it becomes a part when exported.

    A padded value is codes if the value is: zero is one of them.
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
    """A buffer's name: input_range of a layer, add_output_range of a block; later calls are numbered."""
    layer = "" if key.kind in ("conv", "linear") else f"{key.kind}_"
    return f"{layer}{what}{key.number or ''}_range"


@contextmanager
def tracked(model: nn.Module, current: Pass) -> Iterator[None]:
    """Within the block the modules of `model` tell `current` when they start and end."""
    handles = []
    for path, module in model.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(lambda *_, path=path: current.paths.append(path)))
            handles.append(module.register_forward_hook(lambda *_: _pop(current), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def as_exported() -> Iterator[None]:
    """Within the block operators compute by the library's calls, as where a network is exported, and can be seen."""
    before = torch.compiler._is_exporting_flag
    torch.compiler._is_exporting_flag = True
    try:
        yield
    finally:
        torch.compiler._is_exporting_flag = before


def _pop(current: Pass) -> None:
    current.paths.pop()


def make_plan(model: nn.Module, images: Tensor) -> Plan:
    """Run `model` on `images` (B, C, H, W) in its present mode, as it is exported, and plan its simulation.

    Raises:
        ValueError: for a batch norm that does not stand behind a convolution or linear map alone.
    """
    recording = Recording(images)
    with torch.no_grad(), as_exported(), tracked(model, recording), recording:
        model(images)
    return Planner(recording, model).plan()
