"""MOAT: inverted residuals and attention in one block."""

from gatewise.networks.image.moat.blocks import LAYER_NORM_EPS, MBConv, MoatBlock, RelativeAttention, Shortcut, Stem
from gatewise.networks.image.moat.keys import layouts
from gatewise.networks.image.moat.network import Moat, MoatConfig

__all__ = [
    "LAYER_NORM_EPS",
    "MBConv",
    "Moat",
    "MoatBlock",
    "MoatConfig",
    "RelativeAttention",
    "Shortcut",
    "Stem",
    "layouts",
]
