"""UniRepLKNet: large re-parameterized kernels, for images and for other inputs arranged as images."""

from gatewise.networks.image.unireplknet.inputs import (
    frames_to_image_by_memory,
    frames_to_mosaic,
    series_to_image,
    spectrogram_to_image,
)
from gatewise.networks.image.unireplknet.network import (
    BRANCHES,
    OFFICIAL,
    SCHEDULES,
    Downsample,
    Kernels,
    UniRepLKNet,
    UniRepLKNetBlock,
    UniRepLKNetConfig,
)

__all__ = [
    "BRANCHES",
    "OFFICIAL",
    "SCHEDULES",
    "Downsample",
    "Kernels",
    "UniRepLKNet",
    "UniRepLKNetBlock",
    "UniRepLKNetConfig",
    "frames_to_image_by_memory",
    "frames_to_mosaic",
    "series_to_image",
    "spectrogram_to_image",
]
