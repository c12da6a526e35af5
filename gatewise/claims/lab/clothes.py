"""Images of clothes, classified by networks that train in seconds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewise.claims.lab.training import Batch
from gatewise.data.images.fashion import MEAN, STD, Labeled, load_subset


class Clothes:
    """Ten kinds of clothes: the part of Fashion-MNIST that comes with the package, 28x28, one channel."""

    classes = 10

    def __init__(self) -> None:
        self.train, self.test = (self._tensors(part) for part in load_subset())

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Images (B, 1, 28, 28) and labels (B,)."""
        drawn = torch.randint(len(self.train[1]), (size,), generator=generator)
        return tuple(tensor[drawn] for tensor in self.train)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    @torch.no_grad()
    def percent_right(self, model: nn.Module) -> float:
        """Of all test images."""
        images, labels = self.test
        right = [
            (model(part).argmax(1) == own).sum() for part, own in zip(images.split(500), labels.split(500), strict=True)
        ]
        return 100 * torch.stack(right).sum().item() / len(labels)

    def _tensors(self, part: Labeled) -> tuple[Tensor, Tensor]:
        images = (torch.tensor(part.images)[:, None] / 255 - MEAN) / STD
        return images.contiguous(memory_format=torch.channels_last), torch.tensor(part.labels).long()
