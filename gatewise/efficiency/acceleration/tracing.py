"""Symbolic tracing that treats this library's convolutions as leaves."""

from __future__ import annotations

from typing import TypeGuard

from torch import fx, nn

from gatewise.layers.depthwise_conv import DepthwiseConv2d


def is_convolution(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Return whether the module is only a convolution; a subclass may do more, such as apply an activation."""
    return type(module) in (nn.Conv2d, DepthwiseConv2d)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_convolution(m) or super().is_leaf_module(m, module_qualified_name)


def trace(module: nn.Module) -> fx.Graph:
    """Return the graph of `module`'s calls. Raises whatever the module's code raises for proxies of tensors."""
    return _Tracer().trace(module)
