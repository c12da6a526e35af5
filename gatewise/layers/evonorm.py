"""EvoNorm layers: one layer in place of a norm and the following activation.

The B series compares each image with statistics of the batch and keeps a running variance for inference. The S series
only looks at one image, so it behaves the same at any batch size, in training and at inference.

Source: Liu et al. 2020, arXiv:2004.02967; S0a, S1a and S2a are timm's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.layers.depthwise_conv import conv2d
from gatewise.ops.evonorm import Member, evonorm_b, evonorm_s

Maps = Float[Tensor, "batch channels height width"]
LayerName = Literal[
    "B0", "B1", "B2", "S0", "S1", "S2", "S0a", "S1a", "S2a", "BN-ReLU", "BN-ReLU6", "BN-SiLU", "GN-ReLU"
]
LAYERS: tuple[str, ...] = get_args(LayerName)


class EvoNorm(nn.Module):
    """Base of all variants: a weight and a bias per channel, plus v in B0 and S0 with the activation.

    Args:
        dim: number of channels.
        act: whether the layer includes the activation. Without it (after the last convolution of a residual branch),
            the layer is weight * x + bias and uses no statistics. Only S0a, S1a and S2a still divide by the group's.
        eps: constant added under every root.
    """

    has_v: ClassVar[bool] = False

    def __init__(self, dim: int, *, act: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"a layer has at least one channel, not {dim}")
        if eps <= 0:
            raise ValueError(f"eps must be positive, not {eps}")
        self.dim, self.act, self.eps = dim, act, eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.v = nn.Parameter(torch.ones(dim)) if act and self.has_v else None

    @property
    def is_affine(self) -> bool:
        """Whether the layer is just weight * x + bias, and folds into the convolution before it."""
        return not self.act

    def forward(self, x: Maps) -> Maps:
        if x.ndim != 4:
            raise ValueError(f"{type(self).__name__} takes maps (batch, channels, height, width), not {tuple(x.shape)}")
        if self.is_affine:
            return x * self.weight.to(x.dtype)[:, None, None] + self.bias.to(x.dtype)[:, None, None]
        return self._normalized(x)

    def _normalized(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}" + ("" if self.act else ", act=False")


class BatchEvoNorm(EvoNorm):
    """B series: x / max(batch standard deviation, a statistic of this image), times weight plus bias.

    Args:
        momentum: weight of the batch in the running variance.
        unbiased: whether the batch's variance is divided by n - 1, as in batch norms and timm, instead of n, as in the
            official code.
        centered: whether B1 and B2 use standard deviations, as the paper writes them, instead of root mean squares.
    """

    running_var: Tensor
    member: ClassVar[Member]

    def __init__(
        self,
        dim: int,
        *,
        act: bool = True,
        eps: float = 1e-5,
        momentum: float = 0.1,
        unbiased: bool = True,
        centered: bool = False,
    ) -> None:
        super().__init__(dim, act=act, eps=eps)
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must be from 0 to 1, not {momentum}")
        self.momentum, self.unbiased, self.centered = momentum, unbiased, centered
        self.register_buffer("running_var", torch.ones(dim))

    def _normalized(self, x: Tensor) -> Tensor:
        if not self.training:
            return self._compare(x, self.running_var)[0]
        count = x.shape[0] * x.shape[2] * x.shape[3]
        if count == 1:
            raise ValueError("EvoNorm's B series needs more than one value per channel in training")
        y, variance = self._compare(x, None)
        share = self.momentum * (count / (count - 1) if self.unbiased else 1.0)
        with torch.no_grad():
            self.running_var.mul_(1 - self.momentum).add_(variance.to(self.running_var.dtype), alpha=share)
        return y

    def _compare(self, x: Tensor, running_var: Tensor | None) -> tuple[Tensor, Tensor]:
        return evonorm_b(
            x,
            self.weight,
            self.bias,
            self.v,
            running_var,
            member=self.member,
            eps=self.eps,
            centered=self.centered,
        )

    def extra_repr(self) -> str:
        moving = "" if self.unbiased else ", unbiased=False"
        return f"{super().extra_repr()}, momentum={self.momentum}{moving}" + (", centered=True" * self.centered)


class EvoNormB0(BatchEvoNorm):
    """x / max(batch std, v x + instance std): (B, C, H, W) -> (B, C, H, W). The official code has eps 1e-5.

    Without learning-rate warm-up, a rate of 0.1 is known to end in NaN. At inference, a branch whose running variance
    is not yet accurate may grow without bound, so warm up the statistics before evaluating a network.
    """

    member = "B0"
    has_v = True

    def __init__(
        self, dim: int, *, act: bool = True, eps: float = 1e-3, momentum: float = 0.1, unbiased: bool = True
    ) -> None:
        super().__init__(dim, act=act, eps=eps, momentum=momentum, unbiased=unbiased, centered=True)


class EvoNormB1(BatchEvoNorm):
    """x / max(batch std, (x + 1) instance root mean square): (B, C, H, W) -> (B, C, H, W)."""

    member = "B1"


class EvoNormB2(BatchEvoNorm):
    """x / max(batch std, instance root mean square - x): (B, C, H, W) -> (B, C, H, W)."""

    member = "B2"


class SampleEvoNorm(EvoNorm):
    """S series: gated x / standard deviation of its group of channels, times weight plus bias.

    Args:
        groups: number of groups, reduced one by one until it divides the channels, as in the official code (48
            channels: 24).
        group_size: channels per group, which override `groups` and must divide the channels, as in timm.
    """

    centered: ClassVar[bool] = True
    divides_without_act: ClassVar[bool] = False

    def __init__(
        self, dim: int, *, act: bool = True, eps: float = 1e-5, groups: int = 32, group_size: int | None = None
    ) -> None:
        super().__init__(dim, act=act, eps=eps)
        self.asked = groups
        self.groups = count_groups(dim, groups, group_size)

    @property
    def is_affine(self) -> bool:
        return not self.act and not self.divides_without_act

    def _normalized(self, x: Tensor) -> Tensor:
        return evonorm_s(
            x,
            self.weight,
            self.bias,
            self.v,
            groups=self.groups,
            eps=self.eps,
            centered=self.centered,
            gated=self.act,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups} of {self.dim // self.groups}"


def count_groups(dim: int, groups: int = 32, group_size: int | None = None) -> int:
    """Return the number of groups for `dim` channels.

    Raises:
        ValueError: if a number is not positive, or `group_size` does not divide the channels.
    """
    if group_size is not None:
        if group_size < 1 or dim % group_size:
            raise ValueError(
                f"group_size must divide the {dim} channels, not be {group_size}; pass groups instead, "
                "which is reduced until it does"
            )
        return dim // group_size
    if groups < 1:
        raise ValueError(f"groups must be positive, not {groups}")
    return next(count for count in range(min(groups, dim), 0, -1) if dim % count == 0)


class EvoNormS0(SampleEvoNorm):
    """x sigmoid(v x) / group standard deviation: (B, C, H, W) -> (B, C, H, W)."""

    has_v = True


class EvoNormS1(SampleEvoNorm):
    """x sigmoid(x) / group standard deviation: (B, C, H, W) -> (B, C, H, W)."""


class EvoNormS2(SampleEvoNorm):
    """x sigmoid(x) / root mean square of the group: (B, C, H, W) -> (B, C, H, W)."""

    centered = False


class _DividesWithoutActivation(SampleEvoNorm):
    """Variants that are a norm if the activation is omitted, with timm's eps."""

    divides_without_act = True

    def __init__(
        self, dim: int, *, act: bool = True, eps: float = 1e-3, groups: int = 32, group_size: int | None = None
    ) -> None:
        super().__init__(dim, act=act, eps=eps, groups=groups, group_size=group_size)


