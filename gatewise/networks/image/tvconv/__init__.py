"""TVConv: convolutions whose kernels depend on the position, in networks for aligned faces.

The segmentation network of the paper is `gatewise.networks.dense.tvconv_deeplab`.
"""

from gatewise.networks.image.tvconv.faces import (
    CosineClassifier,
    ShuffleUnit,
    TVConvMobileNetV2,
    TVConvMobileNetV2Config,
    TVConvShuffleNetV2,
    TVConvShuffleNetV2Config,
    mobilenet_layouts,
    shufflenet_layouts,
)
from gatewise.networks.image.tvconv.keys import (
    block_rules,
    layout,
    operator_rules,
    unit_rules,
)

__all__ = [
    "CosineClassifier",
    "ShuffleUnit",
    "TVConvMobileNetV2",
    "TVConvMobileNetV2Config",
    "TVConvShuffleNetV2",
    "TVConvShuffleNetV2Config",
    "block_rules",
    "layout",
    "mobilenet_layouts",
    "operator_rules",
    "shufflenet_layouts",
    "unit_rules",
]
