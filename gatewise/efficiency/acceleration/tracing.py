"""Symbolic tracing that takes this library's convolutions for what they are."""

from __future__ import annotations

from typing import TypeGuard

from torch import fx, nn

from gatewise.layers.depthwise_conv import DepthwiseConv2d


def is_convolution(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Whether the module computes a convolution and nothing else; a subclass may do more (an activation, say)."""
    return type(module) in (nn.Conv2d, DepthwiseConv2d)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_convolution(m) or super().is_leaf_module(m, module_qualified_name)


def trace(module: nn.Module) -> fx.Graph:
    """The graph of `module`'s calls; raises whatever its own code does with stand-ins for tensors."""
    return _Tracer().trace(module)
