"""A small network and a task for the tests of quantization-aware training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from gatewise.methods.quantization_aware import prepare_qat

SHAPE = (3, 12, 12)


class Small(nn.Module):
    """A convolution, a residual block with a depthwise one, a concatenation and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.depthwise_norm = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8)
        self.project, self.project_norm = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.act = nn.ReLU6(inplace=True)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 4)

    def forward_features(self, x):
        x = self.act(self.stem_norm(self.stem(x)))
        y = F.relu(self.depthwise_norm(self.depthwise(x)))
        y = x + self.project_norm(self.project(y))
        return torch.cat([x, y], dim=1)

    def forward(self, x):
        return self.head(self.pool(self.forward_features(x)).flatten(1))


def prepared(network=None, **settings):
    settings = {"activation_delay": 1, "freeze_after": 3, "input_shape": SHAPE, **settings}
    return prepare_qat(Small() if network is None else network, **settings).train()


def images(count=8, seed=0, shape=SHAPE):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def ranges(network):
    return {name: value.clone() for name, value in network.named_buffers() if name.endswith("_range")}


def task(seed, count=64):
    """Images with a bright corner, and which corner it is."""
    generator = torch.Generator().manual_seed(seed)
    pictures, corner = torch.randn(count, *SHAPE, generator=generator), torch.arange(count) % 4
    for index in range(4):
        rows, columns = (slice(0, 6), slice(6, 12))[index // 2], (slice(0, 6), slice(6, 12))[index % 2]
        pictures[corner == index, index % 3, rows, columns] += 1.5
    return pictures, corner


def train(network, steps, lr=0.05, optimizer=None, start=0):
    optimizer = optimizer or torch.optim.SGD(network.parameters(), lr, momentum=0.9)
    losses = []
    for step in range(start, start + steps):
        pictures, labels = task(step)
        loss = F.cross_entropy(network(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_aware(network, **settings):
    network = prepared(network, activation_delay=5, freeze_after=15, decay=0.9, **settings)
    train(network, 30, lr=0.005)
    return network.eval()
