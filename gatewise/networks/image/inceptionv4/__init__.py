"""Inception-v4 and the Inception-ResNets."""

from gatewise.networks.image.inceptionv4.keys import C_RULES, COMMON, layouts
from gatewise.networks.image.inceptionv4.network import (
    ARCHITECTURES,
    Builder,
    Inception,
    InceptionConfig,
    ResidualBranches,
)

__all__ = [
    "ARCHITECTURES",
    "COMMON",
    "C_RULES",
    "Builder",
    "Inception",
    "InceptionConfig",
    "ResidualBranches",
    "layouts",
]
