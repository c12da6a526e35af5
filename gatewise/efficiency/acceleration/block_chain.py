"""Read a module as an inverted residual: a chain of convolutions and activations, with or without a shortcut.

A module is recognized by what it computes, not by its name. torch.fx traces its forward pass, and the trace must hold
two or three convolutions, one of them spatial, followed by norms in eval mode and activations, and at most an addition
of the input at the end.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatewise.efficiency.acceleration.tracing import is_convolution, trace
from gatewise.layers.fold_norm import scale_and_shift
from gatewise.ops.block_fusion import Activation
from gatewise.ops.block_fusion.plan import Form


class NotABlockError(Exception):
    """The module is not an inverted residual that can be fused; the message says why."""


@dataclass(frozen=True)
class ConvUnit:
    """A convolution with what is folded into it, and the activation after it."""

    weight: Tensor
    bias: Tensor | None
    stride: int = 1
    groups: int = 1
    activation: Activation = "identity"

    @property
    def kernel_size(self) -> int:
        return self.weight.shape[-1]

    @property
    def is_pointwise(self) -> bool:
        return (self.kernel_size, self.stride, self.groups) == (1, 1, 1)


@dataclass(frozen=True)
class Block:
    """The parts of a fused block; `expand` is None if the spatial convolution expands."""

    form: Form
    spatial: ConvUnit
    expand: ConvUnit | None
    project: ConvUnit
    residual: bool


_MODULES: dict[type[nn.Module], Activation] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
}
_FUNCTIONS: dict[Callable[..., Any], Activation] = {
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.gelu: "gelu",
    F.hardswish: "hardswish",
}
_METHODS: dict[str, Activation] = {"relu": "relu", "relu_": "relu"}
_PASSING = (nn.Identity, nn.Dropout, nn.Dropout2d)
_ADDITIONS = (operator.add, operator.iadd, torch.add)
# Squeeze-and-excitation begins with one of these modules, functions or methods.
_POOLS = ("mean", "AdaptiveAvgPool2d", "adaptive_avg_pool2d")
# Functions that leave a tensor unchanged outside of training, with the position of their `training` argument.
_TRAINING_ARGUMENT = {"dropout": 2, "stochastic_depth": 3}
# Calls that only inspect a tensor, such as checks of its shape.
_LOOKS = (getattr, operator.eq, torch._assert)


def read_block(module: nn.Module) -> Block:
    """Return the block that `module` computes in eval mode, with its norms folded.

    Raises:
        NotABlockError: if it computes anything else.
    """
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d) and not is_convolution(conv):
            raise NotABlockError(f"{type(conv).__name__} is a convolution of another kind, and may pad in its own way")
    try:
        graph = trace(module)
    except Exception as failure:
        # Tracing runs the module's own code with proxies for tensors, and that code may raise anything.
        raise NotABlockError(f"its forward pass cannot be traced ({type(failure).__name__})") from failure
    reader = _Reader(module)
    for node in graph.nodes:
        reader.read(node)
    return _block(reader.units, reader.residual)


def _is_addition(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _ADDITIONS
    return node.op == "call_method" and node.target in ("add", "add_")


class _Reader:
    """Follows the single tensor that runs through a graph."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.units: list[ConvUnit] = []
        self.residual = False
        self.source: fx.Node | None = None
        self.current: fx.Node | None = None

    def read(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if self.source is None:
                self.source = self.current = node
        elif node.op == "output":
            if node.args[0] is not self.current:
                raise NotABlockError("it returns something other than the end of a chain")
        elif node.op != "get_attr" and node.target not in _LOOKS:
            self._step(node)
            self.current = node

    def _step(self, node: fx.Node) -> None:
        if _is_addition(node):
            self._add(node)
            return
        if not node.args or node.args[0] is not self.current:
            raise NotABlockError(f"{self._name(node)} takes something other than the previous output")
        if self._passes(node):
            return
        if self.residual:
            raise NotABlockError(f"{self._name(node)} after the shortcut")
        activation = self._activation(node)
        if activation is not None:
            self._activate(activation)
        elif (norm := self._norm(node)) is not None:
            self._fold(*norm)
        else:
            self.units.append(self._convolution(node))

    def _add(self, node: fx.Node) -> None:
        if self.residual or node.kwargs or set(node.args) != {self.source, self.current} or not self.units:
            raise NotABlockError("an addition that is not a shortcut around the block")
        self.residual = True

    def _passes(self, node: fx.Node) -> bool:
        """Return whether the node does nothing in eval mode."""
        if node.op == "call_module":
            return isinstance(self._called(node), _PASSING)
        name = str(getattr(node.target, "__name__", ""))
        if name not in _TRAINING_ARGUMENT:
            return False
        position = _TRAINING_ARGUMENT[name]
        given = node.args[position] if len(node.args) > position else node.kwargs.get("training", True)
        return given is False

    def _activation(self, node: fx.Node) -> Activation | None:
        if node.op == "call_method":
            return _METHODS.get(str(node.target))
        if node.op == "call_function":
            exact = node.kwargs.get("approximate", "none") == "none"
            return _FUNCTIONS.get(node.target) if callable(node.target) and exact else None
        module = self._called(node)
        if isinstance(module, nn.GELU) and module.approximate != "none":
            return None
        return _MODULES.get(type(module))

    def _activate(self, activation: Activation) -> None:
        if not self.units:
            raise NotABlockError("an activation before the first convolution")
        if self.units[-1].activation != "identity":
            raise NotABlockError("two activations in a row")
        self.units[-1] = replace(self.units[-1], activation=activation)

    def _norm(self, node: fx.Node) -> tuple[Tensor, Tensor] | None:
        """Return the scale and shift of a batch norm; None if the node is something else."""
        if node.op == "call_module":
            module = self._called(node)
            return scale_and_shift(module) if type(module) is nn.BatchNorm2d else None
        if node.target is not F.batch_norm:
            return None
        names = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given: dict[str, Any] = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
        mean, var = self._tensor(given.get("running_mean")), self._tensor(given.get("running_var"))
        if given.get("training", False) or mean is None or var is None:
            raise NotABlockError("a batch norm that uses the batch's statistics")
        norm = nn.BatchNorm2d(len(mean), eps=given.get("eps", 1e-5), device="meta").eval()
        norm.running_mean, norm.running_var = mean, var
        weight, bias = self._tensor(given.get("weight")), self._tensor(given.get("bias"))
        norm.weight = nn.Parameter(torch.ones_like(mean) if weight is None else weight.detach())
        norm.bias = nn.Parameter(torch.zeros_like(mean) if bias is None else bias.detach())
        return scale_and_shift(norm)

    def _fold(self, scale: Tensor, shift: Tensor) -> None:
        if not self.units or self.units[-1].activation != "identity":
            raise NotABlockError("a batch norm that is not directly after a convolution")
        unit = self.units[-1]
        weight = (unit.weight * scale[:, None, None, None]).to(unit.weight.dtype)
        bias = shift if unit.bias is None else unit.bias * scale + shift
        self.units[-1] = replace(unit, weight=weight, bias=bias.to(weight.dtype))

    def _convolution(self, node: fx.Node) -> ConvUnit:
        conv = self._called(node) if node.op == "call_module" else None
        if not isinstance(conv, nn.Conv2d):
            name = self._name(node)
            raise NotABlockError(f"{name} needs whole maps" if name in _POOLS else f"{name} in the chain")
        kernel, border = conv.kernel_size, tuple(size // 2 for size in conv.kernel_size)
        same = conv.padding == "same" and conv.stride == (1, 1)
        if kernel[0] != kernel[1] or kernel[0] % 2 == 0 or conv.stride not in ((1, 1), (2, 2)):
            raise NotABlockError(f"a convolution of {kernel} with stride {conv.stride}")
        if conv.dilation != (1, 1) or conv.padding_mode != "zeros" or not (same or conv.padding == border):
            raise NotABlockError(f"a convolution with dilation {conv.dilation} and padding {conv.padding}")
        bias = None if conv.bias is None else conv.bias.detach()
        return ConvUnit(conv.weight.detach(), bias, conv.stride[0], conv.groups)

    def _tensor(self, node: Any) -> Tensor | None:
        """Return the tensor of a node that fetches an attribute."""
        if not isinstance(node, fx.Node):
            return None
        return operator.attrgetter(str(node.target))(self.module)

    def _called(self, node: fx.Node) -> nn.Module:
        return self.module.get_submodule(str(node.target))

    def _name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return type(self._called(node)).__name__
        return str(getattr(node.target, "__name__", node.target))


def _block(units: list[ConvUnit], residual: bool) -> Block:
    """Build the block that these convolutions form."""
    if len(units) not in (2, 3):
        raise NotABlockError(f"{len(units)} convolutions where a block has two or three")
    *front, project = units
    if not project.is_pointwise:
        raise NotABlockError("the last convolution is not pointwise")
    if project.activation != "identity":
        raise NotABlockError("an activation after the projection")
    spatial = [unit for unit in front if unit.kernel_size > 1]
    if len(spatial) != 1:
        raise NotABlockError(f"{len(spatial)} spatial convolutions before the projection where a block has one")
    others = [unit for unit in front if unit.kernel_size == 1]
    if not all(unit.is_pointwise for unit in others):
        raise NotABlockError("a 1x1 convolution with stride or groups")
    if not others:
        return Block("mbconv", spatial[0], None, project, residual)
    if front[0] is spatial[0]:
        return Block("conv first", spatial[0], others[0], project, residual)
    if spatial[0].weight.shape[0] != others[0].weight.shape[0]:
        raise NotABlockError("a spatial convolution that changes the hidden width")
    return Block("mbconv", spatial[0], others[0], project, residual)
