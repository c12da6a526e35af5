"""MOAT: a mobile convolution before attention, in place of the transformer's MLP.

An inverted residual does what an MLP does, and also mixes neighbors and takes over downsampling. Attention follows it.
Since convolutions already carry information between windows, windows need no shift. Two stages of inverted residuals
with squeeze-excitation and two of MOAT blocks make a network of 3 to 500 million parameters.

Paper: Yang et al., "MOAT: Alternating Mobile Convolution and Attention Brings Strong Vision Models", 2022,
arXiv:2210.01820. As in the published code, convolutions and pooling pad like TensorFlow's "same", and the hidden width
is four times the output width. Unlike in that code, global attention takes its window from the current map.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from operator import mul
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.registry import Variant, Weights, register
from gatewise.layers.drop_path import drop_path_rates
from gatewise.layers.linear_head import linear_head
from gatewise.networks.image._base import FeatureInfo, ImageConfig, ImageNetwork
from gatewise.networks.image.moat.blocks import (
    LAYER_NORM_EPS,
    MBConv,
    MoatBlock,
    RelativeAttention,
    Stem,
)
from gatewise.networks.image.moat.keys import adapt_tables, layouts
from gatewise.ops.window_attention import Window, fit_window

BlockType = Literal["mbconv", "moat"]
BLOCK_TYPES = ("mbconv", "moat")


@dataclass(frozen=True)
class MoatConfig(ImageConfig):
    """Sizes and options of a MOAT. All tuples but `stem_dims` and `out_indices` have one entry per stage.

    Args:
        drop_path_rate: stochastic depth rate, 1 minus the published survival rate; block i of n has i / n of it
        stem_dims: widths of the two convolutions of the stem.
        block_types: "mbconv" (inverted residual with squeeze-excitation) or "moat" (inverted residual without it, plus
            attention).
        stage_strides: stride of the first block, 1 or 2.
        expand_ratio: hidden width relative to the output width.
        se_ratio: hidden width of the squeeze-excitation relative to the output width; None for none.
        head_dim: channels per attention head.
        windows: rows and columns of the windows; None for global attention in that stage, or in all stages. A window
            larger than the map is reduced to it.
        norm_momentum: weight of each batch in the running statistics; the published 0.01 is meant for many thousand
            steps.
        pad_windows: whether to accept maps that are not a multiple of their window, as if padded at the bottom and
            right, with masked keys.
        global_at_end: whether the last block of each MOAT stage attends globally.
        relative_position: whether logits get a relative position bias.
        position_sizes: side, or rows and columns, of the window that a stage's table of relative positions is sized
            for; the table is resized to the window in use. None for the stage's own window.
        pool_size: kernel size of the average pooling in strided shortcuts: 2, or 3 as in the published dense
            prediction.
        checkpoint_attention: whether to recompute the attention sub-layers in the backward pass.
        features_only: whether to omit the final norm and the classifier.
        out_indices: stages that `forward_pyramid` returns.
    """

    stem_dims: tuple[int, int] = (64, 64)
    block_types: tuple[BlockType, ...] = ("mbconv", "mbconv", "moat", "moat")
    depths: tuple[int, ...] = (2, 3, 7, 2)
    embed_dims: tuple[int, ...] = (96, 192, 384, 768)
    stage_strides: tuple[int, ...] = (2, 2, 2, 2)
    expand_ratio: int = 4
    se_ratio: float | None = 0.25
    head_dim: int = 32
    windows: tuple[Window | None, ...] | None = None
    pad_windows: bool = False
    norm_momentum: float = 0.01
    global_at_end: bool = False
    relative_position: bool = True
    position_sizes: tuple[int | Window | None, ...] = (None, None, 14, 7)
    pool_size: int = 2
    checkpoint_attention: bool = False
    features_only: bool = False
    out_indices: tuple[int, ...] = (0, 1, 2, 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop_rate:
            raise ValueError(f"MOAT has no dropout: drop_rate must be 0, not {self.drop_rate}")
        if self.features_only and self.num_classes:
            raise ValueError("features_only has no classifier: pass num_classes=0 with it")
        stages = len(self.depths)
        for name in ("block_types", "embed_dims", "stage_strides", "windows", "position_sizes"):
            value = getattr(self, name)
            if value is not None and len(value) != stages:
                raise ValueError(f"{name} must have one entry per stage ({stages}), not {value}")
        if not set(self.block_types) <= set(BLOCK_TYPES):
            raise ValueError(f"block_types must be of {', '.join(BLOCK_TYPES)}, not {self.block_types}")
        if not set(self.stage_strides) <= {1, 2}:
            raise ValueError(f"stage_strides must be 1 or 2, not {self.stage_strides}")
        if self.pool_size < 1 or self.expand_ratio < 1:
            raise ValueError(f"pool_size and expand_ratio must be positive, not {self.pool_size}, {self.expand_ratio}")
        if not set(self.out_indices) <= set(range(stages)):
            raise ValueError(f"out_indices must be stages 0..{stages - 1}, not {self.out_indices}")
        for stage in range(stages):
            if self.block_types[stage] == "moat":
                self._check_attention(stage)

    def _check_attention(self, stage: int) -> None:
        dim, window = self.embed_dims[stage], self.window(stage)
        if self.head_dim < 1 or dim % self.head_dim:
            raise ValueError(f"widths of MOAT stages must be multiples of head_dim {self.head_dim}, not {dim}")
        for name, pair in (("windows", window), ("position_sizes", self.table_window(stage))):
            if pair is not None and (len(pair) != 2 or min(pair) < 1):
                raise ValueError(f"{name} must be two positive numbers (rows, columns), not {pair}")
        if self.relative_position and self.table_window(stage) is None:
            raise ValueError(
                f"stage {stage + 1} attends globally and needs an entry in position_sizes, not None; or pass "
                "relative_position=False"
            )

    def window(self, stage: int) -> Window | None:
        """Return the window of a stage, or None for global attention."""
        return None if self.windows is None else self.windows[stage]

    def table_window(self, stage: int) -> Window | None:
        """Return the window that a stage's table of relative positions is sized for."""
        size = self.position_sizes[stage]
        if size is None:
            return self.window(stage)
        return (size, size) if isinstance(size, int) else size

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each stage's map in input pixels; the stem has stride 2."""
        return tuple(2 * stride for stride in accumulate(self.stage_strides, mul))


