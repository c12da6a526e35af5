"""EvoNorm: networks that combine norm and activation in one layer.

`resnet`, `mobile` (MobileNetV2, EfficientNet, RegNetZ) and `vovnet` have published weights.
"""

from gatewise.networks.image.evonorm.mobile import EvoNormMobile, EvoNormMobileConfig, regnet
from gatewise.networks.image.evonorm.resnet import EvoNormResNet, EvoNormResNetConfig, Pool
from gatewise.networks.image.evonorm.vovnet import EvoNormVoVNet, EvoNormVoVNetConfig

__all__ = [
    "EvoNormMobile",
    "EvoNormMobileConfig",
    "EvoNormResNet",
    "EvoNormResNetConfig",
    "EvoNormVoVNet",
    "EvoNormVoVNetConfig",
    "Pool",
    "regnet",
]
