"""TVConv: depthwise kernels that differ from place to place but not from image to image.

A few learned maps A, the affinity maps, tell places apart, and a small network of convolutions G turns them into a
K x K kernel for every channel and position:

    W = G(A),   y = translation_variant_conv(x, W, bias),   bias = G_b(A) if there is one
    G = (conv3x3, layer norm over channels and positions, ReLU) x (L + 1), then conv3x3 to C K K channels

A starts as ones: at first only the zeros around the maps tell places apart, then the scales and shifts of the layer
norms, which are maps too, and A itself. W does not depend on x. It is made once and kept in eval mode.

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
    """How kernels are made. The defaults are those of the published training scripts.

    Args:
        kernel_size: K, odd.
        affinity_channels: maps in A.
        hidden: channels within the generator.
        hidden_layers: L, blocks of the generator behind the first.
        bias: a bias for every channel and position, from a generator of its own.
        norm: the layer norms of the generator; without, nothing but A and the zero padding tells places apart.
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
    """3x3 without bias, computed in the dtype of its input."""

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
    """Affinity maps to what each position needs: (1, A, h, w) -> (1, C, h, w), in float32 at least.

    The layer norms run over as many as 64 x 96 x 96 values, more than half precision can sum.
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
    # Entering the block where nothing is to be switched off would show up in exported programs.
    return without_autocast(like) if _autocast_dtype(like) is not None else nullcontext()


def _autocast_dtype(like: Tensor) -> torch.dtype | None:
    device = like.device.type
    if device not in ("cpu", "cuda") or like.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


class _Seen(NamedTuple):
    """A parameter as it was when kernels were made from it."""

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
    """Kernels, the dtype asked for, and the parameters that they were made from."""

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    seen: tuple[_Seen, ...]


class TVConv(nn.Module):
    """Translation-variant depthwise convolution: (B, C, H, W) -> (B, C, h, w), for one size of h x w.

    In eval mode, where no gradient of the parameters is wanted, kernels are made in the first call and kept until a
    parameter is written to, loaded, moved or replaced, or the module is trained again. They are no part of the state
    dict and of copies. Programs that are compiled or exported hold the generator; `merged` gives a module that holds
    the kernels alone. (Writing through `parameter.data` goes unnoticed by PyTorch and so here: call `uncache` then.)

    Args:
        map_size: rows and columns of the output; the input has as many times the stride, or one less of each.
        stride: 1 or 2.
        options: see `TVConvOptions`.
    Raises:
        ValueError: for an even kernel, an impossible size, or another stride.
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
        """Weight and bias of the operator, made anew, in float32 at least."""
        kernel = self.options.kernel_size
        weight = self.generator(self.affinity).view(self.channels, kernel, kernel, *self.map_size)
        return weight, None if self.bias_generator is None else self.bias_generator(self.affinity)[0]

    def cache(self, dtype: torch.dtype | None = None) -> None:
        """Make and keep the kernels now, for inputs of this dtype (the parameters' own by default).

        Raises:
            ValueError: in training mode, where they would change with every step.
        """
        if self.training:
            raise ValueError("a TVConv keeps its kernels in eval mode alone; call .eval() first")
        self._kept = self._make(self.affinity.dtype if dtype is None else dtype)

    def prepare_inference(self, dtype: torch.dtype) -> None:
        """Keep the kernels for inputs of this dtype, so that whoever counts or times the operator sees it alone."""
        self.cache(dtype)

    def uncache(self) -> None:
        """Forget the kernels; the next call makes them anew."""
        self._kept = None

    @property
    def is_cached(self) -> bool:
        """Whether kernels are kept that belong to the present parameters."""
        return self._kept is not None and self._is_current(self._kept)

    def resized(self, map_size: Size) -> TVConv:
        """A copy for another size of the map: affinity maps and layer norms are interpolated, which trains again."""
        new = TVConv(self.channels, map_size, self.stride, self.options).to(self.affinity).train(self.training)
        new.load_state_dict({key: resize_maps(key, tensor, map_size) for key, tensor in self.state_dict().items()})
        return new

    def merged(self) -> FixedTVConv:
        """The same operator with its kernels as they are now and nothing else, for inference."""
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
        """Whether what is made now may serve later calls: not in training, and not for anything that only traces."""
        if self.training or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        parameters = list(self.parameters())
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
            return False
        return all(type(parameter) is nn.Parameter and not parameter.is_inference() for parameter in parameters)

    def _make(self, dtype: torch.dtype, x: Tensor | None = None) -> _Kept:
        # Tensors made in inference mode could not take part in a backward pass later.
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
    """A TVConv for inference that holds its kernels and no generator: (B, C, H, W) -> (B, C, h, w).

    Args:
        weight: (channels, K, K, h, w).
        bias: (channels, h, w).
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
        # The leading axis keeps `to(memory_format=...)` off it, which is for maps of four or five axes.
        self.register_buffer("weight", arrange_weight(weight.detach())[None])
        self.register_buffer("bias", None if bias is None else bias.detach().contiguous())

    @property
    def map_size(self) -> Size:
        return self.weight.shape[-2], self.weight.shape[-1]

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels h w"]:
        check_map_size(x, self.map_size, self.stride)
        return translation_variant_conv(x, self.weight[0], self.bias, stride=self.stride)

    def resized(self, map_size: Size) -> FixedTVConv:
        """A copy for another size of the map, with interpolated kernels."""
        weight = _interpolate(self.weight[0].flatten(0, 2), map_size).view(*self.weight.shape[1:4], *map_size)
        return FixedTVConv(weight, None if self.bias is None else _interpolate(self.bias, map_size), self.stride).eval()

    def extra_repr(self) -> str:
        _, channels, kernel, *_ = self.weight.shape
        size = "x".join(map(str, self.map_size))
        return f"{channels}, map_size={size}, kernel_size={kernel}, stride={self.stride}"


class TVConvNormAct(nn.Module):
    """TVConv, batch norm, activation: (B, C, H, W) -> (B, C, h, w).

    Args:
        act: builds the activation; None for a linear unit.
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
        """The same unit in eval mode with the batch norm inside fixed kernels, for the cost of a depthwise one."""
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
    """Fixed kernels that compute norm(conv(x))."""
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
    """Raise a ValueError unless these maps have as many output positions as there are kernels."""
    if x.ndim != 4:
        raise ValueError(f"a TVConv takes maps (batch, channels, height, width), not {tuple(x.shape)}")
    found = output_size(x.shape[2], stride), output_size(x.shape[3], stride)
    if found != tuple(map_size):
        (h, w), (rows, columns) = map_size, found
        raise ValueError(
            f"TVConv built for {h}x{w} output, got {rows}x{columns}: it has a kernel for each position; see `resized`"
        )


def resize_maps(key: str, tensor: Tensor, map_size: Size) -> Tensor:
    """A tensor of a TVConv's state dict for another size of the map: interpolated if it is one of the maps."""
    leaf = key.rsplit(".", 1)[-1]
    is_map = leaf == "affinity" or ".norm." in f".{key}"
    return _interpolate(tensor, map_size) if is_map and tensor.shape[-2:] != torch.Size(map_size) else tensor


def _interpolate(maps: Tensor, size: Size) -> Tensor:
    """Bilinear, over the last two axes."""
    flat = maps.reshape(1, -1, *maps.shape[-2:])
    return F.interpolate(flat, size, mode="bilinear", align_corners=False).view(*maps.shape[:-2], *size)
