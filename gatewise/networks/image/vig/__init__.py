"""ViG: vision transformers with two-dimensional gated linear attention.

`plain` keeps one resolution, `hierarchical` has four stages, and `deit` is the baseline transformer.
"""

from gatewise.networks.image.vig.blocks import GatedLinearMixer, Map, VigOptions, hidden_dim, log_decays
from gatewise.networks.image.vig.deit import Deit, DeitConfig
from gatewise.networks.image.vig.hierarchical import VigH, VigHConfig
from gatewise.networks.image.vig.plain import Vig, VigConfig

__all__ = [
    "Deit",
    "DeitConfig",
    "GatedLinearMixer",
    "Map",
    "Vig",
    "VigConfig",
    "VigH",
    "VigHConfig",
    "VigOptions",
    "hidden_dim",
    "log_decays",
]
