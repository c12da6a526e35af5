"""Image classification: one label per image.

Mixing images (mixup, cutmix) turns targets into probabilities. Losses and label smoothing accept both forms.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from gatewise.data.images.base import ImageData
from gatewise.data.images.transforms import BatchMixing, create_mixup
from gatewise.errors import UserError
from gatewise.tasks._base import Batch, Task
from gatewise.tasks.recipe import Recipe


@dataclass(frozen=True)
class ClassificationSettings:
    """The `task` section of a classification recipe.

    Args:
        loss: cross_entropy over the classes, or binary_cross_entropy per class, averaged over classes.
        label_smoothing: fraction of each target that is spread evenly over all classes.
        mixing: mixup and cutmix settings.
        auxiliary_weight: weight of the loss of the auxiliary classifier in training, for networks that have one
            (`forward_with_auxiliary`, which returns "main" and "aux").
    """

    loss: Literal["cross_entropy", "binary_cross_entropy"] = "cross_entropy"
    label_smoothing: float = 0.0
    mixing: BatchMixing = field(default_factory=BatchMixing)
    auxiliary_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.auxiliary_weight < 0:
            raise UserError(f"task.auxiliary_weight must be at least 0, not {self.auxiliary_weight!r}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"task.label_smoothing must be from 0 to below 1, not {self.label_smoothing!r}")


class ImageClassification(Task):
    """Classification of images (B, C, H, W). Logs top-1 accuracy, and top-5 with at least 5 classes."""

    settings = ClassificationSettings
    takes = ImageData
    monitor = "val/top1"

    def __init__(
        self, model: nn.Module, recipe: Recipe, data: ImageData, settings: ClassificationSettings, **shared: Any
    ) -> None:
        super().__init__(model, recipe, data, **shared)
        self.label_smoothing = settings.label_smoothing
        self.binary = settings.loss == "binary_cross_entropy"
        self.auxiliary_weight = settings.auxiliary_weight
        if self.auxiliary_weight and not hasattr(model, "forward_with_auxiliary"):
            raise UserError(f"task.auxiliary_weight: {type(model).__name__} has no auxiliary classifier")
        self.mixup = create_mixup(settings.mixing, data.num_classes, data.batch_size)
        self.mean_loss = MeanMetric()
        self.top1 = _accuracy(data.num_classes, 1)
        self.top5 = _accuracy(data.num_classes, 5) if data.num_classes >= 5 else None

    def prepare(self, batch: Batch) -> Batch:
        return self.mix(*self.laid_out(batch))

    def laid_out(self, batch: Batch) -> Batch:
        """Return the batch in the memory format of the recipe."""
        images, labels = batch
        if self.recipe.trainer.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, labels

    def mix(self, inputs: Tensor, targets: Tensor) -> Batch:
        return (inputs, targets) if self.mixup is None else self.mixup(inputs, targets)

    def task_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        logits = outputs.float()
        if not self.binary:
            return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        classes = logits.shape[-1]
        probabilities = F.one_hot(targets, classes).float() if targets.ndim == 1 else targets
        smooth = probabilities * (1 - self.label_smoothing) + self.label_smoothing / classes
        return F.binary_cross_entropy_with_logits(logits, smooth)

    def own_loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if not self.auxiliary_weight:
            return super().own_loss(inputs, targets)
        model: Any = self.model
        both = model.forward_with_auxiliary(inputs)
        auxiliary = self.task_loss(both["aux"], targets)
        return self.task_loss(both["main"], targets) + self.auxiliary_weight * auxiliary, both["main"]

    def compile_network(self) -> None:
        super().compile_network()
        if self.auxiliary_weight:
            model: Any = self.model
            model.forward_with_auxiliary = torch.compile(model.forward_with_auxiliary)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = self.laid_out(batch)
        logits = self.evaluated()(images).float()
        self.mean_loss.update(F.cross_entropy(logits, labels), weight=len(labels))
        self.log("val/loss", self.mean_loss, batch_size=len(labels))
        self.top1.update(logits, labels)
        self.log("val/top1", self.top1, prog_bar=True, batch_size=len(labels))
        if self.top5 is not None:
            self.top5.update(logits, labels)
            self.log("val/top5", self.top5, batch_size=len(labels))


def _accuracy(num_classes: int, top_k: int) -> MulticlassAccuracy:
    return MulticlassAccuracy(num_classes, top_k=top_k, average="micro", validate_args=False)
