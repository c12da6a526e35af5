"""A pyramid plugs into torchvision's detectors and trains there."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from gatewise.integrations.torchvision import detection_backbone
from tests.conftest import SMALL, declared, small_model


def detector(name: str, kind: type):
    backbone = detection_backbone(small_model(name, num_classes=0), out_channels=16)
    anchors = AnchorGenerator(((16,), (32,), (64,), (96,), (128,)), ((0.5, 1.0, 2.0),) * 5)
    anchor_argument = {"rpn_anchor_generator" if kind is FasterRCNN else "anchor_generator": anchors}
    return kind(backbone, num_classes=3, min_size=96, max_size=128, **anchor_argument)


# Those whose five levels, the pooled one included, the anchors above fit.
@pytest.mark.parametrize("name", [name for name in SMALL if name not in declared("image", "STRIDES")])
@pytest.mark.parametrize("kind", [FasterRCNN, RetinaNet])
def test_detectors_run_and_train(name, kind):
    model = detector(name, kind)
    images = [torch.rand(3, 90, 120), torch.rand(3, 100, 80)]
    targets = [{"boxes": torch.tensor([[5.0, 5.0, 60.0, 50.0]]), "labels": torch.tensor([1])} for _ in images]
    losses = model.train()(images, targets)
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert torch.isfinite(total)
    assert model.backbone.network.training
    first = next(model.backbone.network.parameters())
    assert first.grad is not None
    assert first.grad.abs().sum() > 0
    found = model.eval()(images)
    assert [set(f) for f in found] == [{"boxes", "labels", "scores"}] * 2


def test_levels_have_the_strides_of_the_network():
    backbone = detection_backbone(small_model("focalnet_tiny_srf", num_classes=0), out_channels=8)
    levels = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(level.shape) for level in levels.values()] == [
        (1, 8, 16, 24),
        (1, 8, 8, 12),
        (1, 8, 4, 6),
        (1, 8, 2, 3),
        (1, 8, 1, 2),
    ]
