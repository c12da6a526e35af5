"""Replace norms and activations by EvoNorm (a transform).

Every norm over maps that is followed by an activation becomes one EvoNorm layer, and the activation is removed. A norm
without one (at the end of a residual branch, in a shortcut) becomes a weight and a bias or, with S0a, S1a and S2a, a
division by the group's standard deviation. The network must be trained afterwards: weights trained with batch norm do
not carry over.

Source: Liu et al. 2020, arXiv:2004.02967, section 4: hyper-parameters that suit batch norm are kept. B0 needs a
learning rate warm-up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatewise.layers.conv import ConvNormAct
from gatewise.layers.evonorm import LAYERS, LayerName, NormActivation
from gatewise.methods._base import register_transform

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm)
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish)
_FUNCTIONS: tuple[Callable[..., Tensor], ...] = (
    torch.relu,
    torch.relu_,
    F.relu,
    F.relu6,
    F.leaky_relu,
    F.elu,
    F.gelu,
    F.silu,
    F.mish,
    F.hardswish,
)


@register_transform
def swap_norms(
    model: nn.Module,
    *,
    layer: LayerName = "S0",
    eps: float | None = None,
    groups: int = 32,
    group_size: int | None = None,
    momentum: float = 0.1,
    unbiased: bool = True,
    centered: bool = False,
) -> nn.Module:
    """Replace each batch or group norm over maps in `model`, with the activation after it, by EvoNorm.

    Weights and biases of the norms are kept, so branches that start at zero still do. If an activation is a call in a
    module's own code, or a module used in several places, the module that calls it is replaced by its traced form, with
    the same submodules under the same names.

    Args:
        model: the network, changed in place.
        layer: EvoNorm layer, B0 to S2a, or a norm and activation to compare with, such as BN-SiLU.
        eps: numerical stabilizer; None for the layer's own.
        groups: number of groups of the S series, decreased until it divides the channels.
        group_size: channels per group, instead of `groups`.
        momentum: momentum of the B series' running variance.
        unbiased: use an unbiased running variance, as batch norms do; the official code is biased.
        centered: use B1 and B2 as the paper writes them.
    Returns:
        `model`, or its traced form.
    Raises:
        ValueError: if `model` has no such norm, or is one itself, or the operation after a norm cannot be determined.
    """
    choice = NormActivation(layer, eps, groups, group_size, momentum, unbiased, centered)
    if isinstance(model, _NORMS):
        raise ValueError("a norm by itself shows no activation after it: swap the norms of the module that contains it")
    if not any(isinstance(module, _NORMS) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no batch or group norm over maps to swap")
    # All changes are planned before any is made, so that a rejected network stays intact.
    plans = {module: _plan(module, f"{type(model).__name__}.{path}".rstrip(".")) for path, module in _holders(model)}
    return _swap(model, plans, choice, {})


@dataclass(frozen=True)
class _Plan:
    """Changes to one module that holds norms.

    Args:
        with_act: whether each norm gets the activation.
        graph: the module's own code, if it had to be traced.
        activations: nodes of the graph to remove.
    """

    with_act: dict[str, bool]
    graph: fx.Graph | None = None
    activations: tuple[fx.Node, ...] = ()


def _holders(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, module) for path, module in model.named_modules() if _norms(module)]


def _norms(module: nn.Module) -> list[str]:
    if isinstance(module, _NORMS):
        return []
    return [name for name, child in module.named_children() if isinstance(child, _NORMS)]


def _plan(module: nn.Module, path: str) -> _Plan:
    if isinstance(module, ConvNormAct):
        return _Plan({"norm": not isinstance(module.act, nn.Identity)})
    inside = {name: _holds_activation(module.get_submodule(name)) for name in _norms(module)}
    if all(held is not None for held in inside.values()):
        return _Plan({name: bool(held) for name, held in inside.items()})
    graph = _trace(module, path)
    followers = _followers(graph, [name for name, held in inside.items() if held is None], module, path)
    with_act = {name: followers.get(name) is not None if held is None else held for name, held in inside.items()}
    return _Plan(with_act, graph, tuple(node for node in followers.values() if node is not None))


def _swap(
    module: nn.Module, plans: dict[nn.Module, _Plan], choice: NormActivation, done: dict[nn.Module, nn.Module]
) -> nn.Module:
    """Return `module` with its norms replaced, or a new module if its own code had to change. Sharing is preserved."""
    if module in done or isinstance(module, _NORMS):
        return done.get(module, module)
    for name, child in list(module._modules.items()):
        if child is not None:
            setattr(module, name, _swap(child, plans, choice, done))
    done[module] = _carry_out(module, plans[module], choice) if module in plans else module
    return done[module]


def _carry_out(module: nn.Module, plan: _Plan, choice: NormActivation) -> nn.Module:
    for name, act in plan.with_act.items():
        setattr(module, name, _replacement(module.get_submodule(name), choice, act))
    if isinstance(module, ConvNormAct):
        module.act = nn.Identity()
    return module if plan.graph is None else _without(module, plan.graph, plan.activations)


def _holds_activation(norm: nn.Module) -> bool | None:
    """Return whether a norm applies an activation itself, as timm's do; None if it cannot."""
    act = getattr(norm, "act", None)
    return not isinstance(act, nn.Identity) if isinstance(act, nn.Module) else None


