"""Inverted residual blocks executed depth-first: a tile passes through the whole block before the next one starts.

    conv first:   y = W2 act(W1 act_0(conv(x)))                      conv: k x k in groups; W1: C -> M; W2: M -> K
    MBConv:       y = W2 act(conv(act(W1 x)))                        W1: C -> M; conv: k x k in groups; W2: M -> K

each with biases (batch norms are folded into them), zeros outside of the map, stride 1 or 2, and x added if the block
has a shortcut. Layer by layer, the hidden tensor, M = e C channels wide, is written to memory and read back. Here it
exists only for a tile and a chunk of its channels at a time. On a CPU, tiles are bands of rows. On CUDA, a custom
kernel runs the conv-first form on blocks of pixels.

The operators are for inference. If gradients are needed, the plain block is computed, which is differentiable; exported
programs contain it too. `conv_first_path` and `mbconv_path` say which implementation is used, and why.

Source: Lavin 2024, arXiv:2404.03617 (blocks of the published code; depth-first execution of a residual block).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from gatewise.ops._backend import suits_triton
from gatewise.ops.block_fusion import cpu as cpu
from gatewise.ops.block_fusion.cpu import Unit
from gatewise.ops.block_fusion.plan import BlockShape, Form, Tile, cache_bytes, plan_bands

Activation = Literal["identity", "relu", "relu6", "silu", "gelu", "hardswish"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
}

Maps = Float[Tensor, "batch in_dim height width"]
Output = Float[Tensor, "batch dim out_height out_width"]
Spatial = Float[Tensor, "filtered group_width kernel kernel"]
Expand = Float[Tensor, "hidden expand_in 1 1"]
Project = Float[Tensor, "dim project_in 1 1"]
Bias = Float[Tensor, " _"]

CAPACITY = 4
"""Number of second-level caches that a CPU's tile may fill. Products stream through their operands, so up to here fewer
calls and halos gain more than the nearest cache does."""

_MOST_FILTERED, _MOST_OUT = 128, 256


class ExecutionPath(NamedTuple):
    """How a block is computed ("kernel", "bands" or "plain"), and why."""

    name: Literal["kernel", "bands", "plain"]
    reason: str


def fused_conv_first(
    x: Maps,
    spatial_weight: Spatial,
    spatial_bias: Bias | None,
    expand_weight: Expand,
    expand_bias: Bias | None,
    project_weight: Project,
    project_bias: Bias | None,
    *,
    stride: int = 1,
    spatial_activation: Activation = "identity",
    activation: Activation = "silu",
    residual: bool = False,
    tile: Tile | None = None,
) -> Output:
    """Compute the conv-first block, channels-last.

    Args:
        stride: stride of the spatial convolution, which pads by half of its odd kernel on each side.
        spatial_activation: activation after the spatial convolution.
        activation: activation after the expansion.
        residual: add x.
        tile: rows and hidden channels that a CPU works on at a time, where rows beyond the height are further images;
            None for what fits `CAPACITY` times its second-level cache.
    Raises:
        ValueError: if shapes do not fit together, the kernel is even, the stride is not 1 or 2, an activation is
            unknown, or a residual connects different shapes.
    """
    tensors: list[Any] = [x, spatial_weight, spatial_bias, expand_weight, expand_bias, project_weight, project_bias]
    shape = conv_first_shape(x, spatial_weight, expand_weight, project_weight, stride)
    _check(shape, tensors, (spatial_activation, activation), residual, tile)
    tensors = _autocast(tensors)
    options = (stride, spatial_activation, activation, residual)
    if conv_first_path(*tensors).name == "plain":
        return _plain_conv_first(*tensors, *options)
    rows, channels = _sizes_of(tile)
    y: Tensor = torch.ops.gatewise.fused_conv_first(*tensors, *options, rows, channels)
    return y


def fused_mbconv(
    x: Maps,
    expand_weight: Expand | None,
    expand_bias: Bias | None,
    spatial_weight: Spatial,
    spatial_bias: Bias | None,
    project_weight: Project,
    project_bias: Bias | None,
    *,
    stride: int = 1,
    expand_activation: Activation = "silu",
    spatial_activation: Activation = "silu",
    residual: bool = False,
    tile: Tile | None = None,
) -> Output:
    """Compute the MBConv block, channels-last. Without `expand_weight`, the spatial convolution maps C to M channels.

    Arguments and errors are those of `fused_conv_first`. The expanded map is padded with zeros, whatever its bias and
    activation would make of a zero input.
    """
    tensors: list[Any] = [x, expand_weight, expand_bias, spatial_weight, spatial_bias, project_weight, project_bias]
    shape = mbconv_shape(x, expand_weight, spatial_weight, project_weight, stride)
    _check(shape, tensors, (expand_activation, spatial_activation), residual, tile)
    tensors = _autocast(tensors)
    options = (stride, expand_activation, spatial_activation, residual)
    if mbconv_path(*tensors).name == "plain":
        return _plain_mbconv(*tensors, *options)
    rows, channels = _sizes_of(tile)
    y: Tensor = torch.ops.gatewise.fused_mbconv(*tensors, *options, rows, channels)
    return y


def fused_conv_first_reference(
    x: Maps,
    spatial_weight: Spatial,
    spatial_bias: Bias | None,
    expand_weight: Expand,
    expand_bias: Bias | None,
    project_weight: Project,
    project_bias: Bias | None,
    *,
    stride: int = 1,
    spatial_activation: Activation = "identity",
    activation: Activation = "silu",
    residual: bool = False,
) -> Output:
    """Compute the definition, layer by layer, in the given dtype."""
    y = ACTIVATIONS[spatial_activation](_convolve(x, spatial_weight, spatial_bias, stride))
    y = ACTIVATIONS[activation](F.conv2d(y, expand_weight, expand_bias))
    y = F.conv2d(y, project_weight, project_bias)
    return y + x if residual else y


def fused_mbconv_reference(
    x: Maps,
    expand_weight: Expand | None,
    expand_bias: Bias | None,
    spatial_weight: Spatial,
    spatial_bias: Bias | None,
    project_weight: Project,
    project_bias: Bias | None,
    *,
    stride: int = 1,
    expand_activation: Activation = "silu",
    spatial_activation: Activation = "silu",
    residual: bool = False,
) -> Output:
    """Compute the definition, layer by layer, in the given dtype."""
    y = x
    if expand_weight is not None:
        y = ACTIVATIONS[expand_activation](F.conv2d(x, expand_weight, expand_bias))
    y = ACTIVATIONS[spatial_activation](_convolve(y, spatial_weight, spatial_bias, stride))
    y = F.conv2d(y, project_weight, project_bias)
    return y + x if residual else y


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, 1, x.shape[1] // weight.shape[1])


def conv_first_path(*tensors: Tensor | None) -> ExecutionPath:
    """Return how `fused_conv_first` computes for these tensors, which are its tensor arguments in order.

    The kernel supports CUDA tensors other than float64, with as many filtered channels as input channels, at most 128,
    groups whose width is a power of 2, and at most 256 output channels.
    """
    x, spatial, _, _, _, project, _ = tensors
    general = _general_path(tensors)
    if general is not None or x is None or spatial is None or project is None:
        return general or ExecutionPath("plain", "a tensor is missing")
    filtered, group_width = spatial.shape[:2]
    if filtered != x.shape[1]:
        return ExecutionPath("plain", f"the kernel filters {x.shape[1]} channels into as many, not into {filtered}")
    if filtered > _MOST_FILTERED or project.shape[0] > _MOST_OUT:
        return ExecutionPath(
            "plain",
            f"the kernel holds at most {_MOST_FILTERED} filtered and {_MOST_OUT} output channels of a pixel, "
            f"not {filtered} and {project.shape[0]}",
        )
    if group_width & (group_width - 1):
        return ExecutionPath("plain", f"the kernel's groups are as wide as a power of 2, not {group_width}")
    return ExecutionPath("kernel", "CUDA, and all preconditions of the kernel hold")


def mbconv_path(*tensors: Tensor | None) -> ExecutionPath:
    """Return how `fused_mbconv` computes for these tensors, which are its tensor arguments. It has no kernel.

    Triton cannot read the neighbors of an expanded pixel from another's registers. Each of the k x k taps would have to
    expand its pixels again, which is k x k times the arithmetic of the expansion.
    """
    general = _general_path(tensors)
    return general or ExecutionPath("plain", "no kernel for MBConv: it would expand every pixel once per tap")


def _general_path(tensors: tuple[Tensor | None, ...]) -> ExecutionPath | None:
    """Return the path if it does not depend on the block's form; None if the tensors suit the kernels."""
    x = tensors[0]
    if x is None:
        return ExecutionPath("plain", "there is no input")
    if torch.compiler.is_exporting():
        return ExecutionPath("plain", "exported programs hold the library's convolutions")
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return ExecutionPath("plain", "gradients are needed, and the fused block is for inference")
    if x.numel() == 0:
        return ExecutionPath("plain", "an empty batch")
    if x.device.type == "cpu":
        return ExecutionPath("bands", "a CPU takes bands of rows")
    if not suits_triton(x):
        return ExecutionPath("plain", f"no kernel for {x.dtype} on {x.device.type}")
    return None


