"""Gated-SwinRMT: retention along rows and columns, within shifted windows, with input-dependent gates.

RMT lets attention decay with the Manhattan distance, at a rate per head, and computes it along the rows of a map and
then along its columns. Gated-SwinRMT does so within Swin's shifted windows, whose cost per pixel is the same at any
size, and adds gates in one of two forms. "Retention" keeps the softmax and gates its output. "SWAT" uses sigmoid
weights, which need not sum to one, with biases that favor nearby positions in half of the heads and distant ones in the
others. It gates the values and normalizes the result. Maps shorter than two windows are one window: on small images all
attention is global.

Paper: Maity et al., "Gated-SwinRMT: Unifying Swin Windowed Attention with Retentive Manhattan Decay via Input-Dependent
Gating", 2026, arXiv:2604.06014. No code is public. We decided what the abstract leaves open: widths, the places of
gates and norm within the block, window size and its adaptation, and the signs and sizes of slopes. Trunk and baseline
are those of RMT's published code (Fan et al., 2023, arXiv:2309.11523).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.registry import Variant, Weights, register
from gatewise.layers.conv import ConvNormAct
from gatewise.layers.drop_path import drop_path_rates
from gatewise.layers.fold_norm import fold_into_previous
from gatewise.layers.init_weights import init_linear
from gatewise.layers.linear_head import linear_head
from gatewise.networks.image._base import ImageConfig
from gatewise.networks.image.gated_swinrmt.blocks import Block, DecayMode, GateMode, Mixer, SlopeMode
from gatewise.networks.image.gated_swinrmt.keys import FORMS, layouts
from gatewise.networks.image.skeletons.staged import Stage, StagedNetwork
from gatewise.ops.decayed_window_attention import ACTIVATIONS, Activation

STAGES = 4


@dataclass(frozen=True)
class GatedSwinRMTConfig(ImageConfig):
    """Sizes and options of a Gated-SwinRMT or RMT. All tuples but `out_indices` have one entry per stage.

    Args:
        num_heads: number of attention heads.
        decay_inits: `init` per stage: in head h of H, a weight loses 2^(-init - range h / H) per step of distance.
        decay_ranges: `range` in that formula, per stage.
        activation: activation of the attention weights, "softmax" or "sigmoid".
        decay: "additive" (in the logits), "multiplicative" (after the activation) or "none".
        slopes: "none", or "balanced" for distance biases of both signs, added to the logits.
        value_gate: whether values are multiplied by a SiLU of the input.
        out_norm: whether a layer norm follows attention, before the convolution of the values is added.
        out_gate: "none", or "elementwise" for a sigmoid gate of the input before the last linear layer.
        window: side of the attention windows; None for the size of the map.
        shift: whether every second block of a stage shifts its windows by half a window.
        rope: whether to use rotary positions within windows.
        decomposed: per stage, whether attention runs along rows, then columns, or over the whole map, as in RMT's last
            stages.
        layer_scales: per stage, whether branches have a scale per channel.
        layer_scale_init: initial value of these scales.
        projection_dim: number of channels before pooling.
        out_indices: stages that `forward_pyramid` returns.
    """

    embed_dims: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (4, 8, 26, 4)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    mlp_ratios: tuple[float, ...] = (4, 4, 3, 3)
    decay_inits: tuple[float, ...] = (2, 2, 2, 2)
    decay_ranges: tuple[float, ...] = (4, 4, 6, 6)
    activation: Activation = "softmax"
    decay: DecayMode = "additive"
    slopes: SlopeMode = "none"
    value_gate: bool = False
    out_norm: bool = False
    out_gate: GateMode = "elementwise"
    window: int | None = 7
    shift: bool = True
    rope: bool = True
    decomposed: tuple[bool, ...] = (True, True, True, True)
    layer_scales: tuple[bool, ...] = (False, False, False, False)
    layer_scale_init: float = 1e-6
    projection_dim: int = 1024
    out_indices: tuple[int, ...] = (0, 1, 2, 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop_rate:
            raise ValueError(f"Gated-SwinRMT has no dropout: drop_rate must be 0, not {self.drop_rate}")
        for name in _PER_STAGE:
            if len(getattr(self, name)) != STAGES:
                raise ValueError(f"{name} must have one entry per stage ({STAGES}), not {getattr(self, name)}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if not set(self.out_indices) <= set(range(STAGES)):
            raise ValueError(f"out_indices must be stages 0..{STAGES - 1}, not {self.out_indices}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be positive, or None for the whole map, not {self.window}")
        if min(*self.depths, *self.embed_dims, *self.num_heads, self.projection_dim) < 1:
            raise ValueError(
                f"sizes must be positive, not depths {self.depths}, embed_dims {self.embed_dims}, num_heads "
                f"{self.num_heads} and projection_dim {self.projection_dim}"
            )
        for stage in range(STAGES):
            self._check_stage(stage)
        self._check_attention()

    def _check_stage(self, stage: int) -> None:
        dim, heads = self.embed_dims[stage], self.num_heads[stage]
        if dim % (2 * heads if self.rope else heads):
            raise ValueError(
                f"stage {stage + 1}: embed_dims must be a multiple of num_heads, and of twice as many with rope, which "
                f"pairs channels, not {dim} with {heads} heads"
            )
        init, spread = self.decay_inits[stage], self.decay_ranges[stage]
        if init <= 0 or init + spread <= 0:
            raise ValueError(
                f"stage {stage + 1}: decay_inits must be positive, with decay_ranges added too, not {init}"
            )

    def _check_attention(self) -> None:
        if self.embed_dims[0] % 2:
            raise ValueError(f"the stem halves the first width: it must be even, not {self.embed_dims[0]}")
        if self.slopes != "none" and self.activation == "softmax" and self.window is None:
            raise ValueError("slopes grow with the distance: with a softmax they need a window, not None")
        is_rmt = self.activation == "softmax" and self.decay != "multiplicative" and self.slopes == "none"
        if not all(self.decomposed) and not (is_rmt and self.window is None):
            raise ValueError(
                "attention over the whole map at once (decomposed False) is RMT's: window=None, a softmax, no slopes "
                f"and additive decay or none, not window={self.window}, {self.activation}, slopes {self.slopes} and "
                f"decay {self.decay}"
            )

    @property
    def patch_size(self) -> int:
        """Stride of the stem."""
        return 4


_PER_STAGE = (
    "embed_dims",
    "depths",
    "num_heads",
    "mlp_ratios",
    "decay_inits",
    "decay_ranges",
    "decomposed",
    "layer_scales",
)
_CHOICES = {
    "activation": ACTIVATIONS,
    "decay": ("additive", "multiplicative", "none"),
    "slopes": ("none", "balanced"),
    "out_gate": ("none", "elementwise"),
}


def conv_with_bias(in_dim: int, dim: int, stride: int, act: type[nn.Module] | None = nn.GELU) -> ConvNormAct:
    """Return 3x3 convolution, norm and activation. The bias is as published, though the norm cancels it."""
    unit = ConvNormAct(in_dim, dim, 3, stride, act=act)
    unit.conv = nn.Conv2d(in_dim, dim, 3, stride, padding=1)
    return unit


class Stem(nn.Sequential):
    """Four convolutions to a quarter of the resolution, channels last in memory: (B, C, H, W) -> (B, C', H/4, W/4)."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__(
            conv_with_bias(in_dim, dim // 2, 2),
            conv_with_bias(dim // 2, dim // 2, 1),
            conv_with_bias(dim // 2, dim, 2),
            conv_with_bias(dim, dim, 1, act=None),
        )

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        # From here on, linear layers and convolutions read the same storage without a copy.
        return super().forward(x.contiguous(memory_format=torch.channels_last))


class Projection(nn.Module):
    """Linear layer, batch norm and SiLU before pooling: (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, dim)
        self.norm: nn.Module = nn.BatchNorm2d(dim)

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim height width"]:
        return F.silu(self.norm(self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))

    def merged(self) -> Projection:
        """Return an equivalent projection for eval mode, with the norm folded into the linear layer."""
        new = deepcopy(self)
        if isinstance(new.norm, nn.BatchNorm2d):
            fold_into_previous(new.linear, new.norm)
            new.norm = nn.Identity()
        return new


class GatedSwinRMT(StagedNetwork):
    """Stem, stages, projection, global pooling, linear classifier. Takes any size; strides round up."""

    def __init__(self, config: GatedSwinRMTConfig) -> None:
        super().__init__(config)
        if config.activation == "sigmoid" and not config.out_norm:
            warnings.warn(
                "sigmoid weights are not normalized: without out_norm, activations grow with the size of windows",
                stacklevel=2,
            )
        self.stem = Stem(config.in_chans, config.embed_dims[0])
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        self.stages = nn.ModuleList(_stage(config, stage, rates[stage]) for stage in range(STAGES))
        self.level_norms = nn.ModuleDict()
        self.project = Projection(config.embed_dims[-1], config.projection_dim)
        self.head = self.make_head(config.num_classes)
        self.apply(init_linear)

    def forward_features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features h w"]:
        """Return the projected map, at 1 / 32 of the image size, rounded up."""
        return self.project(self._run_stages(x)[-1])

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.config.projection_dim, num_classes, init_linear)

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a checkpoint's tensors, already under our names, adapted to this network's attention gates and norms.

        Parameters that the checkpoint lacks keep their values, and unused tensors are dropped. RMT's weights thus fill
        the trunk that all forms share.
        """
        own = {key: tensor for key, tensor in self.state_dict().items() if _ADDED.fullmatch(key)}
        given = {key: tensor for key, tensor in state.items() if key in own or not _ADDED.fullmatch(key)}
        return {**own, **given}


_ADDED = re.compile(r".*\.mixer\.(value_gate|out_gate|out_norm)\.(weight|bias)")


def _stage(config: GatedSwinRMTConfig, stage: int, rates: list[float]) -> Stage:
    dim = config.embed_dims[stage]
    downsample = conv_with_bias(config.embed_dims[stage - 1], dim, 2, act=None) if stage else nn.Identity()
    scale = config.layer_scale_init if config.layer_scales[stage] else None
    return Stage(
        downsample,
        [
            Block(dim, _mixer(config, stage, index), config.mlp_ratios[stage], scale, rate)
            for index, rate in enumerate(rates)
        ],
    )


def _mixer(config: GatedSwinRMTConfig, stage: int, index: int) -> Mixer:
    return Mixer(
        config.embed_dims[stage],
        config.num_heads[stage],
        decay_init=config.decay_inits[stage],
        decay_range=config.decay_ranges[stage],
        activation=config.activation,
        decay=config.decay,
        slopes=config.slopes,
        value_gate=config.value_gate,
        out_norm=config.out_norm,
        out_gate=config.out_gate,
        window=config.window,
        is_shifted=config.shift and index % 2 == 1,
        rope=config.rope,
        is_full=not config.decomposed[stage],
    )


def _form(name: str, classes: int = 100, **fields: Any) -> Variant:
    return Variant(GatedSwinRMTConfig(num_classes=classes, **(FORMS[name] | fields)))


def _rmt(top1: str, **fields: Any) -> Variant:
    weights = Weights("files listed at github.com/qhfan/RMT", "not stated", f"{top1} % top-1, ImageNet-1K at 224")
    return replace(_form("rmt", 1000, **fields), weights=weights)


_TINY: dict[str, Any] = {"embed_dims": (32, 64, 128, 256), "depths": (2, 2, 6, 2), "num_heads": (2, 2, 4, 8)}
_T_WIDTHS: dict[str, Any] = {"embed_dims": (64, 128, 256, 512), "num_heads": (4, 4, 8, 16)}
_SCALED: dict[str, Any] = {"depths": (4, 8, 25, 8), "layer_scales": (False, False, True, True)}

register(
    GatedSwinRMT,
    paper="gated_swinrmt",
    layouts=layouts,
    fresh_with_head=("head.",),
    variants={
        "gated_swinrmt_base_swat": _form("swat"),
        "gated_swinrmt_base_retention": _form("retention"),
        "gated_swinrmt_base_rmt": _form("rmt"),
        "gated_swinrmt_tiny_swat": _form("swat", **_TINY),
        "gated_swinrmt_tiny_retention": _form("retention", **_TINY),
        "gated_swinrmt_tiny_rmt": _form("rmt", **_TINY),
        "rmt_t": _rmt(
            "82.4",
            depths=(2, 2, 8, 2),
            mlp_ratios=(3, 3, 3, 3),
            decomposed=(True, True, False, False),
            drop_path_rate=0.1,
            **_T_WIDTHS,
        ),
        "rmt_s": _rmt("84.1", depths=(3, 4, 18, 4), drop_path_rate=0.15, **_T_WIDTHS),
        "rmt_b": _rmt(
            "85.0",
            embed_dims=(80, 160, 320, 512),
            num_heads=(5, 5, 10, 16),
            decay_ranges=(5, 5, 6, 6),
            drop_path_rate=0.4,
            **_SCALED,
        ),
        "rmt_l": _rmt(
            "85.5",
            embed_dims=(112, 224, 448, 640),
            num_heads=(7, 7, 14, 20),
            decay_ranges=(6, 6, 6, 6),
            drop_path_rate=0.5,
            **_SCALED,
        ),
    },
)
