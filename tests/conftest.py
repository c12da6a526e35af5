"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Nothing is fetched in a test, and no test depends on what another machine would send.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

FINGERPRINTS = Path(__file__).parent / "fingerprints"

SMALL = {
    "focalnet_tiny_srf": {"embed_dim": 8, "depths": (1, 1, 2, 1), "focal_levels": (2, 1, 2, 0), "num_classes": 5},
    "inception_next_atto": {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "num_classes": 5},
    "convnext_tiny_k3_par1_4": {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "num_classes": 5},
    "mobilenetv2_035": {"num_classes": 5},
}
"""One small network of each family: a registered name and overrides."""


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def small_model(name: str, **overrides):
    """The small network of a family, in eval mode, with every parameter moved away from its initial value."""
    import gatewise

    model = gatewise.create_model(name, **{**SMALL[name], **overrides}).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif key.endswith("running_var"):
                buffer.copy_(1 + torch.rand(buffer.shape, generator=generator))
    return model
