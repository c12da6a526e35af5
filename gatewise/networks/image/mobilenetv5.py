"""MobileNetV5's encoder: convolutions first, then attention with a shared key and value head, and two fused scales.

Every convolution is followed by a norm over channels that does not subtract the mean. It keeps values within bounds
that integers can represent. Late stages alternate inverted residuals and attention, whose heads share keys and values.
The last two stages are fused and resampled to a fixed grid: 256 vectors for any image, for a language model to read.

Sources: Chen et al., "AutoNeural: Co-Designing Vision-Language Models for NPU Inference", 2025, arXiv:2512.02924, which
uses it as its vision encoder; Gemma 3n, whose weights are published. Attention with one key head: Shazeer 2019,
arXiv:1911.02150. Universal inverted residual: Qin et al. 2024, arXiv:2404.10518 (MobileNetV4).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout, Rule
from gatewise.catalog.registry import Variant, Weights, register
from gatewise.layers.conv import ConvNormAct
from gatewise.layers.drop_path import DropPath
from gatewise.layers.fold_norm import scale_outputs
from gatewise.layers.init_weights import init_by_fan_out
from gatewise.layers.linear_head import linear_head
from gatewise.layers.norm import RmsNorm2d
from gatewise.networks.image._base import FeatureInfo, ImageConfig, ImageNetwork

INITIAL_SCALE = 1e-5

_ATTENTION_640 = ("mqa_k3_h12_s1_v2_d64_c640", "uir_a0_k0_s1_e2_c640")
_ATTENTION_1280 = ("mqa_k3_h16_s1_d96_c1280", "uir_a0_k0_s1_e2_c1280")

ENCODER_300M = (
    ("er_k3_s2_e4_c128", *("er_k3_s1_e4_c128",) * 2),
    ("uir_a3_k5_s2_e6_c256", *("uir_a5_k0_s1_e4_c256", "uir_a3_k0_s1_e4_c256") * 2),
    (
        "uir_a5_k5_s2_e6_c640",
        *("uir_a5_k0_s1_e4_c640",) * 7,
        "uir_a0_k0_s1_e1_c640",
        *_ATTENTION_640 * 14,
    ),
    ("uir_a5_k5_s2_e6_c1280", *_ATTENTION_1280 * 19),
)
"""Stages of the encoder with 294 million parameters."""


@dataclass(frozen=True)
class MobileNetV5Config(ImageConfig):
    """Blocks and sizes of an encoder.

    Args:
        num_classes: number of classes of a linear classifier on the mean of the fused grid; the published encoder has
            none.
        blocks: one string per block and stage: the kind, then a letter and a number for each option. "er" is an edge
            residual and "uir" a universal inverted residual. Both have kernel size k, kernel size a of a convolution in
            front (0 for none), stride s, expansion e and channels c. "mqa" is attention with h heads of width d,
            channels c, and stride v of keys and values. A number after r repeats the block.
        stem_dim: channels of the first convolution.
        fused_dim: channels of the fused grid.
        fused_stages: two or more stages, from fine to coarse, that are fused at the size of the first.
        grid_size: rows and columns of the fused grid.
    """

    num_classes: int = 0
    blocks: tuple[tuple[str, ...], ...] = ENCODER_300M
    stem_dim: int = 64
    fused_dim: int = 2048
    fused_stages: tuple[int, ...] = (-2, -1)
    grid_size: int = 16
    out_indices: tuple[int, ...] = (0, 1, 2, 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        for stage in self.blocks:
            for text in stage:
                parse_block(text)
        stages = range(-len(self.blocks), len(self.blocks))
        if not self.fused_stages or not set(self.fused_stages) <= set(stages):
            raise ValueError(f"fused_stages must be of {len(self.blocks)} stages, not {self.fused_stages}")
        if not set(self.out_indices) <= set(range(len(self.blocks))):
            raise ValueError(f"out_indices must be stages 0..{len(self.blocks) - 1}, not {self.out_indices}")
        for name in ("stem_dim", "fused_dim", "grid_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")


def parse_block(text: str) -> tuple[str, dict[str, int]]:
    """Return the kind and options of a block's string.

    Raises:
        ValueError: if the string is not a block.
    """
    kind, *parts = text.split("_")
    options = {match[1]: int(match[2]) for part in parts if (match := re.fullmatch(r"([a-z])(\d+)", part))}
    if kind not in ("er", "uir", "mqa") or len(options) != len(parts) or "c" not in options:
        raise ValueError(f"a block is er, uir or mqa with options such as k3 and c128, not {text!r}")
    if options.get("s", 1) not in (1, 2) or options.get("v", 1) not in (1, 2):
        raise ValueError(f"strides must be 1 or 2, not those of {text!r}")
    if kind == "mqa" and not {"h", "d"} <= set(options):
        raise ValueError(f"attention needs heads h and their width d, not {text!r}")
    return kind, options


class ConvRmsAct(ConvNormAct):
    """Convolution, norm over channels, GELU (its tanh form): (B, C, H, W) -> (B, C', H', W').

    Args:
        act: whether to apply the GELU.
        bias: whether the convolution has biases.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int = 1,
        stride: int = 1,
        *,
        groups: int = 1,
        act: bool = True,
        bias: bool = False,
    ) -> None:
        gelu = partial(nn.GELU, approximate="tanh") if act else None
        super().__init__(in_dim, dim, kernel_size, stride, groups=groups, padding="same", act=gelu)
        self.norm = RmsNorm2d(dim)
        if bias:
            self.conv.register_parameter("bias", nn.Parameter(torch.zeros(dim)))


