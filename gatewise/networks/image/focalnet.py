"""FocalNet: focal modulation in place of self-attention.

Each position is multiplied by a modulator gathered from its surroundings. A cascade of depthwise convolutions sees ever
wider contexts, a last level sees the whole map, and per-position gates mix the levels. As in attention, content decides
what is gathered, but the cost grows only linearly with the number of pixels.

Paper: Yang et al., "Focal Modulation Networks", 2022, arXiv:2203.11926. Where code and paper differ, we follow the
published code: query, context and gates come from one linear layer, and the gates are linear (no softmax, no sigmoid).
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout, Rule, as_pointwise
from gatewise.catalog.registry import Variant, Weights, register
from gatewise.layers.depthwise_conv import DepthwiseConv2d
from gatewise.layers.drop_path import DropPath, drop_path_rates
from gatewise.layers.fold_norm import scale_outputs
from gatewise.layers.init_weights import init_linear
from gatewise.layers.linear_head import linear_head
from gatewise.layers.mlp import Mlp
from gatewise.networks.image._base import FeatureInfo, ImageConfig, ImageNetwork


@dataclass(frozen=True)
class FocalNetConfig(ImageConfig):
    """Sizes and options of a FocalNet. `depths`, `focal_levels` and `focal_windows` have one entry per stage.

    Args:
        patch_size: kernel size and stride of the stem.
        focal_levels: number of depthwise convolutions per modulation; with 0, only the global context remains.
        focal_windows: kernel size of the first level; each further level adds `focal_factor`.
        layer_scale_init: initial scale of the residual branches; None disables layer scale.
        use_conv_embed: whether to use an overlapping 7x7 stem and 3x3 downsampling.
        stem_padding: padding of the overlapping stem. The classification and DINO weights use 2, the Mask R-CNN and
            UPerNet weights 3. Both give the same output sizes, shifted by a pixel.
        use_postln: whether to normalize the output of each branch instead of its input.
        use_postln_in_modulation: whether to normalize the modulated query.
        normalize_modulator: whether to divide the gathered context by the number of levels.
        out_indices: stages that `forward_pyramid` returns.
        pyramid_norm: whether returned stages have norms instead of a final norm and head (the dense-prediction form).
    """

    patch_size: int = 4
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    focal_levels: tuple[int, ...] = (2, 2, 2, 2)
    focal_windows: tuple[int, ...] = (3, 3, 3, 3)
    focal_factor: int = 2
    mlp_ratio: float = 4.0
    patch_norm: bool = True
    layer_scale_init: float | None = None
    use_conv_embed: bool = False
    stem_padding: int = 2
    use_postln: bool = False
    use_postln_in_modulation: bool = False
    normalize_modulator: bool = False
    out_indices: tuple[int, ...] | None = None
    pyramid_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = len(self.depths)
        for name in ("focal_levels", "focal_windows"):
            if len(getattr(self, name)) != stages:
                raise ValueError(f"{name} must have one entry per stage ({stages}), not {getattr(self, name)}")
        for window, levels in zip(self.focal_windows, self.focal_levels, strict=True):
            _check_windows(window, levels, self.focal_factor)
        if self.use_conv_embed and self.patch_size != 4:
            raise ValueError(f"use_conv_embed has stride 4 and needs patch_size=4, not {self.patch_size}")
        if self.out_indices is not None and not set(self.out_indices) <= set(range(stages)):
            raise ValueError(f"out_indices must be stages 0..{stages - 1}, not {self.out_indices}")
        if self.pyramid_norm and self.num_classes:
            raise ValueError("the dense-prediction form (pyramid_norm) has no classifier: pass num_classes=0 with it")

    @property
    def levels(self) -> tuple[int, ...]:
        """Indices of the stages that the pyramid returns."""
        return self.out_indices if self.out_indices is not None else tuple(range(len(self.depths)))


def _check_windows(window: int, levels: int, factor: int) -> None:
    if levels < 0:
        raise ValueError(f"focal_levels must be 0 or more, not {levels}")
    for level in range(levels):
        kernel = window + factor * level
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"focal windows must be odd and positive, not {kernel} (window {window}, level {level})")


class FocalModulation(nn.Module):
    """Query times modulator: (B, H, W, C) -> (B, H, W, C).

    project_in(x) is split into query q, context z_0 and gates g (one map per level and one for the global level). Then

        z_l = gelu(depthwise_l(z_{l-1})),  z_global = gelu(mean over positions of z_L)
        y   = project_out(q * mix_context(sum_l g_l z_l + g_global z_global))
    """

    def __init__(
        self,
        dim: int,
        focal_level: int,
        focal_window: int,
        focal_factor: int = 2,
        drop_rate: float = 0.0,
        use_postln: bool = False,
        normalize_modulator: bool = False,
    ) -> None:
        super().__init__()
        _check_windows(focal_window, focal_level, focal_factor)
        self.dim = dim
        self.divisor = focal_level + 1 if normalize_modulator else 1
        self.project_in = nn.Linear(dim, 2 * dim + focal_level + 1)
        self.levels = nn.ModuleList(
            DepthwiseConv2d(dim, kernel, bias=False)
            for kernel in (focal_window + focal_factor * level for level in range(focal_level))
        )
        self.mix_context = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim) if use_postln else None
        self.project_out = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Float[Tensor, "batch height width channels"]) -> Float[Tensor, "batch height width channels"]:
        query, context, gates = self._project(x)
        y = query * self._modulator(context, gates)
        if self.norm is not None:
            y = self.norm(y)
        return self.drop(self.project_out(y))

    def read_gates(self, x: Float[Tensor, "batch height width channels"]) -> dict[str, Tensor]:
        """Return the gate values for this input: one (B, H, W) map per level, and the norm of the modulator."""
        _, context, gates = self._project(x)
        maps = {f"level {level}": gates[..., level] for level in range(len(self.levels))}
        return maps | {"global": gates[..., -1], "modulator": self._modulator(context, gates).norm(dim=-1)}

    def merged(self) -> FocalModulation:
        """Return the same modulation with the division by the number of levels folded into `mix_context`."""
        new = deepcopy(self)
        with torch.no_grad():
            new.mix_context.weight.div_(self.divisor)
        new.divisor = 1
        return new

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.project_in(x).split([self.dim, self.dim, len(self.levels) + 1], dim=-1)

    def _modulator(self, context: Tensor, gates: Tensor) -> Tensor:
        # Channels stay last in memory: convolutions see a channels-last view, linear layers the same storage.
        z = context.permute(0, 3, 1, 2)
        gathered = None
        for level, depthwise in enumerate(self.levels):
            z = F.gelu(depthwise(z))
            gated = z.permute(0, 2, 3, 1) * gates[..., level : level + 1]
            gathered = gated if gathered is None else gathered + gated
        everything = F.gelu(_mean_over_positions(z)) * gates[..., -1:]
        gathered = everything if gathered is None else gathered + everything
        return self.mix_context(gathered / self.divisor if self.divisor != 1 else gathered)


def _mean_over_positions(z: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, 1, C), accumulated at least in float32 because half precision overflows on large maps."""
    wide = torch.float32 if z.dtype in (torch.float16, torch.bfloat16) else z.dtype
    return z.mean(dim=(2, 3), dtype=wide).to(z.dtype)[:, None, None, :]


