"""OverLoCK: an overview network guides a focus network through context-mixing dynamic convolution."""

from gatewise.networks.image.overlock.blocks import BRANCHES, Affine, ContextMixingBlock, FocusBlock, RepConvBlock
from gatewise.networks.image.overlock.keys import LARGE, MIXING, OFFICIAL
from gatewise.networks.image.overlock.network import AUXILIARY_WEIGHT, OverLoCK, OverLoCKConfig

__all__ = [
    "AUXILIARY_WEIGHT",
    "BRANCHES",
    "LARGE",
    "MIXING",
    "OFFICIAL",
    "Affine",
    "ContextMixingBlock",
    "FocusBlock",
    "OverLoCK",
    "OverLoCKConfig",
    "RepConvBlock",
]