class EdgeResidual(nn.Module):
    """An expanding dense convolution and a projecting pointwise one: (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, in_dim: int, dim: int, stride: int, expand_ratio: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.residual = stride == 1 and in_dim == dim
        self.spatial = ConvRmsAct(in_dim, expand_ratio * in_dim, kernel_size, stride)
        self.shrink = ConvRmsAct(expand_ratio * in_dim, dim, act=False)

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        y = self.shrink(self.spatial(x))
        return x + y if self.residual else y


class UniversalInvertedResidual(nn.Module):
    """Depthwise, expand, depthwise, project, where either depthwise convolution is optional.

    (B, C, H, W) -> (B, C', H', W'). The stride is in the second depthwise convolution if there is one, else in the
    first.

    Args:
        start_kernel: kernel size of the depthwise convolution before the expansion, 0 for none; no activation follows
            it.
        middle_kernel: kernel size of the depthwise convolution between expansion and projection, 0 for none.
        scaled: whether there are learned factors on the outputs, and a shortcut where shapes allow.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        stride: int = 1,
        expand_ratio: float = 4,
        *,
        start_kernel: int = 0,
        middle_kernel: int = 0,
        scaled: bool = True,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if stride > 1 and not (start_kernel or middle_kernel):
            raise ValueError("an inverted residual with a stride needs a depthwise convolution")
        hidden = round_to_eights(in_dim * expand_ratio)
        self.residual = scaled and stride == 1 and in_dim == dim
        first_stride = 1 if middle_kernel else stride
        self.start = (
            ConvRmsAct(in_dim, in_dim, start_kernel, first_stride, groups=in_dim, act=False) if start_kernel else None
        )
        self.expand = ConvRmsAct(in_dim, hidden)
        self.middle = ConvRmsAct(hidden, hidden, middle_kernel, stride, groups=hidden) if middle_kernel else None
        self.project = ConvRmsAct(hidden, dim, act=False)
        self.gamma: nn.Parameter | None = nn.Parameter(torch.full((dim,), INITIAL_SCALE)) if scaled else None
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        y = x if self.start is None else self.start(x)
        y = self.expand(y)
        y = self.project(y if self.middle is None else self.middle(y))
        if self.gamma is not None:
            y = y * self.gamma[:, None, None]
        return x + self.drop_path(y) if self.residual else y

    def merged(self) -> UniversalInvertedResidual:
        """Return an equivalent module for eval mode, with the factors folded into the last norm."""
        new = deepcopy(self)
        if self.gamma is not None:
            new.project.norm.weight = nn.Parameter((self.project.norm.get_parameter("weight") * self.gamma).detach())
            new.gamma = None
        return new


def round_to_eights(channels: float) -> int:
    """Round to a multiple of 8, at least 8, without going more than 10 % below `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class Thinned(nn.Module):
    """Projection to keys or values: a pointwise convolution, after a strided one if `stride` is not 1."""

    def __init__(self, dim: int, head_dim: int, stride: int) -> None:
        super().__init__()
        self.down = ConvRmsAct(dim, dim, 3, stride, groups=dim, act=False) if stride > 1 else None
        self.proj = nn.Conv2d(dim, head_dim, 1, bias=False)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch 1 keys head_dim"]:
        y = self.proj(x if self.down is None else self.down(x))
        return y.flatten(2).transpose(1, 2)[:, None]


class MultiQueryAttention(nn.Module):
    """x + gamma * attention(norm(x)), with many query heads and one key and value head: (B, C, H, W) -> (B, C, H, W).

    There is no position embedding.

    Args:
        stride: stride of keys and values; 2 halves their resolution.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, stride: int = 1, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.heads = (num_heads, head_dim)
        self.norm = RmsNorm2d(dim)
        self.query = nn.Conv2d(dim, num_heads * head_dim, 1, bias=False)
        self.key, self.value = Thinned(dim, head_dim, stride), Thinned(dim, head_dim, stride)
        self.output = nn.Conv2d(num_heads * head_dim, dim, 1, bias=False)
        self.gamma: nn.Parameter | None = nn.Parameter(torch.full((dim,), INITIAL_SCALE))
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        y = self.norm(x)
        # Heads are concatenated along the positions, so keys are shared without being copied.
        q = self.query(y).unflatten(1, self.heads).flatten(3).transpose(2, 3)
        attended = F.scaled_dot_product_attention(q.flatten(1, 2)[:, None], self.key(y), self.value(y))
        maps = attended[:, 0].unflatten(1, q.shape[1:3]).transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])
        out = self.output(maps)
        return x + self.drop_path(out if self.gamma is None else out * self.gamma[:, None, None])

    def merged(self) -> MultiQueryAttention:
        """Return an equivalent module for eval mode, with the factors folded into the last convolution."""
        new = deepcopy(self)
        if self.gamma is not None:
            scale_outputs(new.output, self.gamma)
            new.gamma = None
        return new