class FocalBlock(nn.Module):
    """Focal modulation and an MLP, each in a residual branch: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, config: FocalNetConfig, stage: int, drop_path_rate: float) -> None:
        super().__init__()
        dim = config.embed_dim * 2**stage
        self.use_postln = config.use_postln
        self.norm1 = nn.LayerNorm(dim)
        self.modulation = FocalModulation(
            dim,
            config.focal_levels[stage],
            config.focal_windows[stage],
            config.focal_factor,
            config.drop_rate,
            config.use_postln_in_modulation,
            config.normalize_modulator,
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), config.drop_rate)
        self.drop_path = DropPath(drop_path_rate)
        self.scale1 = self.scale2 = None
        if config.layer_scale_init is not None:
            self.scale1 = nn.Parameter(torch.full((dim,), config.layer_scale_init))
            self.scale2 = nn.Parameter(torch.full((dim,), config.layer_scale_init))

    def forward(self, x: Float[Tensor, "batch height width channels"]) -> Float[Tensor, "batch height width channels"]:
        x = x + self.drop_path(_scaled(self._branch(self.norm1, self.modulation, x), self.scale1))
        return x + self.drop_path(_scaled(self._branch(self.norm2, self.mlp, x), self.scale2))

    def _branch(self, norm: nn.Module, inner: nn.Module, x: Tensor) -> Tensor:
        return norm(inner(x)) if self.use_postln else inner(norm(x))

    def merged(self) -> FocalBlock:
        """Return the same block with each layer scale folded into the last layer of its branch."""
        new = deepcopy(self)
        new.modulation = self.modulation.merged()
        if self.scale1 is not None and self.scale2 is not None:
            last1 = new.norm1 if self.use_postln else new.modulation.project_out
            last2 = new.norm2 if self.use_postln else new.mlp.fc2
            scale_outputs(last1, self.scale1)
            scale_outputs(last2, self.scale2)
            new.scale1 = new.scale2 = None
        return new


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


class PatchEmbed(nn.Module):
    """Strided convolution and layer norm: (B, C, H, W) -> (B, H', W', C'). Used as stem and for downsampling."""

    def __init__(self, in_dim: int, dim: int, kernel_size: int, stride: int, padding: int, norm: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, kernel_size, stride, padding)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()
        self.stride = stride

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch h w dim"]:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))

    def pad(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch in_dim h w"]:
        """Return `x` zero-padded at the right and bottom to a multiple of the stride."""
        bottom, right = -x.shape[2] % self.stride, -x.shape[3] % self.stride
        return F.pad(x, (0, right, 0, bottom)) if bottom or right else x


class FocalStage(nn.Module):
    """Blocks at one resolution, followed by downsampling (None in the last stage)."""

    def __init__(self, config: FocalNetConfig, stage: int, drop_path_rates: list[float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FocalBlock(config, stage, rate) for rate in drop_path_rates)
        self.downsample = None
        if stage < len(config.depths) - 1:
            dim = config.embed_dim * 2**stage
            kernel, padding = (3, 1) if config.use_conv_embed else (2, 0)
            self.downsample = PatchEmbed(dim, 2 * dim, kernel, 2, padding, config.patch_norm)


class FocalNet(ImageNetwork):
    """Four stages of focal blocks (one in the isotropic form), global pooling, linear classifier."""

    def __init__(self, config: FocalNetConfig) -> None:
        super().__init__(config)
        kernel, padding = (7, config.stem_padding) if config.use_conv_embed else (config.patch_size, 0)
        self.stem = PatchEmbed(config.in_chans, config.embed_dim, kernel, config.patch_size, padding, config.patch_norm)
        self.drop = nn.Dropout(config.drop_rate)
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        self.stages = nn.ModuleList(FocalStage(config, stage, rates[stage]) for stage in range(len(config.depths)))
        width = config.embed_dim * 2 ** (len(config.depths) - 1)
        normed_levels = config.levels if config.pyramid_norm else ()
        self.level_norms = nn.ModuleDict({str(i): nn.LayerNorm(config.embed_dim * 2**i) for i in normed_levels})
        self.norm = nn.Identity() if config.pyramid_norm else nn.LayerNorm(width)
        self.head = self.make_head(config.num_classes)
        self.min_size = config.patch_size * 2 ** len(self.stages[:-1])
        self.apply(init_linear)

    @property
    def feature_info(self) -> list[FeatureInfo]:
        return [FeatureInfo(self.config.embed_dim * 2**i, self.config.patch_size * 2**i) for i in self.config.levels]

    def forward_features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features h w"]:
        """Return the normalized map of the last stage. Rows and columns beyond a multiple of the stride are dropped."""
        self.check_input(x)
        x = self.drop(self.stem(x))
        for stage in self.stages:
            x = self.run_blocks(stage.blocks.children(), x)
            if stage.downsample is not None:
                x = stage.downsample(x.permute(0, 3, 1, 2))
        return self.norm(x).permute(0, 3, 1, 2)

    def forward_pyramid(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        """Return the maps of the stages in `out_indices`. Any size works: zeros pad it to a multiple of the stride."""
        self.check_input(x, min_size=1)
        x = self.drop(self.stem(self.stem.pad(x)))
        levels = []
        for index, stage in enumerate(self.stages):
            x = self.run_blocks(stage.blocks.children(), x)
            if index in self.config.levels:
                level = self.level_norms[str(index)](x) if self.config.pyramid_norm else x
                levels.append(level.permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x = stage.downsample(stage.downsample.pad(x.permute(0, 3, 1, 2)))
        return levels

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.config.embed_dim * 2 ** (len(self.config.depths) - 1), num_classes, init_linear)

    def freeze_stages(self, frozen_stages: int) -> None:
        """Freeze the stem (0 or more) and the first n - 1 stages (n >= 2), counted as in the published detectors."""
        modules = [self.stem, self.drop] if frozen_stages >= 0 else []
        self.freeze([*modules, *self.stages[: max(0, frozen_stages - 1)]])

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a checkpoint's tensors, already under our names, adapted to this network's windows and levels.

        Kernels are zero-padded or cropped around their center. New levels start with closed gates, and the global gate
        stays last. The published detectors transfer weights in this way.

        Raises:
            ValueError: if the checkpoint has more levels than this network.
        """
        wanted = self.state_dict()
        adapted = dict(state)
        for key, tensor in state.items():
            if key not in wanted or tensor.shape == wanted[key].shape:
                continue
            if ".modulation.levels." in key:
                adapted[key] = _resize_kernel(tensor, wanted[key].shape[-1])
            elif ".modulation.project_in." in key:
                adapted[key] = _add_gates(tensor, wanted[key].shape[0], key)
        for key, parameter in wanted.items():
            if ".modulation.levels." in key and key not in state:
                adapted[key] = parameter
        return adapted


def _resize_kernel(kernel: Tensor, size: int) -> Tensor:
    margin = (size - kernel.shape[-1]) // 2
    return F.pad(kernel, (margin, margin, margin, margin))


def _add_gates(projection: Tensor, rows: int, key: str) -> Tensor:
    new = rows - projection.shape[0]
    if new < 0:
        raise ValueError(f"the checkpoint has {-new} more focal levels than the network ({key}): use as many levels")
    closed = projection.new_zeros((new, *projection.shape[1:]))
    return torch.cat([projection[:-1], closed, projection[-1:]])


_BLOCK_RULES: tuple[Rule, ...] = (
    ("modulation.f", "modulation.project_in"),
    ("modulation.h", "modulation.mix_context"),
    ("modulation.focal_layers.{l}.0", "modulation.levels.{l}"),
    ("modulation.proj", "modulation.project_out"),
)


OFFICIAL = KeyLayout(
    "official",
    (
        ("^patch_embed", "stem"),
        ("^norm{i}", "level_norms.{i}"),
        ("layers.{i}", "stages.{i}"),
        *_BLOCK_RULES,
        ("modulation.ln", "modulation.norm"),
        ("gamma_{k}", "scale{k}"),
    ),
    tensor_to_theirs=as_pointwise(r".*\.modulation\.h\.weight"),
)


def timm_layout(use_postln: bool) -> KeyLayout:
    """Return the layout of timm's names, with norms after the branches or before them."""
    post = (("norm1_post", "norm1"), ("norm2_post", "norm2")) if use_postln else ()
    return KeyLayout(
        "timm",
        (
            ("layers.{i}", "stages.{i}"),
            ("stages.{i+1}.downsample", "stages.{i}.downsample"),
            ("^head.fc", "head"),
            *_BLOCK_RULES,
            ("ls{k}.gamma", "scale{k}"),
            *post,
        ),
        tensor_to_theirs=as_pointwise(r".*\.(modulation\.(f|h|proj)|mlp\.fc[12])\.weight"),
    )


def layouts(config: FocalNetConfig) -> list[KeyLayout]:
    """Return the official layout (for both classification and dense prediction) and timm's."""
    return [OFFICIAL, timm_layout(config.use_postln)]


def _srf(source: str, score: str, **fields: Any) -> Variant:
    return Variant(FocalNetConfig(**fields), weights=_in1k(source, score))


def _lrf(source: str, score: str, **fields: Any) -> Variant:
    return Variant(FocalNetConfig(focal_levels=(3, 3, 3, 3), **fields), weights=_in1k(source, score))


def _in1k(source: str, score: str) -> Weights:
    return Weights(f"timm/{source}.ms_in1k", "MIT", f"{score} % top-1, ImageNet-1K at 224 (model zoo)", crop_pct=0.9)


def _in22k(source: str, levels: int, window: int, crop_pct: float = 1.0, **fields: Any) -> Variant:
    config = FocalNetConfig(
        depths=(2, 2, 18, 2),
        focal_levels=(levels,) * 4,
        focal_windows=(window,) * 4,
        layer_scale_init=1e-4,
        use_conv_embed=True,
        use_postln=True,
        **fields,
    )
    weights = Weights(f"timm/{source}.ms_in22k", "MIT", "pre-trained on ImageNet-22K", crop_pct, num_classes=21842)
    return Variant(config, weights=weights)


def _iso(embed_dim: int, **fields: Any) -> Variant:
    shape: dict[str, Any] = {"patch_size": 16, "depths": (12,), "focal_levels": (3,), "focal_windows": (3,)}
    return Variant(FocalNetConfig(embed_dim=embed_dim, **shape, **fields))


DEEP = (2, 2, 18, 2)

register(
    FocalNet,
    paper="focalnet",
    layouts=layouts,
    # A classification checkpoint fills all of a dense-prediction network except its level norms, and vice versa.
    fresh_with_head=("head.", "norm.", "level_norms."),
    variants={
        "focalnet_tiny_srf": _srf("focalnet_tiny_srf", "82.1"),
        "focalnet_tiny_lrf": _lrf("focalnet_tiny_lrf", "82.3"),
        "focalnet_small_srf": _srf("focalnet_small_srf", "83.4", depths=DEEP),
        "focalnet_small_lrf": _lrf("focalnet_small_lrf", "83.5", depths=DEEP),
        "focalnet_base_srf": _srf("focalnet_base_srf", "83.7", depths=DEEP, embed_dim=128),
        "focalnet_base_lrf": _lrf("focalnet_base_lrf", "83.9", depths=DEEP, embed_dim=128),
        "focalnet_tiny_iso": _iso(192),
        "focalnet_small_iso": _iso(384),
        # The factory of the published code sets both options and its configuration file neither. The parameter count in
        # the paper fits both.
        "focalnet_base_iso": _iso(768, layer_scale_init=1e-4, use_postln=True),
        "focalnet_base_iso_preln": _iso(768),
        "focalnet_large_fl3": _in22k("focalnet_large_fl3", 3, 5, embed_dim=192),
        "focalnet_large_fl4": _in22k("focalnet_large_fl4", 4, 3, embed_dim=192, normalize_modulator=True),
        "focalnet_xlarge_fl3": _in22k("focalnet_xlarge_fl3", 3, 5, embed_dim=256),
        "focalnet_xlarge_fl4": _in22k("focalnet_xlarge_fl4", 4, 3, embed_dim=256),
        "focalnet_huge_fl3": _in22k("focalnet_huge_fl3", 3, 3, 0.9, embed_dim=352, use_postln_in_modulation=True),
        "focalnet_huge_fl4": _in22k("focalnet_huge_fl4", 4, 3, 0.9, embed_dim=352, use_postln_in_modulation=True),
    },
)
