"""TVConv: depthwise kernels that depend on the position but not on the image.

A few learned maps A, the affinity maps, distinguish positions, and a small network of convolutions G turns them into a
K x K kernel for every channel and position:

    W = G(A),   y = translation_variant_conv(x, W, bias),   bias = G_b(A) if there is one
    G = (conv3x3, layer norm over channels and positions, ReLU) x (L + 1), then conv3x3 to C K K channels

A starts as ones. At first, only the zero padding around the maps distinguishes positions. Later, the scales and shifts
of the layer norms, which are maps too, and A itself do so as well. W does not depend on x. It is computed once and kept
in eval mode.

Source: Chen et al. 2022, arXiv:2203.10489, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.layers.fold_norm import scale_and_shift
from gatewise.layers.inverted_residual import InvertedResidual
from gatewise.ops.precision import without_autocast
from gatewise.ops.translation_variant_conv import arrange_weight, output_size, translation_variant_conv

Size = tuple[int, int]
"""Rows and columns."""


@dataclass(frozen=True)
class TVConvOptions:
    """Options of the kernel generator. The defaults are those of the published training scripts.

    Args:
        kernel_size: odd kernel size K.
        affinity_channels: number of maps in A.
        hidden: number of channels within the generator.
        hidden_layers: number L of generator blocks after the first.
        bias: whether every channel and position has a bias, from its own generator.
        norm: whether the generator has layer norms; without, only A and the zero padding distinguish positions.
    """

    kernel_size: int = 3
    affinity_channels: int = 4
    hidden: int = 64
    hidden_layers: int = 3
    bias: bool = False
    norm: bool = True

    def __post_init__(self) -> None:
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"the kernel_size of a TVConv must be odd and positive, not {self.kernel_size}")
        if self.affinity_channels < 1 or self.hidden < 1:
            raise ValueError(
                f"affinity_channels and hidden must be positive, not {self.affinity_channels} and {self.hidden}"
            )
        if self.hidden_layers < 0:
            raise ValueError(f"hidden_layers must be 0 or more, not {self.hidden_layers}")


class _Conv3x3(nn.Conv2d):
    """3x3 convolution without bias, computed in the dtype of its input."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__(in_dim, dim, 3, padding=1, bias=False)

    def forward(self, maps: Float[Tensor, "one in_dim h w"]) -> Float[Tensor, "one dim h w"]:
        return F.conv2d(maps, self.weight.to(maps.dtype), padding=1)


class _MapNorm(nn.LayerNorm):
    """Layer norm over channels and positions together, computed in the dtype of its input."""

    def forward(self, maps: Float[Tensor, "one dim h w"]) -> Float[Tensor, "one dim h w"]:
        return F.layer_norm(maps, self.normalized_shape, self.weight.to(maps), self.bias.to(maps), self.eps)


class GeneratorBlock(nn.Module):
    """3x3 convolution, layer norm over the whole map, ReLU: (1, C, h, w) -> (1, C', h, w)."""

    def __init__(self, in_dim: int, dim: int, map_size: Size, norm: bool) -> None:
        super().__init__()
        self.conv = _Conv3x3(in_dim, dim)
        self.norm: nn.Module = _MapNorm((dim, *map_size)) if norm else nn.Identity()

    def forward(self, maps: Float[Tensor, "one in_dim h w"]) -> Float[Tensor, "one dim h w"]:
        return F.relu(self.norm(self.conv(maps)))


class KernelGenerator(nn.Module):
    """Generator from affinity maps to values per position: (1, A, h, w) -> (1, C, h, w), at least in float32.

    The layer norms run over up to 64 x 96 x 96 values, more than half precision can sum.
    """

    def __init__(self, dim: int, map_size: Size, options: TVConvOptions) -> None:
        super().__init__()
        widths = [options.affinity_channels, *[options.hidden] * (options.hidden_layers + 1)]
        self.blocks = nn.ModuleList(GeneratorBlock(old, new, map_size, options.norm) for old, new in pairwise(widths))
        self.project = _Conv3x3(options.hidden, dim)

    def forward(self, affinity: Float[Tensor, "one maps h w"]) -> Float[Tensor, "one dim h w"]:
        with _no_autocast(affinity):
            maps = affinity.to(torch.promote_types(affinity.dtype, torch.float32))
            for block in self.blocks:
                maps = block(maps)
            return self.project(maps)


