"""Four-stage skeleton of networks that keep (B, C, H, W) maps throughout."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from gatewise.networks.image._base import FeatureInfo, ImageNetwork


class Stage(nn.Module):
    """Downsampling (none in the first stage), then blocks at one resolution."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)


class StagedNetwork(ImageNetwork):
    """Stem, stages and an optional norm per level of the pyramid.

    A network builds `stem`, `stages` and `level_norms`, and its configuration has `embed_dims`, `patch_size` and
    `out_indices`.
    """

    stem: nn.Module
    stages: nn.ModuleList
    level_norms: nn.ModuleDict

    @property
    def feature_info(self) -> list[FeatureInfo]:
        config = self.config
        return [FeatureInfo(config.embed_dims[i], config.patch_size * 2**i) for i in config.out_indices]

    def forward_features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features h w"]:
        """Return the last stage's map. Rows and columns beyond a multiple of the stride are dropped."""
        return self._run_stages(x)[-1]

    def forward_pyramid(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        """Return the residual streams of the stages in `out_indices`, normalized as `pyramid_norm` requires."""
        levels = self._run_stages(x)
        norms = self.level_norms
        return [norms[str(i)](levels[i]) if str(i) in norms else levels[i] for i in self.config.out_indices]

    def _run_stages(self, x: Tensor) -> list[Tensor]:
        self.check_input(x)
        x = self.stem(x)
        levels = []
        for stage in self.stages:
            x = stage.downsample(x)
            x = self.run_blocks(stage.blocks.children(), x)
            levels.append(x)
        return levels