class EvoNormS0a(_DividesWithoutActivation, EvoNormS0):
    """S0; without the activation, x / group standard deviation."""


class EvoNormS1a(_DividesWithoutActivation, EvoNormS1):
    """S1; without the activation, x / group standard deviation."""


class EvoNormS2a(_DividesWithoutActivation, EvoNormS2):
    """S2; without the activation, x / root mean square of the group."""


EVONORMS: dict[str, type[EvoNorm]] = {
    "B0": EvoNormB0,
    "B1": EvoNormB1,
    "B2": EvoNormB2,
    "S0": EvoNormS0,
    "S1": EvoNormS1,
    "S2": EvoNormS2,
    "S0a": EvoNormS0a,
    "S1a": EvoNormS1a,
    "S2a": EvoNormS2a,
}


@dataclass(frozen=True)
class NormActivation:
    """Choice of the layer after every convolution: an EvoNorm, or a norm and an activation.

    Args:
        layer: an EvoNorm layer, or a norm and activation pair to compare it with.
        eps: epsilon; None for the layer's default.
        groups: number of groups of the S series and of group norms, reduced until it divides the channels.
        group_size: channels per group, instead of `groups`.
        momentum: momentum of the running statistics.
        unbiased: whether the B series has an unbiased running variance.
        centered: whether B1 and B2 use standard deviations, as the paper writes them.
    """

    layer: LayerName = "S0"
    eps: float | None = None
    groups: int = 32
    group_size: int | None = None
    momentum: float = 0.1
    unbiased: bool = True
    centered: bool = False

    def __post_init__(self) -> None:
        if self.layer not in LAYERS:
            raise ValueError(f"layer must be one of {', '.join(LAYERS)}, not {self.layer!r}")

    def build(self, dim: int, act: bool = True) -> nn.Module:
        """Return the layer for `dim` channels; without `act`, the form for the end of a residual branch."""
        if self.layer not in EVONORMS:
            return self._pair(dim, act)
        fields: dict[str, float | int | bool | None] = {} if self.eps is None else {"eps": self.eps}
        if self.layer.startswith("S"):
            fields |= {"groups": self.groups, "group_size": self.group_size}
        else:
            fields |= {"momentum": self.momentum, "unbiased": self.unbiased}
            fields |= {} if self.layer == "B0" else {"centered": self.centered}
        kind: Callable[..., nn.Module] = EVONORMS[self.layer]
        return kind(dim, act=act, **fields)

    def _pair(self, dim: int, act: bool) -> nn.Module:
        norm, _, activation = self.layer.partition("-")
        eps = 1e-5 if self.eps is None else self.eps
        if norm == "GN":
            layer: nn.Module = nn.GroupNorm(count_groups(dim, self.groups, self.group_size), dim, eps)
        else:
            layer = nn.BatchNorm2d(dim, eps, self.momentum)
        parts = [("norm", layer), *([("act", _ACTIVATIONS[activation]())] if act else [])]
        return nn.Sequential(OrderedDict(parts))


