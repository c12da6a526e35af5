"""Gated SwinRMT: windows and axes of attention with a spatial decay, and an output gate."""

from gatewise.networks.image.gated_swinrmt.blocks import Block, Mixer, rotate_pairs, window_rotation
from gatewise.networks.image.gated_swinrmt.keys import FORMS, layouts
from gatewise.networks.image.gated_swinrmt.network import GatedSwinRMT, GatedSwinRMTConfig

__all__ = [
    "FORMS",
    "Block",
    "GatedSwinRMT",
    "GatedSwinRMTConfig",
    "Mixer",
    "layouts",
    "rotate_pairs",
    "window_rotation",
]
