"""Shared parts of the AdvMoE networks: convolutions with experts, the router, and the path of a batch through both.

Paper: Zhang et al. 2023, arXiv:2308.10110; see `resnet`. The choice of experts is computed once per batch and passed as
an argument. No module stores it, so copies of a network in several threads do not interfere.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.layers.fold_norm import scale_and_shift
from gatewise.layers.linear_head import linear_head
from gatewise.networks.image._base import ImageConfig, ImageNetwork
from gatewise.ops.expert_conv import (
    ExpertRouting,
    expert_conv2d,
    route_to_experts,
    split_by_expert,
    to_experts,
    to_images,
)

Maps = Float[Tensor, "batch channels height width"]
OutMaps = Float[Tensor, "batch dim h w"]
Scores = Float[Tensor, "batch experts"]
Stem = Literal["cifar", "imagenet"]


@dataclass(frozen=True)
class AdvMoEConfig(ImageConfig):
    """Configuration shared by all backbones.

    Args:
        n_expert: number of experts of each convolution; 1 for a dense network without a router.
        ratio: width of one expert relative to the dense network's layer, rounded down.
        stem: "cifar" for a 3x3 convolution (small images), or "imagenet" for a 7x7 convolution and pooling at stride 4.
        input_mean: mean per channel, subtracted from the images before router and backbone; None for no normalization.
        input_std: standard deviation per channel, by which the images are divided after that.
    """

    n_expert: int = 2
    ratio: float = 0.5
    stem: Stem = "cifar"
    input_mean: tuple[float, ...] | None = None
    input_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_expert < 1:
            raise ValueError(f"n_expert must be at least 1, not {self.n_expert}")
        if self.stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem must be cifar or imagenet, not {self.stem!r}")
        if (self.input_mean is None) != (self.input_std is None):
            raise ValueError("input_mean and input_std belong together: pass both or neither")
        for name in ("input_mean", "input_std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.in_chans:
                raise ValueError(f"{name} must have one value per channel ({self.in_chans}), not {values}")

    def width(self, channels: int) -> int:
        """Return the width of one expert where the dense network has `channels`.

        Raises:
            ValueError: if no channel is left.
        """
        width = int(channels * self.ratio)
        if width < 1:
            raise ValueError(f"ratio must leave at least one of {channels} channels, not {self.ratio}")
        return width


class ExpertConv2d(nn.Module):
    """A convolution with experts, one for each image: (B, C, H, W) -> (B, C', H', W').

    Args:
        dim: output channels of one expert.
        padding: padding of the convolution; None for half the kernel size.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | None = None,
        *,
        n_expert: int,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.n_expert, self.stride = n_expert, stride
        self.padding = kernel_size // 2 if padding is None else padding
        self.weight = nn.Parameter(torch.empty(n_expert * dim, in_dim, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(n_expert * dim)) if bias else None
        init_weights(self)

    def forward(self, x: Maps, routing: ExpertRouting | None = None) -> OutMaps:
        """Convolve images in the order of their experts. A single expert needs no routing.

        Raises:
            ValueError: if there is no routing, or it is for another number of experts.
        """
        if self.n_expert == 1:
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        if routing is None:
            raise ValueError(
                "the MoE convolution has no routing scores: call the whole network, or pass route_to_experts(scores)"
            )
        if routing.num_experts != self.n_expert:
            raise ValueError(f"the routing must be among {self.n_expert} experts, not {routing.num_experts}")
        return expert_conv2d(x, self.weight, routing, self.bias, self.stride, self.padding)

    def extra_repr(self) -> str:
        rows, in_dim, kernel, _ = self.weight.shape
        return f"{in_dim}, {self.n_expert} x {rows // self.n_expert}, kernel_size={kernel}, stride={self.stride}"


class ConvNorm(nn.Module):
    """Convolution without bias and a batch norm that all experts share: (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, in_dim: int, dim: int, kernel_size: int, stride: int = 1, n_expert: int = 1) -> None:
        super().__init__()
        self.conv = conv2d(in_dim, dim, kernel_size, stride, n_expert)
        self.norm: nn.Module = nn.BatchNorm2d(dim)

    def forward(self, x: Maps, routing: ExpertRouting | None = None) -> OutMaps:
        return self.norm(convolve(self.conv, x, routing))

    def merged(self) -> ConvNorm:
        """Return an equivalent unit for eval mode, with the norm folded into every expert's rows.

        Outputs and gradients are equal, except the gradients with respect to routing scores, which are taken at the
        output of the convolution.
        """
        new = deepcopy(self)
        if isinstance(self.norm, nn.BatchNorm2d):
            fold_into_experts(new.conv, self.norm)
            new.norm = nn.Identity()
        return new


def conv2d(in_dim: int, dim: int, kernel_size: int, stride: int = 1, n_expert: int = 1) -> nn.Conv2d | ExpertConv2d:
    """Return a convolution without bias, with experts if there are several."""
    if n_expert > 1:
        return ExpertConv2d(in_dim, dim, kernel_size, stride, n_expert=n_expert)
    return nn.Conv2d(in_dim, dim, kernel_size, stride, kernel_size // 2, bias=False)


def convolve(conv: nn.Module, x: Maps, routing: ExpertRouting | None) -> OutMaps:
    """Apply `conv` to the images. A shared convolution needs no routing."""
    return conv(x, routing) if isinstance(conv, ExpertConv2d) else conv(x)


@torch.no_grad()
def fold_into_experts(conv: nn.Conv2d | ExpertConv2d, norm: nn.BatchNorm2d) -> None:
    """Change `conv`, which has no bias, in place so that it computes norm(conv(x)) for every expert."""
    scale, shift = (values.repeat(conv.weight.shape[0] // len(values)) for values in scale_and_shift(norm))
    weight = (conv.weight * scale[:, None, None, None]).to(conv.weight.dtype)
    conv.weight = nn.Parameter(weight, conv.weight.requires_grad)
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype), conv.weight.requires_grad)


class ChannelAffine(nn.Module):
    """Inference form of a batch norm that has no preceding convolution: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        dtype = norm.weight.dtype
        weight, bias = scale_and_shift(norm)
        self.weight = nn.Parameter(weight.to(dtype)[:, None, None], norm.weight.requires_grad)
        self.bias = nn.Parameter(bias.to(dtype)[:, None, None], norm.weight.requires_grad)

    def forward(self, x: Maps) -> Maps:
        return torch.addcmul(self.bias, x, self.weight)


def without_statistics(norm: nn.Module) -> nn.Module:
    """Return a batch norm as a multiplication and a sum, and any other module unchanged."""
    return ChannelAffine(norm) if isinstance(norm, nn.BatchNorm2d) else norm


class ConvStem(nn.Module):
    """Convolution, norm, ReLU and, for large images, pooling, for all experts: (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, in_dim: int, dim: int, stem: Stem) -> None:
        super().__init__()
        self.unit = ConvNorm(in_dim, dim, 3) if stem == "cifar" else ConvNorm(in_dim, dim, 7, 2)
        self.pool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Maps) -> OutMaps:
        return self.pool(F.relu(self.unit(x)))


class RouterBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters: (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, in_dim: int, dim: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        missing = dim - in_dim
        self.new_channels = (missing // 2, missing - missing // 2)
        self.units = nn.ModuleList([ConvNorm(in_dim, dim, 3, stride), ConvNorm(dim, dim, 3)])

    def forward(self, x: Maps) -> OutMaps:
        y = self.units[1](F.relu(self.units[0](x)))
        if self.stride > 1:
            # Every second position, and zeros for the channels that `x` does not have: option A of the ResNet paper.
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.new_channels))
        return F.relu(x + y)


class Router(nn.Module):
    """A ResNet-20 that scores the experts for each image: (B, C, H, W) -> (B, experts), of any size.

    The published code pools over a window of the map's width, which for square images is this global average.
    """

    def __init__(self, n_expert: int, in_chans: int = 3) -> None:
        super().__init__()
        self.stem = ConvNorm(in_chans, 16, 3)
        self.stages = nn.ModuleList(
            nn.ModuleList(RouterBlock(in_dim if i == 0 else dim, dim, stride if i == 0 else 1) for i in range(3))
            for in_dim, dim, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.fc = nn.Linear(64, n_expert)

    def forward(self, x: Maps) -> Scores:
        x = F.relu(self.stem(x))
        for stage in self.stages:
            for block in stage.children():
                x = block(x)
        return self.fc(x.mean(dim=(2, 3)))

    def read_gates(self, x: Maps) -> dict[str, Tensor]:
        """Return the choice, (B, experts): 1 for the expert that an image is routed to, 0 for the others."""
        # Bypass the module's call, which would trigger its hooks again.
        scores = self.forward(x)
        return {"expert": F.one_hot(scores.argmax(dim=1), scores.shape[1]).to(scores.dtype)}


class RoutedNetwork(ImageNetwork):
    """Base of all backbones: the router, the order of the images, and the head.

    A backbone builds `stem`, `stages` and `head`, and defines `run_stages`. Scores can be passed in place of the
    router's, as for an attack or an ablation:

        scores = network.scores(images)
        logits = network(images, scores)
    """

    router: Router | None
    head: nn.Module

    def __init__(self, config: AdvMoEConfig) -> None:
        super().__init__(config)
        self.register_buffer("input_mean", per_channel(config.input_mean), persistent=False)
        self.register_buffer("input_std", per_channel(config.input_std), persistent=False)

    def finish(self) -> None:
        """Add the head, initialize as published, then add the router, which keeps PyTorch's initialization."""
        self.apply(init_weights)
        self.head = self.make_head(self.config.num_classes)
        config = self.config
        self.router = Router(config.n_expert, config.in_chans) if config.n_expert > 1 else None

    def run_stages(self, x: Tensor, routing: ExpertRouting | None) -> list[Tensor]:
        """Return the pyramid levels for images in the order of their experts."""
        raise NotImplementedError

    def forward(self, x: Maps, scores: Scores | None = None) -> Float[Tensor, "batch classes"]:
        """Return logits, or pooled features if there is no classifier.

        Args:
            scores: scores that select the experts; None for the router's scores.
        Raises:
            ValueError: if `x` is not a batch of images of a supported size, or the scores do not fit it or are not
                finite.
        """
        return self.forward_head(self.forward_features(x, scores))

    def forward_features(self, x: Maps, scores: Scores | None = None) -> Float[Tensor, "batch features h w"]:
        """Return the last stage's map. Odd sizes round up at every strided convolution and down at every pooling."""
        x, routing = self._enter(x, scores)
        last = self._levels(x, routing)[-1]
        return last if routing is None else to_images(last, routing)

    def forward_pyramid(self, x: Maps, scores: Scores | None = None) -> list[Float[Tensor, "batch _ _ _"]]:
        """Return the outputs of the stages, from fine to coarse."""
        x, routing = self._enter(x, scores)
        levels = self._levels(x, routing)
        return levels if routing is None else [to_images(level, routing) for level in levels]

    def scores(self, x: Maps) -> Scores:
        """Return the router's scores of the experts for each image.

        Raises:
            ValueError: if the network has no router, or `x` is not a batch of images of a supported size.
        """
        self.check_input(x)
        if self.router is None:
            raise ValueError(f"{self._title} has a single expert and no router")
        return self.run_block(self.router, self._normalized(x))

    def expert_load(self, x: Maps) -> tuple[int, ...]:
        """Return the number of these images per expert. If one expert gets all, the router has collapsed."""
        return route_to_experts(self.scores(x).detach()).counts or ()

    def _enter(self, x: Tensor, scores: Tensor | None) -> tuple[Tensor, ExpertRouting | None]:
        """Return the images in the order of their experts, and the routing."""
        self.check_input(x)
        x = self._normalized(x)
        if self.router is None:
            if scores is not None:
                raise ValueError(f"{self._title} has a single expert: it takes no routing scores")
            return x, None
        if scores is None:
            scores = self.run_block(self.router, x)
        elif scores.shape != (x.shape[0], self.config.n_expert):
            expected = (x.shape[0], self.config.n_expert)
            raise ValueError(f"routing scores must be (batch, experts) = {expected}, not {tuple(scores.shape)}")
        routing = route_to_experts(scores)
        return to_experts(x, routing), routing

    def _levels(self, x: Tensor, routing: ExpertRouting | None) -> list[Tensor]:
        if routing is None or self.training:
            return self.run_stages(x, routing)
        # In eval mode images do not interact, so each expert's images run through the whole network at once.
        parts = split_by_expert(routing)
        if len(parts) == 1:
            return self.run_stages(x, routing)
        levels = [self.run_stages(x[own], alone) for own, alone in parts]
        return [torch.cat(level) for level in zip(*levels, strict=True)]

    def _normalized(self, x: Tensor) -> Tensor:
        return x if self.input_mean is None else (x - self.input_mean) / self.input_std

    @property
    def _title(self) -> str:
        return self.variant or type(self).__name__

    def run_routed(self, blocks: nn.Module, x: Tensor, routing: ExpertRouting | None) -> Tensor:
        """Run the blocks in order, each recomputed in the backward pass if gradient checkpointing is on."""
        for block in blocks.children():
            x = self.run_block(partial(block, routing=routing), x)
        return x

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.feature_info[-1].channels, num_classes, init_weights)


def per_channel(values: tuple[float, ...] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values)[:, None, None]


def init_weights(module: nn.Module) -> None:
    """Initialize as published: for a convolution with experts, the fan-out counts the rows of all experts."""
    if isinstance(module, nn.Conv2d | ExpertConv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)
