"""Evaluation of trained networks on held-out data, and classification of image files."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from gatewise.data.images.base import ImageData
from gatewise.data.images.reading import UnreadableImageError, read_image
from gatewise.data.images.transforms import ImageTransform
from gatewise.data.module import DataModule
from gatewise.data.text.mqar import MQAR
from gatewise.data.text.text import Text
from gatewise.errors import Failure, UserError
from gatewise.tasks.sequence_evaluation import (
    LanguageEvaluation,
    RecallEvaluation,
    evaluate_language_model,
    evaluate_recall,
)

Split: TypeAlias = Literal["val", "test"]
Device: TypeAlias = str | torch.device | None


@dataclass(frozen=True)
class Evaluation:
    """Scores of a classifier on a set of images.

    Attributes:
        top1: top-1 accuracy, from 0 to 1.
        top5: top-5 accuracy, from 0 to 1; None with fewer than 5 classes.
        loss: mean cross entropy.
        images: number of images.
        per_class: accuracy per class name; None for a class without images.
        confusion: number of images of class i (row) that were predicted as class j (column).
        skipped: images that could not be read.
    """

    top1: float
    top5: float | None
    loss: float
    images: int
    class_names: list[str]
    per_class: dict[str, float | None]
    confusion: list[list[int]]
    skipped: list[str]
    seconds: float


@dataclass(frozen=True)
class Prediction:
    """Most likely classes of one image file, most likely first, or the error that prevented a prediction."""

    path: str
    classes: list[tuple[str, float]]
    error: str | None = None


@overload
def evaluate(
    model: nn.Module, data: ImageData, split: Split = ..., device: Device = ..., progress: bool = ...
) -> Evaluation: ...


@overload
def evaluate(
    model: nn.Module, data: Text, split: Split = ..., device: Device = ..., progress: bool = ...
) -> LanguageEvaluation: ...


@overload
def evaluate(
    model: nn.Module, data: MQAR, split: Split = ..., device: Device = ..., progress: bool = ...
) -> RecallEvaluation: ...


@overload
def evaluate(
    model: nn.Module, data: DataModule, split: Split = ..., device: Device = ..., progress: bool = ...
) -> Evaluation | LanguageEvaluation | RecallEvaluation: ...


def evaluate(
    model: nn.Module, data: DataModule, split: Split = "test", device: Device = None, progress: bool = False
) -> Evaluation | LanguageEvaluation | RecallEvaluation:
    """Score `model` on a part of `data`.

    Args:
        model: classifier with one output per class, or language model whose vocabulary covers that of the data.
        data: data module; it is set up here if necessary.
        split: part of the data to score on.
        device: device to run on; None: the accelerator if there is one.
        progress: show a progress bar.
    Raises:
        UserError: if the number of classes or tokens does not fit.
        Failure: if the network's loss is not finite.
    """
    device = torch.device(device) if device is not None else best_device()
    data.prepare_data()
    data.setup("test" if split == "test" else "validate")
    loader = _tracked(data.test_dataloader() if split == "test" else data.val_dataloader(), "evaluating", progress)
    model = model.eval().to(device)
    if isinstance(data, ImageData):
        return _evaluate_classifier(model, data, loader, split, device)
    if isinstance(data, MQAR):
        return evaluate_recall(model, data, loader, device)
    if isinstance(data, Text):
        return evaluate_language_model(model, data, loader, split, device)
    raise UserError(f"there is no evaluation for data of kind {type(data).__name__}")


def _evaluate_classifier(
    model: nn.Module, data: ImageData, loader: Iterable[tuple[Tensor, Tensor]], split: Split, device: torch.device
) -> Evaluation:
    started = time.perf_counter()
    classes = data.num_classes
    confusion = MulticlassConfusionMatrix(classes).to(device)
    top5 = MulticlassAccuracy(classes, top_k=5, average="micro").to(device) if classes >= 5 else None
    loss_sum = 0.0
    for logits, labels in _outputs(model, loader, device):
        if logits.shape[1] != classes:
            raise UserError(f"the network has {logits.shape[1]} classes, the data has {classes}")
        confusion.update(logits, labels)
        loss_sum += F.cross_entropy(logits, labels, reduction="sum").item()
        if top5 is not None:
            top5.update(logits, labels)
    counts = confusion.compute().cpu()
    images = int(counts.sum())
    if images == 0:
        raise UserError(f"the data has no images to evaluate in its {split} part")
    if not math.isfinite(loss_sum):
        raise Failure(f"the network's loss on the {split} part is not finite: its outputs hold NaN or infinity")
    hits, totals = counts.diagonal(), counts.sum(dim=1)
    return Evaluation(
        top1=hits.sum().item() / images,
        top5=None if top5 is None else top5.compute().item(),
        loss=loss_sum / images,
        images=images,
        class_names=list(data.class_names),
        per_class={
            name: hit / total if total else None
            for name, hit, total in zip(data.class_names, hits.tolist(), totals.tolist(), strict=True)
        },
        confusion=counts.tolist(),
        skipped=list(data.unreadable),
        seconds=time.perf_counter() - started,
    )


def predict(
    model: nn.Module,
    paths: Sequence[str | Path],
    transform: ImageTransform,
    class_names: Sequence[str],
    top: int = 5,
    device: str | torch.device | None = None,
) -> Iterator[Prediction]:
    """Classify image files one by one and yield a prediction for each.

    A file that cannot be read, or whose outputs are not finite, yields a prediction with an error.

    Args:
        transform: function from an image to a network input, such as `data.transform_for_eval()`.
        top: number of classes per prediction, at most all.
    """
    device = torch.device(device) if device is not None else best_device()
    for path in paths:
        try:
            image = transform(read_image(path))
        except UnreadableImageError as error:
            yield Prediction(str(path), [], str(error))
            continue
        [(logits, _)] = _outputs(model, [(image[None], torch.zeros(1, dtype=torch.long))], device)
        if not bool(logits.isfinite().all()):
            yield Prediction(str(path), [], f"{path}: the network's outputs for it are not finite numbers")
            continue
        scores, indices = logits[0].softmax(dim=0).topk(min(top, len(class_names)))
        names = [class_names[index] for index in indices.tolist()]
        yield Prediction(str(path), list(zip(names, scores.tolist(), strict=True)))


def best_device() -> torch.device:
    """Return the accelerator of this machine, or its CPU if there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _outputs(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    model = model.eval().to(device)
    for images, labels in batches:
        with torch.inference_mode():
            logits = model(images.to(device)).float()
        yield logits, labels.to(device)


def _tracked(loader: Any, title: str, shown: bool) -> Iterable[tuple[Tensor, Tensor]]:
    from rich.progress import track

    return track(loader, title, total=len(loader), transient=True, disable=not shown)
