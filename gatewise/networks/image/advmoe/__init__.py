"""AdvMoE: convolutional networks whose layers are routed to one of several experts, trained for adversarial robustness.

`routed` holds the routed layers and their router; `resnet`, `wrn`, `vgg` and `densenet` are the networks.
"""

from gatewise.networks.image.advmoe.densenet import DenseNetMoE, DenseNetMoEConfig, dense_layouts
from gatewise.networks.image.advmoe.keys import official_layout
from gatewise.networks.image.advmoe.resnet import ResNetMoE, ResNetMoEConfig, layouts
from gatewise.networks.image.advmoe.routed import AdvMoEConfig, ExpertConv2d, RoutedNetwork, Router
from gatewise.networks.image.advmoe.vgg import VGGMoE, VGGMoEConfig, vgg_layouts
from gatewise.networks.image.advmoe.wrn import WideResNetMoE, WideResNetMoEConfig, wide_layouts

__all__ = [
    "AdvMoEConfig",
    "DenseNetMoE",
    "DenseNetMoEConfig",
    "ExpertConv2d",
    "ResNetMoE",
    "ResNetMoEConfig",
    "RoutedNetwork",
    "Router",
    "VGGMoE",
    "VGGMoEConfig",
    "WideResNetMoE",
    "WideResNetMoEConfig",
    "dense_layouts",
    "layouts",
    "official_layout",
    "vgg_layouts",
    "wide_layouts",
]
