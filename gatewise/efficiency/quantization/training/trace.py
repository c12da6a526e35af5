"""The PyTorch function calls of one pass of a network, with the modules whose code makes them.

Recording calls instead of modules finds sums, concatenations and functional activations in any network that runs. A
call is identified by the path of its module, its kind, and how many of that kind the module made before. Calls that
happen only in training (drop path) therefore change nothing elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_KINDS = {
    # Our custom operator, which replaces conv2d in training, has the same first three arguments.
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
"""Functions that return their input at inference: exporters omit them."""
SUMS = ("add", "mul")
KINDS = frozenset(_KINDS.values())
"""Kinds of calls at which something may become codes."""


class CallKey(NamedTuple):
    """One call in a pass: the calling module, the kind, and how many of the kind came before it there."""

    path: str
    kind: str
    number: int


def kind_of(function: Callable[..., Any]) -> str | None:
    """Return the kind of a PyTorch function at which something may become codes, or None."""
    return _KINDS.get(getattr(function, "__name__", ""))


def name_of(function: Callable[..., Any]) -> str:
    """Return the name under which calls of this function are counted: its kind, or else its name."""
    return kind_of(function) or str(getattr(function, "__name__", function))


def operands(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return a call's arguments that can be activations: both of a sum, all of a concatenation, else the first."""
    if kind == "cat":
        return list(args[0] if args else kwargs["tensors"])
    if kind in SUMS:
        return [*args, *(kwargs[name] for name in ("other",) if name in kwargs)][:2]
    return [args[0] if args else kwargs["input"]]


def addcmul_terms(
    current: Pass, types: Any, x: Tensor, first: Tensor, second: Tensor, *, value: float = 1
) -> tuple[Tensor, Tensor]:
    """Return the two terms of `torch.addcmul`, which exporters write as a product and a sum."""
    product = current.__torch_function__(torch.mul, types, (first, second))
    return x, product if value == 1 else current.__torch_function__(torch.mul, types, (product, value))


class Pass(TorchFunctionMode):
    """One pass of a network, whose calls are counted by module. Modules report when they start and end."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = [""]
        self._counts: Counter[tuple[str, str]] = Counter()

    def key(self, kind: str) -> CallKey:
        """Return the key of the next call of this kind."""
        place = self.paths[-1], kind
        self._counts[place] += 1
        return CallKey(*place, self._counts[place] - 1)


@dataclass(frozen=True)
class Call:
    """A recorded call: its operands that depend on the network's input, and its results.

    Attributes:
        name: name of the function.
        is_layer: whether it is a convolution or linear layer with a weight of the network.
        moves: whether it returns values of its input unchanged.
        pads: whether it pads its input with zeros.
        axes: axes of a mean.
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
        if name_of(func) == "addcmul":
            return self.__torch_function__(torch.add, types, addcmul_terms(self, types, *args, **kwargs))
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


@contextmanager
def tracked(model: nn.Module, current: Pass) -> Iterator[None]:
    """Make the modules of `model` report their starts and ends to `current` within the block."""
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
    """Make operators call the library's functions within the block, as during export, so that calls are visible."""
    before = torch.compiler._is_exporting_flag
    torch.compiler._is_exporting_flag = True
    try:
        yield
    finally:
        torch.compiler._is_exporting_flag = before


def _pop(current: Pass) -> None:
    current.paths.pop()


def record(model: nn.Module, images: Tensor) -> Recording:
    """Run `model` on `images` (B, C, H, W) in its current mode, as it is exported, and record the pass."""
    recording = Recording(images)
    with torch.no_grad(), as_exported(), tracked(model, recording), recording:
        model(images)
    return recording