def _plain_conv_first(*arguments: Any) -> Tensor:
    *tensors, stride, spatial_activation, activation, residual = arguments
    return fused_conv_first_reference(
        *tensors, stride=stride, spatial_activation=spatial_activation, activation=activation, residual=residual
    )


def _plain_mbconv(*arguments: Any) -> Tensor:
    *tensors, stride, expand_activation, spatial_activation, residual = arguments
    return fused_mbconv_reference(
        *tensors,
        stride=stride,
        expand_activation=expand_activation,
        spatial_activation=spatial_activation,
        residual=residual,
    )


@custom_op(
    "gatewise::fused_conv_first",
    mutates_args=(),
    schema="(Tensor x, Tensor spatial_weight, Tensor? spatial_bias, Tensor expand_weight, Tensor? expand_bias, "
    "Tensor project_weight, Tensor? project_bias, int stride, str spatial_activation, str activation, bool residual, "
    "int rows, int channels) -> Tensor",
)
def _conv_first(
    x: Tensor,
    spatial_weight: Tensor,
    spatial_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    stride: int,
    spatial_activation: str,
    activation: str,
    residual: bool,
    rows: int,
    channels: int,
) -> Tensor:
    """Run the conv-first form; `rows` and `channels` of 0 leave the tile to the planner."""
    spatial = Unit(spatial_weight, spatial_bias, spatial_activation, stride)
    expand, project = Unit(expand_weight, expand_bias, activation), Unit(project_weight, project_bias)
    if x.device.type == "cuda":
        from gatewise.ops.block_fusion import triton as kernels

        return kernels.conv_first(x, spatial, expand, project, residual)
    tile = _tile(conv_first_shape(x, spatial_weight, expand_weight, project_weight, stride), x, rows, channels)
    return cpu.conv_first(x, spatial, expand, project, residual, tile)