class MobileNetV5(ImageNetwork):
    """Stem, stages, and fusion of the last stages on a fixed grid, with an optional linear classifier on its mean.

    Strided convolutions keep an odd last row or column. If the finer fused stage is not a multiple of the grid, it is
    resampled bilinearly, with a warning, as the published encoder was made for multiples of 256 pixels.
    """

    min_size = 32

    def __init__(self, config: MobileNetV5Config) -> None:
        super().__init__(config)
        self.stem = ConvRmsAct(config.in_chans, config.stem_dim, 3, 2, bias=True)
        self.stages = nn.ModuleList()
        self.dims: list[int] = []
        self.strides: list[int] = []
        dim, stride = config.stem_dim, 2
        total = sum(len(expand(stage)) for stage in config.blocks)
        done = 0
        for stage in config.blocks:
            blocks: list[nn.Module] = []
            for kind, options in expand(stage):
                rate = config.drop_path_rate * done / max(1, total - 1)
                blocks.append(make_block(kind, options, dim, rate))
                dim, stride, done = options["c"], stride * options.get("s", 1), done + 1
            self.stages.append(nn.Sequential(*blocks))
            self.dims.append(dim)
            self.strides.append(stride)
        fused = sum(self.dims[index] for index in config.fused_stages)
        self.fusion = UniversalInvertedResidual(fused, config.fused_dim, expand_ratio=2, scaled=False)
        self.norm = RmsNorm2d(config.fused_dim)
        self.drop = nn.Dropout(config.drop_rate)
        self.apply(init_by_fan_out)
        self.head = self.make_head(config.num_classes)

    @property
    def feature_info(self) -> list[FeatureInfo]:
        return [FeatureInfo(self.dims[i], self.strides[i]) for i in self.config.out_indices]

    def forward_features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features h w"]:
        """Return the fused grid, (B, fused_dim, grid_size, grid_size) for images of any size."""
        levels = self._run_stages(x)
        chosen = [levels[index] for index in self.config.fused_stages]
        size = chosen[0].shape[2:]
        y = self.fusion(torch.cat([F.interpolate(one, size, mode="nearest") for one in chosen], dim=1))
        return self.norm(self._to_grid(y))

    def _to_grid(self, x: Tensor) -> Tensor:
        grid = self.config.grid_size
        height, width = x.shape[2:]
        if height % grid == 0 and width % grid == 0:
            return x if (height, width) == (grid, grid) else F.avg_pool2d(x, (height // grid, width // grid))
        if not torch.compiler.is_compiling():
            unit = grid * self.strides[self.config.fused_stages[0]]
            warnings.warn(
                f"images whose sides are not multiples of {unit} are resampled to {grid} x {grid}", stacklevel=2
            )
        return F.interpolate(x, (grid, grid), mode="bilinear", align_corners=False)

    def pool_features(self, features: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch features"]:
        return self.drop(super().pool_features(features))

    def forward_pyramid(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        """Return the outputs of the stages in `out_indices`, before the fusion."""
        levels = self._run_stages(x)
        return [levels[index] for index in self.config.out_indices]

    def _run_stages(self, x: Tensor) -> list[Tensor]:
        self.check_input(x)
        x = self.stem(x)
        return self.run_rows(self.stages, x)

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.config.fused_dim, num_classes, init_by_fan_out)


def expand(stage: tuple[str, ...]) -> list[tuple[str, dict[str, int]]]:
    """Return the kinds and options of a stage's blocks, with repeated blocks listed separately."""
    parsed = [parse_block(text) for text in stage]
    return [(kind, options) for kind, options in parsed for _ in range(options.get("r", 1))]


def make_block(kind: str, options: Mapping[str, int], in_dim: int, drop_path_rate: float) -> nn.Module:
    """Return a block for a map of `in_dim` channels."""
    dim, stride = options["c"], options.get("s", 1)
    if kind == "er":
        return EdgeResidual(in_dim, dim, stride, options.get("e", 4), options.get("k", 3))
    if kind == "uir":
        return UniversalInvertedResidual(
            in_dim,
            dim,
            stride,
            options.get("e", 4),
            start_kernel=options.get("a", 0),
            middle_kernel=options.get("k", 0),
            drop_path_rate=drop_path_rate,
        )
    if dim != in_dim or stride != 1:
        raise ValueError(f"attention keeps channels and size, not {in_dim} to {dim} channels at stride {stride}")
    return MultiQueryAttention(dim, options["h"], options["d"], options.get("v", 1), drop_path_rate)


def _unit(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (f"{theirs}.conv", f"{ours}.conv"), (f"{theirs}.bn", f"{ours}.norm")


_RULES: tuple[Rule, ...] = (
    *_unit("^conv_stem", "^stem"),
    ("^blocks", "^stages"),
    ("^msfa.ffn", "^fusion"),
    ("^msfa.norm", "^norm"),
    ("conv_exp", "spatial.conv"),
    ("bn1", "spatial.norm"),
    ("conv_pwl", "shrink.conv"),
    ("bn2", "shrink.norm"),
    *_unit("dw_start", "start"),
    *_unit("pw_exp", "expand"),
    *_unit("dw_mid", "middle"),
    *_unit("pw_proj", "project"),
    ("attn.query.proj", "query"),
    ("attn.key.down_conv", "key.down.conv"),
    ("attn.key.norm", "key.down.norm"),
    ("attn.key.proj", "key.proj"),
    ("attn.value.down_conv", "value.down.conv"),
    ("attn.value.norm", "value.down.norm"),
    ("attn.value.proj", "value.proj"),
    ("attn.output.proj", "output"),
    ("layer_scale.gamma", "gamma"),
)

_TOWER = "model.vision_tower.timm_model"


def layouts(config: MobileNetV5Config) -> list[KeyLayout]:
    """Return timm's layout, by itself and within Gemma 3n's checkpoints, whose other parts are dropped."""
    inside = tuple((f"^{_TOWER}.{name}", f"^{name}") for name in ("conv_stem", "blocks", "msfa"))
    return [
        KeyLayout("timm", _RULES),
        KeyLayout("gemma3n", (*inside, *_RULES), dropped=rf"(?!{re.escape(_TOWER)}\.|head\.).*"),
    ]


register(
    MobileNetV5,
    paper="autoneural",
    layouts=layouts,
    fresh_with_head=("head.",),
    variants={
        "mobilenetv5_300m_enc": Variant(
            MobileNetV5Config(),
            (3, 768, 768),
            Weights(
                "timm/mobilenetv5_300m.gemma3n",
                "Gemma terms of use",
                crop_pct=1.0,
                interpolation="bilinear",
                mean=(0.0, 0.0, 0.0),
                std=(1.0, 1.0, 1.0),
                num_classes=0,
            ),
        ),
    },
)
