"""Networks and looks at files for the tests of quantization."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from gatewise.ops.quantize import Grid


def batches(count=3, shape=(2, 3, 16, 16)):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def grids(report):
    """The grid of each tensor of codes, by name, from the report alone."""
    return {
        entry.name: Grid(torch.tensor(entry.scale), torch.tensor(entry.zero_point, dtype=torch.int32), 0, 255)
        for entry in report.ranges
    }


class Residual(nn.Module):
    """What mobile networks are made of: (B, 3, H, W) -> (B, 5)."""

    def __init__(self, act=nn.ReLU6):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), act())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), act())
        self.project = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(self.depthwise(x))
        return self.head(x.mean(dim=(2, 3)))


def operators(network):
    """What onnxruntime makes of the file."""
    import onnx
    import onnxruntime

    from gatewise.efficiency.quantization.prepare import runnable_bytes

    content = runnable_bytes(network.onnx, network.report.weights_only)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = "optimized"
    options.add_session_config_entry("session.use_memory_mapped_ort_model", "0")
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load("optimized").graph.node)
