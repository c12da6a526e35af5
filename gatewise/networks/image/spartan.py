"""SpaRTAN: two spatial receptive fields, and complex pairs of channels reinforced by the strongest channel.

A block mixes positions at half width, once through a 3x3 convolution and once through two dilated ones, each gated by
squeeze-excitation. It then mixes channels at several times the width. To a product of two projections, it adds that
product's value at the position's strongest channel. Pairs of channels, taken as complex numbers, are then multiplied by
learned complex factors ("waves").

Paper: Pay et al., "SpaRTAN: Spatial Reinforcement Token-based Aggregation Network for Visual Recognition", 2025,
arXiv:2507.10999. The paper describes amplitude and phase. This file follows the published code, which its weights
require: there is no cosine or sine, and the phase is in the learned complex factor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.checkpoint import load_state, peel, read_checkpoint
from gatewise.catalog.keys import KeyLayout, Rule
from gatewise.catalog.registry import Variant, register
from gatewise.errors import CheckpointError
from gatewise.layers.conv import ConvNormAct
from gatewise.layers.depthwise_conv import conv2d
from gatewise.layers.drop_path import DropPath
from gatewise.layers.fold_norm import scale_outputs
from gatewise.layers.init_weights import init_by_fan_out
from gatewise.layers.linear_head import linear_head
from gatewise.layers.norm import LayerNorm2d
from gatewise.layers.squeeze_excite import SqueezeExcite
from gatewise.networks.image._base import ImageConfig
from gatewise.networks.image.skeletons.staged import Stage, StagedNetwork
from gatewise.ops.precision import without_autocast

NORM_EPS = 1e-6
INITIAL_SCALE = 1e-5


@dataclass(frozen=True)
class SpartanConfig(ImageConfig):
    """Sizes and options of a SpaRTAN. `depths`, `embed_dims` and `expand_ratios` have one entry per stage.

    Args:
        expand_ratios: width within the channel mixer relative to the stage's width.
        norm: "map" to normalize over all channels and positions of an image, "channel" over the channels of a position.
        out_indices: stages that `forward_pyramid` returns.
    """

    drop_path_rate: float = 0.1
    depths: tuple[int, ...] = (3, 3, 12, 2)
    embed_dims: tuple[int, ...] = (32, 64, 128, 256)
    expand_ratios: tuple[int, ...] = (4, 4, 2, 2)
    norm: Literal["map", "channel"] = "map"
    out_indices: tuple[int, ...] = (0, 1, 2, 3)

    patch_size = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = len(self.depths)
        for name in ("embed_dims", "expand_ratios"):
            if len(getattr(self, name)) != stages:
                raise ValueError(f"{name} must have one entry per stage ({stages}), not {getattr(self, name)}")
        if stages == 0 or min(self.depths) < 1:
            raise ValueError(f"every stage needs a block, depths cannot be {self.depths}")
        for index, (dim, ratio) in enumerate(zip(self.embed_dims, self.expand_ratios, strict=True)):
            if dim < 8 or dim % 8:
                raise ValueError(f"stage {index}: the width must be a multiple of 8, not {dim}")
            if ratio < 2:
                raise ValueError(f"stage {index}: the channel mixer must expand, its ratio cannot be {ratio}")
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, not {self.norm!r}")
        if not set(self.out_indices) <= set(range(stages)):
            raise ValueError(f"out_indices must be stages 0..{stages - 1}, not {self.out_indices}")


NORMS = {
    "map": lambda dim: nn.GroupNorm(1, dim, eps=NORM_EPS),
    "channel": lambda dim: LayerNorm2d(dim, eps=NORM_EPS),
}


class SpatialMixer(nn.Module):
    """Gated 3x3 and dilated convolutions in parallel: (B, C, H, W) -> (B, C, H, W).

    Works at half width, with the deviation from the mean over positions amplified (a high-pass):

        u = Wx + b,   u = u + gamma (u - mean(u))
        out = project([se(gelu(norm(conv(u)))), se(gelu(norm(conv_d2(conv_d2(u)))))])

    The two dilated convolutions together cover 9x9 positions.

    Args:
        depthwise: whether there is one filter per channel; otherwise the convolutions are dense.
    """

    def __init__(self, dim: int, *, depthwise: bool) -> None:
        super().__init__()
        inner = dim // 2
        groups = inner if depthwise else 1
        self.project_in = nn.Conv2d(dim, inner, 1)
        self.gamma = nn.Parameter(torch.full((1, inner, 1, 1), INITIAL_SCALE))
        self.high = ConvNormAct(inner, inner, 3, groups=groups, norm_eps=NORM_EPS, act=nn.GELU)
        self.high_gate = SqueezeExcite(inner, inner // 4)
        self.low = nn.Sequential(
            conv2d(inner, inner, 3, padding=2, dilation=2, groups=groups, bias=False),
            ConvNormAct(inner, inner, 3, dilation=2, groups=groups, norm_eps=NORM_EPS, act=nn.GELU),
        )
        self.low_gate = SqueezeExcite(inner, inner // 4)
        self.project_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        u = self.reinforce(self.project_in(x))
        return self.project_out(torch.cat([self.high_gate(self.high(u)), self.low_gate(self.low(u))], dim=1))

    def reinforce(self, u: Float[Tensor, "batch inner height width"]) -> Float[Tensor, "batch inner height width"]:
        """Return `u` with its deviation from the mean over positions amplified by gamma."""
        return torch.addcmul(u, self.gamma, u - u.mean(dim=(2, 3), keepdim=True))


class ChannelMixer(nn.Module):
    """Channels as complex pairs, reinforced by the strongest one: (B, C, H, W) -> (B, C, H, W).

    With s the channel where x is largest at a position, and K = expand_ratio * C:

        p = gelu(W1 x) * (W2 x)            K channels
        f = p + p[s]                       s is one of the first C channels
        (f_2i + i f_2i+1) *= wave_i        one learned complex number per pair
        out = project(se(gelu(norm(conv3x3(f)))))

    The choice of s has no gradient. Products and pairs are computed at least in float32, because they would exceed the
    range of half precision.

    Args:
        depthwise: whether there is one 3x3 filter per channel; otherwise each input channel has a group of
            `expand_ratio` channels.
    """

    def __init__(self, dim: int, expand_ratio: int, *, depthwise: bool) -> None:
        super().__init__()
        inner = dim * expand_ratio
        self.theta = nn.Conv2d(dim, inner, 1)
        self.key = nn.Conv2d(dim, inner, 1)
        self.wave: nn.Parameter | None = nn.Parameter(torch.randn(inner // 2, 2))
        groups = inner if depthwise else dim
        self.spatial = ConvNormAct(inner, inner, 3, groups=groups, norm_eps=NORM_EPS, act=nn.GELU)
        self.gate = SqueezeExcite(inner, dim // 4)
        self.project_out = nn.Conv2d(inner, dim, 1)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        f = self.reinforced(x, strongest_channel(x))
        if self.wave is not None:
            with without_autocast(f):
                f = turn_pairs(f, self.wave)
        return self.project_out(self.gate(self.spatial(f.to(x.dtype))))

    def reinforced(self, x: Float[Tensor, "batch dim height width"], strongest: Tensor) -> Tensor:
        """Return f before the waves, (B, K, H, W), at least in float32. `strongest` is (B, 1, H, W)."""
        key, theta = self.key(x), nn.functional.gelu(self.theta(x))
        wide = torch.promote_types(key.dtype, torch.float32)
        product = key.to(wide) * theta.to(wide)
        return product + product.gather(1, strongest)

    def read_gates(self, x: Float[Tensor, "batch dim height width"]) -> dict[str, Tensor]:
        """Return the root mean square of the gating projection and the strongest channel's index, each (B, H, W)."""
        return {
            "modulation": nn.functional.gelu(self.theta(x)).square().mean(dim=1).sqrt(),
            "strongest channel": strongest_channel(x)[:, 0].to(x.dtype),
        }

    def merged(self) -> ChannelMixer:
        """Return an equivalent mixer for eval mode, with the waves in the convolution if groups hold whole pairs."""
        new = deepcopy(self)
        new.spatial = self.spatial.merged()
        conv = new.spatial.conv
        per_group = conv.in_channels // conv.groups
        if self.wave is not None and per_group % 2 == 0:
            conv.weight = nn.Parameter(_turn_inputs(conv.weight, self.wave, per_group).detach())
            new.wave = None
        return new


