"""Small networks for the tests of the efficiency room."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatewise.efficiency.quantization.quantize import QuantizedModel, quantize
from tests.efficiency.quantized import Residual, batches


class Tiny(nn.Module):
    """Convolution, batch norm, depthwise convolution, pooling, linear: (B, 3, H, W) -> (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(self.depthwise(x).mean(dim=(2, 3)))


def settle(model: nn.Module) -> nn.Module:
    """Eval mode, with batch norms as after training, not at their start where they do nothing."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def tiny() -> nn.Module:
    return settle(Tiny())


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16)


@pytest.fixture(scope="session")
def residual() -> nn.Module:
    torch.manual_seed(0)
    return settle(Residual())


@pytest.fixture(scope="session")
def quantized(residual) -> QuantizedModel:
    return quantize(residual, batches())
