"""ViG-H: the blocks of ViG in four stages, each at half the resolution and twice the width of the one before.

There is no position embedding: the convolutions before every memory and between the stages provide position.

Paper: Liao et al. 2024, arXiv:2405.18425; see `plain.py`. Details follow the published code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout, Rule
from gatewise.catalog.registry import Variant, register
from gatewise.layers.drop_path import drop_path_rates
from gatewise.layers.init_weights import init_linear
from gatewise.layers.linear_head import linear_head
from gatewise.layers.norm import LayerNorm2d
from gatewise.networks.image.skeletons.staged import Stage, StagedNetwork
from gatewise.networks.image.vig.blocks import (
    MIXER_RULES,
    GatedLinearMixer,
    GatedMlp,
    VigBlock,
    VigOptions,
    hidden_dim,
    start_mixer,
)
from gatewise.networks.image.vig.plain import published

NORM_EPS = 1e-5
MLP_MULTIPLE = 32


@dataclass(frozen=True)
class VigHConfig(VigOptions):
    """Sizes and options of a hierarchical ViG. `depths`, `embed_dims` and `num_heads` have one entry per stage.

    Args:
        patch_size: stride of the stem, which has two convolutions of stride 2.
        mlp_ratio: hidden ratio of the plain MLP that the gated one replaces; see `hidden_dim`.
        out_indices: stages that `forward_pyramid` returns.
        pyramid_norm: whether returned stages have norms instead of a final norm and head (the dense-prediction form).
    """

    depths: tuple[int, ...] = (2, 2, 5, 2)
    embed_dims: tuple[int, ...] = (96, 192, 384, 768)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    patch_size: int = 4
    mlp_ratio: float = 4.0
    out_indices: tuple[int, ...] = (0, 1, 2, 3)
    pyramid_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = len(self.depths)
        for name in ("embed_dims", "num_heads"):
            if len(getattr(self, name)) != stages:
                raise ValueError(f"{name} must have one entry per stage ({stages}), not {getattr(self, name)}")
        if stages < 1 or min(self.depths) < 1:
            raise ValueError(f"every stage needs a block, depths cannot be {self.depths}")
        for dim, heads in zip(self.embed_dims, self.num_heads, strict=True):
            self.check_width(dim, heads)
        if self.embed_dims[0] % 2:
            raise ValueError(f"the first width must be even, as the stem halves it, not {self.embed_dims[0]}")
        if self.patch_size != 4:
            raise ValueError(f"patch_size must be 4, as the stem halves the resolution twice, not {self.patch_size}")
        if not self.out_indices or not set(self.out_indices) <= set(range(stages)):
            raise ValueError(f"out_indices must be stages 0..{stages - 1}, not {self.out_indices}")
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio must be positive, not {self.mlp_ratio}")

    def stem(self) -> nn.Sequential:
        """Return the stem, from images to maps at a quarter of the resolution."""
        dim = self.embed_dims[0]
        return nn.Sequential(
            nn.Conv2d(self.in_chans, dim // 2, 3, 2, padding=1),
            LayerNorm2d(dim // 2, eps=NORM_EPS),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, 2, padding=1),
            LayerNorm2d(dim, eps=NORM_EPS),
        )

    def stage(self, index: int, rates: list[float]) -> Stage:
        """Return a stage: downsampling (except in the first), and blocks with these stochastic depth rates."""
        dim = self.embed_dims[index]
        downsample: nn.Module = nn.Identity()
        if index:
            conv = nn.Conv2d(self.embed_dims[index - 1], dim, 3, 2, padding=1)
            downsample = nn.Sequential(conv, LayerNorm2d(dim, eps=NORM_EPS))
        return Stage(downsample, [self._block(dim, self.num_heads[index], rate) for rate in rates])

    def _block(self, dim: int, num_heads: int, drop_path_rate: float) -> VigBlock:
        return VigBlock(
            GatedLinearMixer(dim, num_heads, self),
            GatedMlp(dim, hidden_dim(dim, self.mlp_ratio, MLP_MULTIPLE)),
            partial(nn.LayerNorm, eps=NORM_EPS),
            drop_path_rate=drop_path_rate,
            layer_scale_init=self.layer_scale_init,
        )


class VigH(StagedNetwork):
    """Stem, four stages, norm, mean over positions, linear classifier."""

    min_size = 32

    def __init__(self, config: VigHConfig) -> None:
        super().__init__(config)
        self.stem = config.stem()
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        self.stages = nn.ModuleList(config.stage(index, own) for index, own in enumerate(rates))
        normed = config.out_indices if config.pyramid_norm else ()
        self.level_norms = nn.ModuleDict({str(i): LayerNorm2d(config.embed_dims[i], eps=NORM_EPS) for i in normed})
        self.norm = nn.Identity() if config.pyramid_norm else LayerNorm2d(config.embed_dims[-1], eps=NORM_EPS)
        for module in self.modules():
            if isinstance(module, GatedLinearMixer):
                start_mixer(module.local)
            init_linear(module)
        self.head = self.make_head(config.num_classes)

    def pool_features(self, features: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch features"]:
        return self.norm(features).mean(dim=(2, 3))

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.config.embed_dims[-1], num_classes, init_linear)

    def _run_stages(self, x: Tensor) -> list[Tensor]:
        self.check_input(x)
        x = self.stem(x)
        levels = []
        for stage in self.stages:
            # Blocks have channels last, which is how the preceding norm leaves maps in memory.
            x = stage.downsample(x).permute(0, 2, 3, 1)
            x = self.run_blocks(stage.blocks.children(), x)
            x = x.permute(0, 3, 1, 2)
            levels.append(x)
        return levels


_STEM_RULES: tuple[Rule, ...] = (
    ("^patch_embed.0", "stem.0"),
    ("^patch_embed.2", "stem.1"),
    ("^patch_embed.5", "stem.3"),
    ("^patch_embed.7", "stem.4"),
)

_RULES: tuple[Rule, ...] = (
    ("^classifier.norm", "^norm"),
    ("^classifier.head", "^head"),
    ("^outnorm{i}", "level_norms.{i}"),
    ("^layers.{i}", "stages.{i}"),
    ("stages.{i}.downsample.1", "stages.{i+1}.downsample.0"),
    ("stages.{i}.downsample.3", "stages.{i+1}.downsample.1"),
    ("blocks.{b}.norm", "blocks.{b}.norm1"),
    ("op", "mixer"),
    *MIXER_RULES,
)

_OLD_RULES: tuple[Rule, ...] = (
    ("^patch_embed.proj", "patch_embed.0"),
    ("^patch_embed.norm", "patch_embed.2"),
    ("^norm", "classifier.norm"),
    ("^head", "classifier.head"),
    ("blocks.{b}.ln_1", "blocks.{b}.norm"),
    ("self_attention", "op"),
)


def layouts(config: VigHConfig) -> list[KeyLayout]:
    """Return the official layout and that of older checkpoints, which the published code also reads."""
    rules = (*_STEM_RULES, *_RULES)
    return [KeyLayout("official", rules), KeyLayout("official, old names", (*_OLD_RULES, *rules))]


DEEP = (2, 2, 17, 2)

register(
    VigH,
    paper="vig",
    layouts=layouts,
    # A classifier's checkpoint fills all of a dense-prediction network except its level norms, and vice versa.
    fresh_with_head=("head.", "norm.", "level_norms."),
    variants={
        "vig_h_tiny": Variant(VigHConfig(), weights=published("vig_h_tiny", "82.8")),
        "vig_h_small": Variant(VigHConfig(depths=DEEP), weights=published("vig_h_small", "83.8")),
        "vig_h_base": Variant(
            VigHConfig(depths=DEEP, embed_dims=(128, 256, 512, 1024), num_heads=(4, 8, 16, 32)),
            weights=published("vig_h_base", "84.2"),
        ),
    },
)
