"""Rewrite an exported graph into operators that a compiler for the CPU turns into faster code. The graph computes the
same as before, only with other operators.

- A linear layer becomes a 1x1 convolution over channels-last memory, which is the same storage. The compiler packs the
  weights of convolutions for oneDNN and fuses the following operators into them. float32 matrix products go to a
  library whose speed on small products is a fraction of that on some processors.
- A depthwise convolution becomes the sum over its taps of shifted input times weight. Those are pointwise operators,
  which the compiler fuses with each other and with their neighbors (splits, activations, sums) into one pass over
  memory, where a library call would copy slices in and out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

MOST_TAPS = 49
"""Depthwise kernels with more taps are not rewritten: their code would take minutes to compile."""

Pair = tuple[int, int]


def linear_as_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear` as a convolution: (..., C) -> (..., C')."""
    kernel = weight[:, :, None, None]
    if x.ndim == 4:
        return F.conv2d(x.permute(0, 3, 1, 2), kernel, bias).permute(0, 2, 3, 1)
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    return F.conv2d(rows, kernel, bias).permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def depthwise_by_taps(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """Compute a depthwise `F.conv2d` with one kernel per channel: (B, C, H, W) -> (B, C, H', W')."""
    spans = [dilation[axis] * (weight.shape[2 + axis] - 1) for axis in (0, 1)]
    sizes = [(x.shape[2 + axis] + 2 * padding[axis] - spans[axis] - 1) // stride[axis] + 1 for axis in (0, 1)]
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    total = None if bias is None else bias[:, None, None]
    for row in range(weight.shape[2]):
        rows = _strided(row * dilation[0], sizes[0], stride[0])
        for column in range(weight.shape[3]):
            columns = _strided(column * dilation[1], sizes[1], stride[1])
            term = padded[:, :, rows, columns] * weight[:, 0, row, column, None, None]
            total = term if total is None else total + term
    if total is None:
        raise ValueError("a depthwise kernel has at least one tap")
    return total


def _strided(start: int, size: int, stride: int) -> slice:
    return slice(start, start + stride * (size - 1) + 1, stride)


def linears_to_convolutions(graph: fx.GraphModule) -> int:
    """Rewrite every linear layer of an exported graph in place, and return how many there were."""
    nodes = [node for node in graph.graph.nodes if node.target is torch.ops.aten.linear.default]
    for node in nodes:
        node.target = linear_as_convolution
    graph.recompile()
    return len(nodes)


def unroll_depthwise(graph: fx.GraphModule) -> int:
    """Rewrite every small depthwise convolution of an exported graph in place, and return how many there were."""
    changed = 0
    for node in graph.graph.nodes:
        arguments = _depthwise_arguments(node)
        if arguments is not None:
            node.target = depthwise_by_taps
            node.args, node.kwargs = arguments, {}
            changed += 1
    graph.recompile()
    return changed


def _depthwise_arguments(node: fx.Node) -> tuple[Any, ...] | None:
    """Return `depthwise_by_taps`'s arguments for this node, or None if it is not a small depthwise convolution."""
    if node.target is not torch.ops.aten.conv2d.default:
        return None
    arguments: tuple[Any, ...] = (*node.args, *_DEFAULTS[len(node.args) - 2 :])
    x, weight, bias, stride, padding, dilation, groups = arguments
    shape = weight.meta["val"].shape
    if groups == 1 or groups != shape[0] or shape[1] != 1 or shape[2] * shape[3] > MOST_TAPS:
        return None
    return x, weight, bias, _pair(stride), _pair(padding), _pair(dilation)


# Defaults of aten::conv2d after input and weight; an exported call omits arguments equal to them.
_DEFAULTS = (None, (1, 1), (0, 0), (1, 1), 1)


def _pair(values: list[int] | Pair) -> Pair:
    return (values[0], values[-1])
