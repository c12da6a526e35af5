"""Folding for inference: turn a network into an equal one without batch norms, branches and scales.

There are two steps. First every module that defines `merged()` is replaced by what that returns, since networks know
best how their own parts collapse. Then each batch norm that still follows a convolution or a linear layer is folded
into it. torch.fx finds those pairs where it can trace; a module that it cannot trace is split and tried part by part.
"""

from __future__ import annotations

from copy import deepcopy

from torch import Tensor, fx, nn

from gatewise.efficiency.acceleration.tracing import is_convolution, trace
from gatewise.efficiency.inputs import check_inference
from gatewise.layers.fold_norm import Affine, fold_into_previous


def fold(model: nn.Module) -> nn.Module:
    """Return a copy of `model` for inference with everything possible folded. `model` itself is not modified.

    A module may define `merged(self) -> nn.Module`, which returns an equal module for inference, with norms folded and
    branches merged. It is called on the outermost such module first, then on those inside of the result.

    Raises:
        ValueError: if any part of `model` is in training mode, where batch norms depend on the batch and cannot be
            folded.
    """
    check_inference(model, "folding")
    folded = _merge(deepcopy(model), {})
    _fold_norms(folded, _module_uses(folded))
    return folded.eval()


def _merge(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """Apply `merged()` from the outside in; a module that is used twice is still used twice."""
    if module in done:
        return done[module]
    merged = getattr(module, "merged", None)
    result = merged() if callable(merged) else module
    if not isinstance(result, nn.Module):
        raise TypeError(f"{type(module).__name__}.merged() must return a module, not {type(result).__name__}")
    done[module] = result
    # Unlike named_children(), this keeps the second appearance of a module.
    for name, child in list(result._modules.items()):
        if child is not None:
            setattr(result, name, _merge(child, done))
    return result


def _fold_norms(module: nn.Module, uses: dict[nn.Module, int]) -> None:
    if not any(type(inner) in (nn.BatchNorm2d, nn.BatchNorm1d) for inner in module.modules()):
        return
    try:
        graph = trace(module)
    except Exception:
        # Tracing runs the network's own code with proxies for tensors, and that code may raise anything. A part that
        # cannot be traced keeps its norms; its children are tried separately.
        for child in module.children():
            _fold_norms(child, uses)
        return
    for node in graph.nodes:
        pair = _foldable_pair(node, module)
        if pair is not None and _serve_once(graph, uses, {node.args[0]: pair[0], node: pair[1]}):
            fold_into_previous(*pair)
            _replace(module, node.target, FoldedNorm1d() if isinstance(pair[1], nn.BatchNorm1d) else nn.Identity())


def _foldable_pair(node: fx.Node, root: nn.Module) -> tuple[Affine, nn.BatchNorm2d | nn.BatchNorm1d] | None:
    """Return layer and norm, if `node` calls a norm on the output of a layer that has no other user."""
    before = node.args[0] if node.args else None
    if not isinstance(before, fx.Node) or len(before.users) != 1:
        return None
    layer, norm = _called(before, root), _called(node, root)
    # Exact types: a subclass may do more than its parent, such as apply an activation inside of the norm.
    if is_convolution(layer) and type(norm) is nn.BatchNorm2d and norm.running_mean is not None:
        return layer, norm
    if type(layer) is nn.Linear and type(norm) is nn.BatchNorm1d and norm.running_mean is not None:
        return layer, norm
    return None


def _serve_once(graph: fx.Graph, uses: dict[nn.Module, int], calls: dict[fx.Node, nn.Module]) -> bool:
    """Return whether only these nodes call these modules and read their weights."""
    readers = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
    for path, module in ((str(node.target), module) for node, module in calls.items()):
        touched = sum(target == path or target.startswith(f"{path}.") for target in readers)
        if touched != 1 or uses[module] != 1:
            return False
    return True


class FoldedNorm1d(nn.Module):
    """Placeholder for a batch norm that was folded into the linear layer before it: (B, C) -> (B, C), unchanged.

    The norm could also have taken (B, C, L), and would then have acted along another axis than the linear layer.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 2:
            raise ValueError(
                f"a batch norm was folded into the linear layer before it for inputs (batch, features), not for shape "
                f"{tuple(x.shape)}; use the network unfolded"
            )
        return x


def _called(node: fx.Node, root: nn.Module) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _module_uses(model: nn.Module) -> dict[nn.Module, int]:
    """Return how often each module appears in the tree."""
    uses: dict[nn.Module, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        uses[module] = uses.get(module, 0) + 1
    return uses