_ACTIVATIONS: dict[str, type[nn.Module]] = {"ReLU": nn.ReLU, "ReLU6": nn.ReLU6, "SiLU": nn.SiLU}


class ConvEvoNorm(nn.Module):
    """Convolution without bias and the chosen layer: (B, C, H, W) -> (B, C', H', W').

    Args:
        norm: choice of the layer.
        act: whether the layer has its activation; False at the end of a residual branch.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int,
        stride: int = 1,
        *,
        norm: NormActivation,
        groups: int = 1,
        act: bool = True,
    ) -> None:
        super().__init__()
        self.conv = conv2d(in_dim, dim, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        self.norm = norm.build(dim, act)

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        return self.norm(self.conv(x))

    def merged(self) -> ConvEvoNorm:
        """Return an equivalent unit for inference. A layer that is just a weight and a bias folds into the convolution.

        No other variant folds, because their divisors depend on the image at inference too.
        """
        new = deepcopy(self)
        if isinstance(self.norm, EvoNorm) and self.norm.is_affine:
            with torch.no_grad():
                weight = self.conv.weight * self.norm.weight[:, None, None, None].to(self.conv.weight.dtype)
            new.conv.weight = nn.Parameter(weight, requires_grad=self.conv.weight.requires_grad)
            new.conv.bias = nn.Parameter(self.norm.bias.detach().clone().to(weight.dtype))
            new.norm = nn.Identity()
        return new