def _no_autocast(like: Tensor) -> AbstractContextManager:
    # Entering the context when there is nothing to switch off would show up in exported programs.
    return without_autocast(like) if _autocast_dtype(like) is not None else nullcontext()


def _autocast_dtype(like: Tensor) -> torch.dtype | None:
    device = like.device.type
    if device not in ("cpu", "cuda") or like.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


class _Seen(NamedTuple):
    """Snapshot of a parameter at the time kernels were computed from it."""

    parameter: nn.Parameter
    version: int
    address: int

    def still_holds(self, parameter: nn.Parameter) -> bool:
        return (
            parameter is self.parameter
            and parameter._version == self.version
            and parameter.data_ptr() == self.address
            and not parameter.is_inference()
        )


class _Kept(NamedTuple):
    """Kernels, their requested dtype, and the parameters that they were computed from."""

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    seen: tuple[_Seen, ...]


class TVConv(nn.Module):
    """Translation-variant depthwise convolution: (B, C, H, W) -> (B, C, h, w), for one output size h x w.

    In eval mode, if no gradient of the parameters is required, kernels are computed in the first call and kept until a
    parameter is written to, loaded, moved or replaced, or the module is trained again. They are not part of the state
    dict or of copies. Compiled or exported programs contain the generator; `merged` returns a module with only the
    kernels. (Writing through `parameter.data` goes unnoticed by PyTorch and so here: call `uncache` then.)

    Args:
        map_size: rows and columns of the output; the input has `stride` times as many, or one less of each.
        stride: 1 or 2.
        options: see `TVConvOptions`.
    Raises:
        ValueError: if the kernel is even, the size is impossible, or the stride is not supported.
    """

    def __init__(self, channels: int, map_size: Size, stride: int = 1, options: TVConvOptions | None = None) -> None:
        super().__init__()
        if channels < 1 or min(map_size) < 1:
            raise ValueError(f"channels and map_size of a TVConv must be positive, not {channels} and {map_size}")
        if stride not in (1, 2):
            raise ValueError(f"the stride of a TVConv must be 1 or 2, not {stride}")
        options = TVConvOptions() if options is None else options
        self.channels, self.map_size, self.stride, self.options = channels, map_size, stride, options
        self.affinity = nn.Parameter(torch.ones(1, options.affinity_channels, *map_size))
        self.generator = KernelGenerator(channels * options.kernel_size**2, map_size, options)
        self.bias_generator = KernelGenerator(channels, map_size, options) if options.bias else None
        self._kept: _Kept | None = None

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels h w"]:
        check_map_size(x, self.map_size, self.stride)
        weight, bias = self._kernels_for(x)
        return translation_variant_conv(x, weight, bias, stride=self.stride)

    def kernels(self) -> tuple[Float[Tensor, "channels kernel kernel h w"], Float[Tensor, "channels h w"] | None]:
        """Compute weight and bias of the operator, at least in float32."""
        kernel = self.options.kernel_size
        weight = self.generator(self.affinity).view(self.channels, kernel, kernel, *self.map_size)
        return weight, None if self.bias_generator is None else self.bias_generator(self.affinity)[0]

    def cache(self, dtype: torch.dtype | None = None) -> None:
        """Compute and keep the kernels now, for inputs of this dtype (the parameters' own by default).

        Raises:
            ValueError: if called in training mode, where kernels change with every step.
        """
        if self.training:
            raise ValueError("a TVConv only keeps its kernels in eval mode: call .eval() first")
        self._kept = self._make(self.affinity.dtype if dtype is None else dtype)

    def prepare_inference(self, dtype: torch.dtype) -> None:
        """Keep the kernels for inputs of this dtype, so that cost counts and timings see only the operator."""
        self.cache(dtype)

    def uncache(self) -> None:
        """Discard the kernels; the next call recomputes them."""
        self._kept = None

    @property
    def is_cached(self) -> bool:
        """Whether the kept kernels match the current parameters."""
        return self._kept is not None and self._is_current(self._kept)

    def resized(self, map_size: Size) -> TVConv:
        """Return a trainable copy for another map size, with interpolated affinity maps and layer norms."""
        new = TVConv(self.channels, map_size, self.stride, self.options).to(self.affinity).train(self.training)
        new.load_state_dict({key: resize_maps(key, tensor, map_size) for key, tensor in self.state_dict().items()})
        return new

    def merged(self) -> FixedTVConv:
        """Return the operator with only its current kernels, for inference."""
        with torch.no_grad():
            weight, bias = self.kernels()
        dtype = self.affinity.dtype
        return FixedTVConv(weight.to(dtype), None if bias is None else bias.to(dtype), self.stride).eval()

    def train(self, mode: bool = True) -> TVConv:
        if mode:
            self.uncache()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TVConv:
        self.uncache()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    def _kernels_for(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        dtype = _autocast_dtype(x) or x.dtype
        if not self._may_keep():
            return _cast(self.kernels(), dtype)
        if self._kept is None or self._kept.dtype != dtype or not self._is_current(self._kept):
            self._kept = self._make(dtype, x)
        return self._kept.weight, self._kept.bias

    def _may_keep(self) -> bool:
        """Whether the kernels may be kept for later calls, which is not the case in training or tracing."""
        if self.training or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        parameters = list(self.parameters())
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
            return False
        return all(type(parameter) is nn.Parameter and not parameter.is_inference() for parameter in parameters)

    def _make(self, dtype: torch.dtype, x: Tensor | None = None) -> _Kept:
        # Tensors created in inference mode cannot take part in a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            weight, bias = _cast(self.kernels(), dtype)
            weight = arrange_weight(weight, x)
        seen = tuple(_Seen(p, p._version, p.data_ptr()) for p in self.parameters() if isinstance(p, nn.Parameter))
        return _Kept(weight, bias, dtype, seen)

    def _is_current(self, kept: _Kept) -> bool:
        parameters = list(self.parameters())
        return len(parameters) == len(kept.seen) and all(
            seen.still_holds(parameter) for seen, parameter in zip(kept.seen, parameters, strict=True)
        )

    def extra_repr(self) -> str:
        size = "x".join(map(str, self.map_size))
        return f"{self.channels}, map_size={size}, stride={self.stride}, {asdict(self.options)}"


def _cast(kernels: tuple[Tensor, Tensor | None], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    weight, bias = kernels
    return weight.to(dtype), None if bias is None else bias.to(dtype)


class FixedTVConv(nn.Module):
    """A TVConv for inference with kernels and no generator: (B, C, H, W) -> (B, C, h, w).

    Args:
        weight: kernels, (channels, K, K, h, w).
        bias: bias per position, (channels, h, w).
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Float[Tensor, "channels kernel kernel h w"],
        bias: Float[Tensor, "channels h w"] | None = None,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.stride = stride
        # The leading axis protects it from `to(memory_format=...)`, which acts on tensors of four or five axes.
        self.register_buffer("weight", arrange_weight(weight.detach())[None])
        self.register_buffer("bias", None if bias is None else bias.detach().contiguous())

    @property
    def map_size(self) -> Size:
        return self.weight.shape[-2], self.weight.shape[-1]

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels h w"]:
        check_map_size(x, self.map_size, self.stride)
        return translation_variant_conv(x, self.weight[0], self.bias, stride=self.stride)

    def resized(self, map_size: Size) -> FixedTVConv:
        """Return a copy for another map size, with interpolated kernels."""
        weight = _interpolate(self.weight[0].flatten(0, 2), map_size).view(*self.weight.shape[1:4], *map_size)
        return FixedTVConv(weight, None if self.bias is None else _interpolate(self.bias, map_size), self.stride).eval()

    def extra_repr(self) -> str:
        _, channels, kernel, *_ = self.weight.shape
        size = "x".join(map(str, self.map_size))
        return f"{channels}, map_size={size}, kernel_size={kernel}, stride={self.stride}"


class TVConvNormAct(nn.Module):
    """TVConv, batch norm, activation: (B, C, H, W) -> (B, C, h, w).

    Args:
        act: constructor of the activation; None for a linear unit.
    """

    def __init__(
        self,
        channels: int,
        map_size: Size,
        stride: int = 1,
        options: TVConvOptions | None = None,
        *,
        act: Callable[[], nn.Module] | None = nn.ReLU6,
    ) -> None:
        super().__init__()
        self.conv: TVConv | FixedTVConv = TVConv(channels, map_size, stride, options)
        self.norm: nn.Module = nn.BatchNorm2d(channels)
        self.act = act() if act is not None else nn.Identity()

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels h w"]:
        return self.act(self.norm(self.conv(x)))

    def merged(self) -> TVConvNormAct:
        """Return an equivalent unit for eval mode with the norm in fixed kernels, as cheap as a depthwise one."""
        if not isinstance(self.conv, TVConv):
            return self
        new = deepcopy(self)
        new.conv = self.conv.merged()
        if isinstance(self.norm, nn.BatchNorm2d):
            with torch.no_grad():
                new.conv = _normed(self.conv, self.norm)
            new.norm = nn.Identity()
        return new


def _normed(conv: TVConv, norm: nn.BatchNorm2d) -> FixedTVConv:
    """Return fixed kernels that compute norm(conv(x))."""
    (weight, bias), (scale, shift) = conv.kernels(), scale_and_shift(norm)
    if bias is None:
        bias = torch.zeros_like(weight[:, 0, 0])
    weight, bias = weight * scale[:, None, None, None, None], bias * scale[:, None, None] + shift[:, None, None]
    dtype = conv.affinity.dtype
    return FixedTVConv(weight.to(dtype), bias.to(dtype), conv.stride).eval()


class TVConvInvertedResidual(InvertedResidual):
    """An inverted residual that filters its hidden channels with a TVConv: (B, C, H, W) -> (B, C', h, w)."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        stride: int,
        expand_ratio: float,
        map_size: Size,
        options: TVConvOptions | None = None,
    ) -> None:
        super().__init__(in_dim, dim, stride, expand_ratio)
        hidden = self.project.conv.in_channels
        self.register_module("spatial", TVConvNormAct(hidden, map_size, stride, options))


def check_map_size(x: Tensor, map_size: Size, stride: int) -> None:
    """Raise a ValueError unless these maps give as many output positions as there are kernels."""
    if x.ndim != 4:
        raise ValueError(f"a TVConv takes maps (batch, channels, height, width), not {tuple(x.shape)}")
    found = output_size(x.shape[2], stride), output_size(x.shape[3], stride)
    if found != tuple(map_size):
        (h, w), (rows, columns) = map_size, found
        raise ValueError(
            f"TVConv built for {h}x{w} output, got {rows}x{columns}: it has a kernel for each position; see `resized`"
        )


def resize_maps(key: str, tensor: Tensor, map_size: Size) -> Tensor:
    """Return a tensor of a TVConv's state dict for another map size, interpolated if it is a map."""
    leaf = key.rsplit(".", 1)[-1]
    is_map = leaf == "affinity" or ".norm." in f".{key}"
    return _interpolate(tensor, map_size) if is_map and tensor.shape[-2:] != torch.Size(map_size) else tensor


def _interpolate(maps: Tensor, size: Size) -> Tensor:
    """Interpolate bilinearly over the last two axes."""
    flat = maps.reshape(1, -1, *maps.shape[-2:])
    return F.interpolate(flat, size, mode="bilinear", align_corners=False).view(*maps.shape[:-2], *size)
