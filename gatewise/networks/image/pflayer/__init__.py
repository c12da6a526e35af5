"""Parameter-free layers: max pooling in place of depthwise convolutions and of attention."""

from gatewise.networks.image.pflayer.keys import pit_layouts, vit_layouts
from gatewise.networks.image.pflayer.resnet import (
    SPATIAL,
    Bottleneck,
    PfResNet,
    PfResNetConfig,
    SpatialMaxPool,
    layouts,
)
from gatewise.networks.image.pflayer.transformers import (
    PfPiT,
    PfPiTConfig,
    PfViT,
    PfViTConfig,
    PoolMixer,
    SelfAttention,
    resize_positions,
)

__all__ = [
    "SPATIAL",
    "Bottleneck",
    "PfPiT",
    "PfPiTConfig",
    "PfResNet",
    "PfResNetConfig",
    "PfViT",
    "PfViTConfig",
    "PoolMixer",
    "SelfAttention",
    "SpatialMaxPool",
    "layouts",
    "pit_layouts",
    "resize_positions",
    "vit_layouts",
]
