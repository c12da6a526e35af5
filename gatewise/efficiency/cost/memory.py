"""Peak memory by stage: the most bytes of activations alive at once while each part of a network runs."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gatewise.efficiency.cost.count import parts_of
from gatewise.efficiency.inputs import check_example, eval_mode, run


@dataclass(frozen=True)
class StageMemory:
    """Bytes of activations while one part of a network ran.

    Attributes:
        peak_bytes: the most bytes alive at once, including those of earlier parts that are still needed.
        left_bytes: bytes alive when the part had finished.
    """

    name: str
    peak_bytes: int
    left_bytes: int


def memory_by_stage(model: nn.Module, example: Tensor) -> tuple[StageMemory, ...]:
    """Measure live activations of one inference pass, for each part of the network in the order of `count`.

    A tensor counts from the operator that makes it until nothing refers to it. Weights, the example, and a kernel's own
    workspace are not counted. A part that runs several times reports its largest figures. The network runs once in eval
    mode; on the `meta` device nothing is allocated.

    Raises:
        TypeError: if `example` is not a tensor.
        ValueError: if the network cannot run on it.
    """
    check_example(model, example)
    live = _Live(model, example)
    stages = [_Stage(name, module, live) for name, module in parts_of(model)]
    handles = [handle for stage in stages for handle in stage.attach()]
    try:
        with eval_mode(model), live:
            run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(StageMemory(stage.name, stage.peak, stage.left) for stage in stages if stage.ran)


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that operators have made and that are still alive."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()
        held = (*model.parameters(), *model.buffers(), example)
        self._known: dict[int, Any] = {_key(tensor): None for tensor in held}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _key(tensor) not in self._known:
                self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = _key(tensor), storage.nbytes()

        def forget(_: Any) -> None:
            self._known.pop(key, None)
            self.bytes -= size

        self._known[key] = weakref.ref(storage, forget)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def _key(tensor: Tensor) -> int:
    # The address of the storage object: on the meta device data has no address.
    return tensor.untyped_storage()._cdata


class _Stage:
    """Figures between entering and leaving a module or, where only its members are called, the outermost of those."""

    def __init__(self, name: str, module: nn.Module, live: _Live) -> None:
        self.name, self.module, self.live = name, module, live
        self.depth = self.peak = self.left = 0
        self.ran = False

    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        handles = []
        for module in self.module.modules():
            handles += [module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave)]
        return handles

    def _enter(self, module: nn.Module, inputs: object) -> None:
        if self.depth == 0:
            self.live.peak = self.live.bytes
        self.depth += 1

    def _leave(self, module: nn.Module, inputs: object, output: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.ran = True
            self.peak, self.left = max(self.peak, self.live.peak), max(self.left, self.live.bytes)