def strongest_channel(x: Float[Tensor, "batch dim height width"]) -> Tensor:
    """Return the index of the largest channel at each position: (B, 1, H, W)."""
    return x.argmax(dim=1, keepdim=True)


def turn_pairs(
    x: Float[Tensor, "batch inner height width"], wave: Float[Tensor, "pairs 2"]
) -> Float[Tensor, "batch inner height width"]:
    """Multiply neighboring channels, taken as real and imaginary parts, by one complex number per pair.

    Uses real arithmetic, which compilers and ONNX support.
    """
    re, im = x.unflatten(1, (-1, 2)).unbind(2)
    wave_re, wave_im = wave.to(x.dtype)[:, :, None, None].unbind(1)
    return torch.stack([wave_re * re - wave_im * im, wave_im * re + wave_re * im], dim=2).flatten(1, 2)


def _turn_inputs(weight: Tensor, wave: Tensor, per_group: int) -> Tensor:
    """Return kernels (out, per_group, h, w) that act on x like `weight` on the turned pairs of x."""
    pairs = wave.unflatten(0, (-1, per_group // 2))  # groups, pairs, 2
    pairs = pairs.repeat_interleave(weight.shape[0] // pairs.shape[0], dim=0)[..., None, None]
    re, im = weight.unflatten(1, (-1, 2)).unbind(2)
    wave_re, wave_im = pairs.unbind(2)
    return torch.stack([re * wave_re + im * wave_im, im * wave_re - re * wave_im], dim=2).flatten(1, 2)


class SpartanBlock(nn.Module):
    """x + scale_1 * SpatialMixer(norm(x)), then the same with the channel mixer: (B, C, H, W) -> (B, C, H, W).

    Args:
        early: whether the block is in the first half of the stages, where the spatial mixer's convolutions are dense
            and the channel mixer's is depthwise. Later, the spatial mixer's are depthwise and the channel mixer's is
            grouped.
        norm: a key of `NORMS`.
    """

    def __init__(self, dim: int, expand_ratio: int, *, early: bool, norm: str, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = NORMS[norm](dim), NORMS[norm](dim)
        self.spatial_mixer = SpatialMixer(dim, depthwise=not early)
        self.channel_mixer = ChannelMixer(dim, expand_ratio, depthwise=early)
        self.scale_1: nn.Parameter | None = nn.Parameter(torch.full((1, dim, 1, 1), INITIAL_SCALE))
        self.scale_2: nn.Parameter | None = nn.Parameter(torch.full((1, dim, 1, 1), INITIAL_SCALE))
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        x = x + self.drop_path(_scaled(self.spatial_mixer(self.norm_1(x)), self.scale_1))
        return x + self.drop_path(_scaled(self.channel_mixer(self.norm_2(x)), self.scale_2))

    def merged(self) -> SpartanBlock:
        """Return an equivalent block for eval mode, with its scales folded into each branch's last projection."""
        new = deepcopy(self)
        if self.scale_1 is not None and self.scale_2 is not None:
            scale_outputs(new.spatial_mixer.project_out, self.scale_1.flatten())
            scale_outputs(new.channel_mixer.project_out, self.scale_2.flatten())
            new.scale_1 = new.scale_2 = None
        return new


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else scale * x


class Spartan(StagedNetwork):
    """Two convolutions of stride 2, four stages, mean over positions, linear classifier.

    The stem keeps an odd last row or column, ceil(size / 4). The downsampling between stages drops it: at 75x50 pixels
    the maps are 19x13, 9x6, 4x3 and 2x1.
    """

    def __init__(self, config: SpartanConfig) -> None:
        super().__init__(config)
        dims = config.embed_dims
        self.min_size = config.patch_size * 2 ** (len(dims) - 1)
        self.stem = nn.Sequential(
            ConvNormAct(config.in_chans, dims[0] // 2, 3, 2, norm_eps=NORM_EPS, act=nn.GELU),
            ConvNormAct(dims[0] // 2, dims[0], 3, 2, norm_eps=NORM_EPS, act=nn.GELU),
        )
        self.stages = nn.ModuleList(self._stage(index) for index in range(len(dims)))
        self.level_norms = nn.ModuleDict()
        self.drop = nn.Dropout(config.drop_rate)
        self.head = self.make_head(config.num_classes)
        self.apply(init_by_fan_out)

    def _stage(self, index: int) -> Stage:
        config = self.config
        dim = config.embed_dims[index]
        downsample = (
            ConvNormAct(config.embed_dims[index - 1], dim, 2, 2, norm_eps=NORM_EPS, act=nn.SiLU)
            if index
            else nn.Identity()
        )
        # Unlike in other networks, the last block's rate is one step short of the configured one.
        before, total = sum(config.depths[:index]), sum(config.depths)
        blocks: list[nn.Module] = [
            SpartanBlock(
                dim,
                config.expand_ratios[index],
                early=index < len(config.depths) // 2,
                norm=config.norm,
                drop_path_rate=config.drop_path_rate * block / total,
            )
            for block in range(before, before + config.depths[index])
        ]
        return Stage(downsample, blocks)

    def check_input(self, x: Tensor, min_size: int | None = None) -> None:
        super().check_input(x, min_size)
        last = [-(-size // 4) * 4 // self.min_size for size in x.shape[2:]]
        if self.training and x.shape[0] == 1 and last == [1, 1]:
            raise ValueError(
                f"the last map of {x.shape[2]} x {x.shape[3]} pixels is one position: batch norms in training need "
                "more than one image, or larger ones"
            )

    def pool_features(self, features: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch features"]:
        return self.drop(super().pool_features(features))

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.config.embed_dims[-1], num_classes, init_by_fan_out)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the high-pass factors, in addition to biases and one-dimensional parameters."""
        return {name for name, _ in self.named_parameters() if name.endswith("gamma")}


_MIXERS: tuple[Rule, ...] = (
    ("smixer", "spatial_mixer"),
    ("cmixer", "channel_mixer"),
    ("spatial_mixer.proj_in", "spatial_mixer.project_in"),
    ("h_conv", "high"),
    ("l_conv", "low"),
    ("low.0.conv", "low.0"),
    ("h_attn.squeeze", "high_gate.reduce"),
    ("h_attn.expand", "high_gate.expand"),
    ("l_attn.squeeze", "low_gate.reduce"),
    ("l_attn.expand", "low_gate.expand"),
    ("channel_mixer.complex", "channel_mixer.wave"),
    ("channel_mixer.proj", "channel_mixer.key"),
    ("channel_mixer.conv", "channel_mixer.spatial"),
    ("channel_mixer.attn.squeeze", "channel_mixer.gate.reduce"),
    ("channel_mixer.attn.expand", "channel_mixer.gate.expand"),
    ("proj_out", "project_out"),
)


def _waves_to_ours(key: str, tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, 2) if key.endswith("complex") else tensor


def _waves_to_theirs(key: str, tensor: Tensor) -> Tensor:
    return tensor.reshape(1, 1, 1, -1, 2) if key.endswith("complex") else tensor


def layouts(config: SpartanConfig) -> list[KeyLayout]:
    """Return the published layout, which numbers blocks and downsampling layers consecutively."""
    rules: list[Rule] = [("^conv", "^stem")]
    number = 0
    for stage, depth in enumerate(config.depths):
        if stage:
            rules.append((f"^layers.{number}", f"^stages.{stage}.downsample"))
            number += 1
        rules += [(f"^layers.{number + i}", f"^stages.{stage}.blocks.{i}") for i in range(depth)]
        number += depth
    rules += [*_MIXERS, ("^linear", "^head")]
    return [KeyLayout("official", tuple(rules), tensor_to_ours=_waves_to_ours, tensor_to_theirs=_waves_to_theirs)]


def config_of(state: Mapping[str, Tensor]) -> SpartanConfig:
    """Return the configuration of a state dict in the published layout, inferred from its shapes.

    The authors have published weights of a size whose configuration they have not published.

    Raises:
        CheckpointError: if the keys are not those of a SpaRTAN.
    """
    blocks: dict[int, tuple[int, int]] = {}
    steps: list[int] = []
    for key, tensor in state.items():
        if match := re.fullmatch(r"layers\.(\d+)\.cmixer\.theta\.weight", key):
            inner, dim = tensor.shape[:2]
            blocks[int(match[1])] = (dim, inner // dim)
        elif match := re.fullmatch(r"layers\.(\d+)\.conv\.weight", key):
            steps.append(int(match[1]))
    if not blocks or "conv.0.conv.weight" not in state:
        raise CheckpointError("these are not a SpaRTAN's weights: no stem, or no block with a channel mixer")
    borders = [-1, *sorted(steps), max(blocks) + 1]
    stages = [[blocks[n] for n in range(first + 1, end) if n in blocks] for first, end in pairwise(borders)]
    if not all(stages):
        raise CheckpointError("these are not a whole SpaRTAN's weights: a stage has no block")
    return SpartanConfig(
        in_chans=state["conv.0.conv.weight"].shape[1],
        num_classes=state["linear.weight"].shape[0] if "linear.weight" in state else 0,
        depths=tuple(len(stage) for stage in stages),
        embed_dims=tuple(stage[0][0] for stage in stages),
        expand_ratios=tuple(stage[0][1] for stage in stages),
        out_indices=tuple(range(len(stages))),
    )


def spartan_from_checkpoint(source: str | Path) -> Spartan:
    """Return the network of a published checkpoint (file, URL or hub id) with its weights, in eval mode.

    Raises:
        CheckpointError: if the file cannot be read or does not hold a SpaRTAN.
    """
    state = peel(read_checkpoint(source))
    model = Spartan(config_of(state))
    load_state(model, state)
    return model.eval()


register(
    Spartan,
    paper="spartan",
    layouts=layouts,
    fresh_with_head=("head.",),
    variants={"spartan_tiny": Variant(SpartanConfig(), (3, 256, 256))},
)