class Moat(ImageNetwork):
    """Stem, stages of MBConv and MOAT blocks, global pooling, norm, linear classifier. Any size; strides round up."""

    def __init__(self, config: MoatConfig) -> None:
        super().__init__(config)
        self.stem = Stem(config.in_chans, config.stem_dims)
        self.stages = nn.ModuleList()
        blocks = sum(config.depths)
        # Linear up to a virtual extra block: block i of n has i / n of the rate.
        rates = drop_path_rates(config.drop_path_rate * (blocks - 1) / blocks, config.depths)
        dim = config.stem_dims[1]
        for stage, width in enumerate(config.embed_dims):
            widths = [dim, *[width] * (config.depths[stage] - 1)]
            self.stages.append(
                nn.ModuleList(_block(config, stage, i, widths[i], rates[stage][i]) for i in range(config.depths[stage]))
            )
            dim = width
        self.norm = nn.Identity() if config.features_only else nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.head = self.make_head(config.num_classes)
        self.apply(_init_weights)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = config.norm_momentum

    @property
    def feature_info(self) -> list[FeatureInfo]:
        return [FeatureInfo(self.config.embed_dims[i], self.config.strides[i]) for i in self.config.out_indices]

    def forward_features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features h w"]:
        """Return the last stage's map, before pooling and norm."""
        return self._run_stages(x)[-1]

    def pool_features(self, features: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch features"]:
        return self.norm(super().pool_features(features))

    def forward_pyramid(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        """Return the maps of `out_indices` after a GELU, as the published decoders use them ("res2" to "res5")."""
        maps = self._run_stages(x)
        return [F.gelu(maps[1 + i]) for i in self.config.out_indices]

    def forward_endpoints(self, x: Float[Tensor, "batch channels height width"]) -> dict[str, Tensor]:
        """Return all maps by published name: "stage1" is the stem's, "res1" is "stage1" after a GELU, and so on."""
        maps = dict(enumerate(self._run_stages(x), start=1))
        return {f"stage{i}": x for i, x in maps.items()} | {f"res{i}": F.gelu(x) for i, x in maps.items()}

    def _run_stages(self, x: Tensor) -> list[Tensor]:
        """Return the stem's map and those of all stages."""
        self.check_input(x)
        self._check_windows(x.shape[2], x.shape[3])
        maps = [self.stem(x)]
        for stage in self.stages:
            x = maps[-1]
            x = self.run_blocks(stage.children(), x)
            maps.append(x)
        return maps

    def _check_windows(self, height: int, width: int) -> None:
        """Raise a ValueError that says what to do if the map of a stage cannot be split into its windows."""
        config = self.config
        for stage, stride in enumerate(config.strides):
            window = config.window(stage)
            if window is None or config.block_types[stage] == "mbconv" or config.pad_windows:
                continue
            size = tuple(-(-length // stride) for length in (height, width))
            fitted = fit_window(window, *size)
            if all(length % extent == 0 for length, extent in zip(size, fitted, strict=True)):
                continue
            multiple = "x".join(str(extent * stride) for extent in dict.fromkeys(window))
            raise ValueError(
                f"stage {stage + 1} map {size[0]}x{size[1]} is not divisible by window {window[0]}x{window[1]}; pad "
                f"the input to a multiple of {multiple} or enable window padding (pad_windows=True)"
            )

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.config.embed_dims[-1], num_classes, _init_weights)

    def adapt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a checkpoint's tensors, already under our names, with relative position tables for this network."""
        return adapt_tables(state, {key: value for key, value in self.state_dict().items() if key.endswith(".table")})


def _block(config: MoatConfig, stage: int, index: int, in_dim: int, drop_path_rate: float) -> nn.Module:
    dim, with_attention = config.embed_dims[stage], config.block_types[stage] == "moat"
    mbconv = MBConv(
        in_dim,
        dim,
        config.stage_strides[stage] if index == 0 else 1,
        expand_ratio=config.expand_ratio,
        se_ratio=None if with_attention else config.se_ratio,
        pool_size=config.pool_size,
        drop_path_rate=drop_path_rate,
    )
    if not with_attention:
        return mbconv
    is_global = config.global_at_end and index == config.depths[stage] - 1
    attention = RelativeAttention(
        dim,
        config.head_dim,
        None if is_global else config.window(stage),
        config.table_window(stage) if config.relative_position else None,
        config.pad_windows,
    )
    return MoatBlock(mbconv, attention, drop_path_rate, config.checkpoint_attention)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, RelativeAttention) and module.table is not None:
        nn.init.normal_(module.table, std=0.02)


_FILES = "https://storage.googleapis.com/gresearch/tf-deeplab/checkpoint"


def _variant(file: str, top1: str, config: MoatConfig, relative_position: bool = True) -> Variant:
    """Return a published model; its file name ends with the image size in pixels."""
    pixels = int(file.rpartition("_")[2])
    score = f"{top1} % top-1, ImageNet-1K at {pixels} (model page)"
    source = f"{_FILES}/{file}_{'w' if relative_position else 'wo'}_position_embedding.tar.gz"
    weights = Weights(source, "Apache-2.0", score)
    if "22k" in file:
        # Pixels are scaled to [-1, 1].
        weights = replace(weights, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return Variant(replace(config, relative_position=relative_position), (3, pixels, pixels), weights)


def _config(width: int, depths: tuple[int, ...], survival: float, stem: int | None = None) -> MoatConfig:
    stem = width if stem is None else stem
    return MoatConfig(
        stem_dims=(stem, stem),
        depths=depths,
        embed_dims=(width, 2 * width, 4 * width, 8 * width),
        drop_path_rate=round(1 - survival, 6),
    )


_SHALLOW, _DEEP, _DEEPEST = (2, 3, 7, 2), (2, 6, 14, 2), (2, 12, 28, 2)
_TINY_0, _TINY_1, _TINY_2 = (_config(width, _SHALLOW, 1.0) for width in (32, 40, 56))
_TINY_3 = _config(80, _SHALLOW, 0.9)
_0, _1 = _config(96, _SHALLOW, 0.8, stem=64), _config(96, _DEEP, 0.7, stem=64)
_2, _3, _4 = _config(128, _DEEP, 0.7), _config(160, _DEEPEST, 0.4), _config(256, _DEEPEST, 0.3)

register(
    Moat,
    paper="moat",
    layouts=layouts,
    # A classification checkpoint fills all of the features_only form.
    fresh_with_head=("head.", "norm."),
    variants={
        "tiny_moat_0": _variant("tiny_moat0_imagenet_1k_256", "76.6", _TINY_0),
        "tiny_moat_1": _variant("tiny_moat1_imagenet_1k_256", "79.2", _TINY_1),
        "tiny_moat_2": _variant("tiny_moat2_imagenet_1k_256", "81.7", _TINY_2),
        "tiny_moat_3": _variant("tiny_moat3_imagenet_1k_256", "83.3", _TINY_3),
        "moat_0": _variant("moat0_imagenet_1k_224", "83.3", _0),
        "moat_1": _variant("moat1_imagenet_1k_224", "84.2", _1),
        "moat_2": _variant("moat2_imagenet_22k_and_1k_384", "87.5", _2),
        "moat_3": _variant("moat3_imagenet_22k_and_1k_512", "88.4", _3),
        "moat_4": _variant("moat4_imagenet_22k_and_1k_512", "89.1", _4),
        # Without a position bias: less accurate, and independent of the image size.
        "tiny_moat_0_no_position": _variant("tiny_moat0_imagenet_1k_256", "76.0", _TINY_0, False),
        "tiny_moat_1_no_position": _variant("tiny_moat1_imagenet_1k_256", "78.9", _TINY_1, False),
        "tiny_moat_2_no_position": _variant("tiny_moat2_imagenet_1k_256", "81.3", _TINY_2, False),
        "tiny_moat_3_no_position": _variant("tiny_moat3_imagenet_1k_256", "83.0", _TINY_3, False),
        "moat_0_no_position": _variant("moat0_imagenet_1k_224", "83.0", _0, False),
        "moat_1_no_position": _variant("moat1_imagenet_1k_224", "84.1", _1, False),
        "moat_2_no_position": _variant("moat2_imagenet_22k_and_1k_384", "87.2", _2, False),
        "moat_3_no_position": _variant("moat3_imagenet_22k_and_1k_512", "88.2", _3, False),
        "moat_4_no_position": _variant("moat4_imagenet_22k_and_1k_512", "88.9", _4, False),
    },
)
