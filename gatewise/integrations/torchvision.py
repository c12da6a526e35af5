"""torchvision's detectors: use a network with a feature pyramid network on top as their backbone.

backbone = detection_backbone(gatewise.create_model("focalnet_tiny_srf", num_classes=0))
detector = torchvision.models.detection.FasterRCNN(backbone, num_classes=91)
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from gatewise.networks.image._base import ImageNetwork


class DetectionBackbone(nn.Module):
    """The backbone interface of torchvision's detectors: images to named levels of equal width, and one coarser level.

    Args:
        out_channels: width of every level.
    """

    def __init__(self, network: ImageNetwork, out_channels: int = 256) -> None:
        super().__init__()
        self.network = network
        self.out_channels = out_channels
        widths = [level.channels for level in network.feature_info]
        self.fpn = FeaturePyramidNetwork(widths, out_channels, LastLevelMaxPool())

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> dict[str, Tensor]:
        levels = self.network.forward_pyramid(x)
        return self.fpn({str(index): level for index, level in enumerate(levels)})


def detection_backbone(network: ImageNetwork, out_channels: int = 256) -> DetectionBackbone:
    """Return `network` as a backbone for torchvision's `FasterRCNN`, `MaskRCNN`, `RetinaNet` or `FCOS`."""
    return DetectionBackbone(network, out_channels)
