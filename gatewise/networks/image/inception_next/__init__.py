"""InceptionNeXt: a large depthwise kernel split into four cheap branches, and the networks of its ablation."""

from gatewise.networks.image.inception_next.ablation import PartialConvNeXt, PartialConvNeXtConfig, PartialDepthwise
from gatewise.networks.image.inception_next.network import (
    BRANCHES,
    InceptionDepthwise,
    InceptionNeXt,
    InceptionNeXtConfig,
    MetaNeXtBlock,
    depthwise,
)

__all__ = [
    "BRANCHES",
    "InceptionDepthwise",
    "InceptionNeXt",
    "InceptionNeXtConfig",
    "MetaNeXtBlock",
    "PartialConvNeXt",
    "PartialConvNeXtConfig",
    "PartialDepthwise",
    "depthwise",
]