def _replacement(norm: Any, choice: NormActivation, act: bool) -> nn.Module:
    """Return the chosen layer with the norm's weight and bias, device, dtype and mode."""
    dim = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
    new = choice.build(dim, act)
    if norm.weight is not None:
        new.to(norm.weight.device, norm.weight.dtype)
        affine = new if choice.layer not in _PAIRS else new.get_submodule("norm")
        with torch.no_grad():
            affine.get_parameter("weight").copy_(norm.weight)
            affine.get_parameter("bias").copy_(norm.bias)
    return new.train(norm.training)


_PAIRS = tuple(name for name in LAYERS if "-" in name)


class _OwnCode(fx.Tracer):
    """Traces a module's own code; its submodules are leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _trace(module: nn.Module, path: str) -> fx.Graph:
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        raise ValueError(
            f"what follows the norms in {path} cannot be seen: it is a list, and what calls them is elsewhere"
        )
    try:
        return _OwnCode().trace(module)
    except Exception as error:
        # Tracing runs the module's own code with proxies for tensors, and that code may raise anything.
        raise ValueError(f"what follows the norms in {path} cannot be seen: {type(error).__name__}: {error}") from error


def _followers(graph: fx.Graph, norms: list[str], module: nn.Module, path: str) -> dict[str, fx.Node | None]:
    """Map each called norm to the activation that is the only user of its output, if any."""
    followers: dict[str, fx.Node | None] = {}
    for node in graph.nodes:
        if node.op != "call_module" or node.target not in norms:
            continue
        users = list(node.users)
        follower = users[0] if len(users) == 1 and _is_activation(users[0], module) else None
        if node.target in followers and (follower is None) != (followers[node.target] is None):
            raise ValueError(f"{path}.{node.target} is used with an activation and without: give each use its own norm")
        followers[node.target] = follower
    return followers


def _is_activation(node: fx.Node, owner: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(owner.get_submodule(str(node.target)), _ACTIVATIONS)
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return node.op == "call_function" and node.target in _FUNCTIONS


def _without(module: nn.Module, graph: fx.Graph, activations: Sequence[fx.Node]) -> nn.Module:
    """Return `module` without these nodes, with identities in their place if possible, or else in its traced form."""
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    if all(node.op == "call_module" and calls.count(node.target) == 1 for node in activations):
        for node in activations:
            parent, _, name = str(node.target).rpartition(".")
            setattr(module.get_submodule(parent), name, nn.Identity())
        return module
    for node in activations:
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.erase_node(node)
    return fx.GraphModule(module, graph, type(module).__name__).train(module.training)