@custom_op(
    "gatewise::fused_mbconv",
    mutates_args=(),
    schema="(Tensor x, Tensor? expand_weight, Tensor? expand_bias, Tensor spatial_weight, Tensor? spatial_bias, "
    "Tensor project_weight, Tensor? project_bias, int stride, str expand_activation, str spatial_activation, "
    "bool residual, int rows, int channels) -> Tensor",
)
def _mbconv(
    x: Tensor,
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    spatial_weight: Tensor,
    spatial_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    stride: int,
    expand_activation: str,
    spatial_activation: str,
    residual: bool,
    rows: int,
    channels: int,
) -> Tensor:
    expand = None if expand_weight is None else Unit(expand_weight, expand_bias, expand_activation)
    spatial = Unit(spatial_weight, spatial_bias, spatial_activation, stride)
    tile = _tile(mbconv_shape(x, expand_weight, spatial_weight, project_weight, stride), x, rows, channels)
    return cpu.mbconv(x, expand, spatial, Unit(project_weight, project_bias), residual, tile)


@_conv_first.register_fake
@_mbconv.register_fake
def _(x: Tensor, *arguments: Any) -> Tensor:
    # In both forms the projection is the fifth and the stride the seventh argument after x.
    dim, stride = arguments[4].shape[0], arguments[6]
    height, width = ((size - 1) // stride + 1 for size in x.shape[2:])
    return x.new_empty(x.shape[0], height, width, dim).permute(0, 3, 1, 2)


@register_flop_formula(torch.ops.gatewise.fused_conv_first)
def _conv_first_flops(x: Any, spatial: Any, _b0: Any, expand: Any, _b1: Any, project: Any, *_: Any, **kw: Any) -> int:
    """Count two per multiply-add of the three convolutions, each at the output's positions."""
    per_position = _size(spatial) + _size(expand) + _size(project)
    return 2 * _positions(kw["out_shape"]) * per_position


@register_flop_formula(torch.ops.gatewise.fused_mbconv)
def _mbconv_flops(x: Any, expand: Any, _b0: Any, spatial: Any, _b1: Any, project: Any, *_: Any, **kw: Any) -> int:
    """Count the same, with the expansion at the input's positions. Recomputation in halos does not count."""
    expanded = 0 if expand is None else _positions(x) * _size(expand)
    return 2 * (expanded + _positions(kw["out_shape"]) * (_size(spatial) + _size(project)))


def _size(shape: Any) -> int:
    return int(torch.Size(shape).numel())


def _positions(shape: Any) -> int:
    return int(shape[0] * shape[2] * shape[3])


def _sizes_of(tile: Tile | None) -> tuple[int, int]:
    return (0, 0) if tile is None else (tile.rows, tile.channels)


def _tile(shape: BlockShape, x: Tensor, rows: int, channels: int) -> Tile:
    if rows:
        return Tile(rows, shape.out_width, channels)
    return plan_bands(shape, CAPACITY * cache_bytes(), x.element_size())


def conv_first_shape(x: Tensor, spatial: Tensor, expand: Tensor, project: Tensor, stride: int) -> BlockShape:
    """Return the sizes of a conv-first block from its input and its weights."""
    return _shape("conv first", x, spatial, expand.shape[0], project, stride, True)


def mbconv_shape(x: Tensor, expand: Tensor | None, spatial: Tensor, project: Tensor, stride: int) -> BlockShape:
    """Return the sizes of an MBConv from its input and its weights."""
    return _shape("mbconv", x, spatial, spatial.shape[0], project, stride, expand is not None)


def _shape(
    form: Form, x: Tensor, spatial: Tensor, hidden: int, project: Tensor, stride: int, expands: bool
) -> BlockShape:
    if x.ndim != 4:
        raise ValueError(f"maps must be (batch, channels, height, width), not {tuple(x.shape)}")
    if spatial.ndim != 4 or project.ndim != 4:
        raise ValueError(f"weights must be (out, in, k, k), not {tuple(spatial.shape)} and {tuple(project.shape)}")
    batch, in_dim, height, width = x.shape
    group_width, _, kernel = spatial.shape[1:]
    dim = project.shape[0]
    # In half precision, chunks would have to be added in float32 and rounded once, as in the plain block.
    chunked = x.dtype.itemsize >= 4
    return BlockShape(form, batch, in_dim, hidden, dim, height, width, kernel, stride, group_width, expands, chunked)


def _check(
    shape: BlockShape,
    tensors: list[Tensor | None],
    activations: tuple[str, str],
    residual: bool,
    tile: Tile | None,
) -> None:
    """Raise unless everything fits together."""
    first, first_bias, second, second_bias, project, project_bias = tensors[1:]
    spatial, expand = (first, second) if shape.form == "conv first" else (second, first)
    if spatial is None or second is None or project is None:
        raise ValueError("a fused block needs its spatial convolution and its projection")
    if spatial.shape[2] != spatial.shape[3] or spatial.shape[2] % 2 == 0:
        raise ValueError(f"the spatial kernel must be square and odd, not {tuple(spatial.shape[2:])}")
    if shape.stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, not {shape.stride}")
    filtered_in = shape.in_dim if expand is None or shape.form == "conv first" else shape.hidden_dim
    filtered, width = spatial.shape[:2]
    if filtered_in % width or filtered % (filtered_in // width):
        raise ValueError(f"{filtered_in} channels into {filtered} are not a multiple of group width {width}")
    if expand is not None and expand.shape[1:] != (filtered if shape.form == "conv first" else shape.in_dim, 1, 1):
        raise ValueError(f"the expansion must be 1x1 and fit its input, not {tuple(expand.shape)}")
    if shape.form == "mbconv" and expand is not None and expand.shape[0] != filtered:
        raise ValueError(f"the spatial convolution filters {filtered} channels, the expansion makes {expand.shape[0]}")
    if project.shape[1:] != (shape.hidden_dim, 1, 1):
        raise ValueError(f"the projection must be (out, {shape.hidden_dim}, 1, 1), not {tuple(project.shape)}")
    for weight, bias in ((first, first_bias), (second, second_bias), (project, project_bias)):
        if bias is not None and (weight is None or bias.shape != weight.shape[:1]):
            raise ValueError(f"a bias has one entry per output channel of its weight, not {tuple(bias.shape)}")
    if unknown := set(activations) - set(ACTIVATIONS):
        raise ValueError(f"activations are {', '.join(ACTIVATIONS)}, not {', '.join(sorted(unknown))}")
    if residual and (shape.stride != 1 or shape.dim != shape.in_dim):
        raise ValueError(
            f"a residual needs stride 1 and equal channels, not stride {shape.stride} and {shape.in_dim}, {shape.dim}"
        )
    _check_tile(shape, tile)


def _check_tile(shape: BlockShape, tile: Tile | None) -> None:
    if tile is None:
        return
    if tile.rows < 1 or tile.channels < 1:
        raise ValueError(f"a tile needs a row and a channel at least, not {tuple(tile)}")
    if shape.form == "mbconv" and tile.channels < shape.hidden_dim and tile.channels % shape.group_width:
        raise ValueError(f"a chunk of {tile.channels} channels cuts groups of {shape.group_width}")


def _autocast(tensors: list[Tensor | None]) -> list[Any]:
    """Cast the arguments of a convolution as autocast does."""
    x = tensors[0]
    device = "meta" if x is None else x.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors]
