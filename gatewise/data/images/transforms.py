"""Image transforms for training and evaluation.

The operations are those of timm and torchvision, selected by two small configs. The ImageNet recipes of the papers
use `Augmentation(auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, random_erasing=0.25)`; images
of 32 pixels use `Augmentation(crop="pad")`. Mixup and CutMix (`BatchMixing`) work on batches and are applied by the
task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from PIL import Image, ImageOps
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode
from timm.data.transforms_factory import transforms_imagenet_eval, transforms_imagenet_train
from torchvision import transforms

from gatewise.data.images.reading import to_rgb
from gatewise.errors import UserError

Interpolation: TypeAlias = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
ImageTransform: TypeAlias = Callable[[Image.Image], torch.Tensor]
Prepare: TypeAlias = Callable[[Image.Image], Image.Image]

# Channel statistics of the ImageNet checkpoints of all papers, except MobileNetV2's TensorFlow checkpoints.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Largest aspect ratio of an image, relative to that of the network input; beyond it, the ends are cut off.
_LARGEST_ASPECT = 100


def _require_probability(field: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{field} must be a probability between 0 and 1, not {value}")


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of training images.

    Args:
        crop: kind of crop. "random_resized" cuts out a part of random area and aspect ratio and resizes it to the image
            size (ImageNet training). "pad" resizes both edges to the image size, pads by `crop_padding` and cuts out
            the image size at a random place (small images).
        scale: smallest and largest area of the random part, as fractions of the image's area.
        ratio: narrowest and widest aspect ratio of the random part, width over height.
        crop_padding: number of black pixels that "pad" adds on every side.
        interpolation: interpolation of the resized crops; "random" picks bilinear or bicubic per image
            ("pad": bicubic).
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip.
        auto_augment: timm policy, such as "rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "original" or "v0".
        color_jitter: strength of brightness, contrast and saturation jitter: one number, or three or four (the fourth
            for hue). As in timm, whose recipes give both, it is unused with `auto_augment`, unless that is a
            three-augment policy ("3a").
        random_erasing: probability that a rectangle of the normalized image is erased.
        random_erasing_mode: content of erased rectangles: zeros ("const"), one normal color ("rand") or normal noise
            ("pixel").
        random_erasing_count: maximum number of erased rectangles.
    Raises:
        UserError: if a value is out of range.
    """

    crop: Literal["random_resized", "pad"] = "random_resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_padding: int = 4
    interpolation: Interpolation | Literal["random"] = "bicubic"
    hflip: float = 0.5
    vflip: float = 0.0
    auto_augment: str | None = None
    color_jitter: float | tuple[float, ...] | None = None
    random_erasing: float = 0.0
    random_erasing_mode: Literal["const", "rand", "pixel"] = "pixel"
    random_erasing_count: int = 1

    def __post_init__(self) -> None:
        for field in ("hflip", "vflip", "random_erasing"):
            _require_probability(field, getattr(self, field))
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"scale must be (smallest, largest) area within 0 to 1, not {tuple(self.scale)}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"ratio must be (narrowest, widest) aspect ratio above 0, not {tuple(self.ratio)}")
        if self.crop_padding < 0:
            raise UserError(f"crop_padding must be 0 or more pixels, not {self.crop_padding}")
        if isinstance(self.color_jitter, Sequence) and len(self.color_jitter) not in (3, 4):
            raise UserError(f"color_jitter must be one number, three or four, not {len(self.color_jitter)} of them")
        if self.auto_augment is not None:
            _policy(self, (32, 32), IMAGENET_MEAN)


RANDOM_RESIZED = Augmentation()


@dataclass(frozen=True)
class Evaluation:
    """Resizing of images in validation, test and prediction.

    Args:
        crop_pct: ratio of the image size to the size before cropping; 0.875 is the usual 224 of 256.
        crop_mode: way of fitting an image. "center" resizes the shorter edge and crops the center, "squash" resizes
            both edges, and "border" resizes the longer edge and fills the rest with the mean color.
        interpolation: interpolation of the resized image.
    Raises:
        UserError: if `crop_pct` is not in (0, 1].
    """

    crop_pct: float = 0.875
    crop_mode: Literal["center", "squash", "border"] = "center"
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        if not 0 < self.crop_pct <= 1:
            raise UserError(f"crop_pct must be above 0 and at most 1, not {self.crop_pct}")


CENTER_CROP = Evaluation()
WHOLE_IMAGE = Evaluation(crop_pct=1.0)


@dataclass(frozen=True)
class BatchMixing:
    """Mixup and CutMix, which blend the images of a batch and their labels. Both are off by default.

    Args:
        mixup_alpha: parameter of the Beta(alpha, alpha) distribution of mixup weights; 0: no mixup.
        cutmix_alpha: parameter of the Beta(alpha, alpha) distribution of CutMix areas; 0: no CutMix.
        prob: probability that a batch (pair, image) is mixed at all.
        switch_prob: probability of CutMix rather than mixup if both are on.
        mode: unit of a random draw: the whole "batch", each "pair", or each image ("elem").
    Raises:
        UserError: if a value is out of range.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5
    mode: Literal["batch", "pair", "elem"] = "batch"

    def __post_init__(self) -> None:
        for field in ("prob", "switch_prob"):
            _require_probability(field, getattr(self, field))
        for field in ("mixup_alpha", "cutmix_alpha"):
            if getattr(self, field) < 0:
                raise UserError(f"{field} must be 0 (off) or more, not {getattr(self, field)}")


def create_mixup(mixing: BatchMixing, num_classes: int, batch_size: int, label_smoothing: float = 0.0) -> Mixup | None:
    """Return timm's `Mixup` for these settings, or None if both kinds are off.

    It maps (images (B, C, H, W), labels (B,)) to (images, soft labels (B, num_classes)). It changes the images in
    place, draws from NumPy's global stream, and applies `label_smoothing` itself.

    Raises:
        UserError: if `batch_size` is odd, because images are mixed in pairs.
    """
    if mixing.mixup_alpha == 0 and mixing.cutmix_alpha == 0:
        return None
    if batch_size % 2:
        raise UserError(f"mixup and cutmix pair the images of a batch: batch_size must be even, not {batch_size}")
    return Mixup(
        mixup_alpha=mixing.mixup_alpha,
        cutmix_alpha=mixing.cutmix_alpha,
        prob=mixing.prob,
        switch_prob=mixing.switch_prob,
        mode=mixing.mode,
        label_smoothing=label_smoothing,
        num_classes=num_classes,
    )


def train_transform(
    augmentation: Augmentation,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    prepare: Prepare = to_rgb,
) -> ImageTransform:
    """Return a transform from any image to an augmented, normalized float32 (C, H, W); C is 1 or 3, as in `mean`.

    Args:
        size: height and width of the output.
        prepare: function that converts any image to RGB and frames it like the images of the data set.
    """
    gray = [transforms.Grayscale()] if len(mean) == 1 else []
    return transforms.Compose(
        [
            prepare,
            *_crop(augmentation, size),
            transforms.RandomHorizontalFlip(augmentation.hflip),
            transforms.RandomVerticalFlip(augmentation.vflip),
            *_policy(augmentation, size, mean),
            *gray,
            transforms.ToTensor(),
            transforms.Normalize(torch.tensor(mean), torch.tensor(std)),
            *_erasing(augmentation),
        ]
    )


def eval_transform(
    evaluation: Evaluation,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    prepare: Prepare = to_rgb,
) -> ImageTransform:
    """Return a transform from any image to a normalized float32 (C, H, W). Arguments are as for `train_transform`."""
    gray = [transforms.Grayscale()] if len(mean) == 1 else []
    fit = transforms_imagenet_eval(
        size,
        crop_pct=evaluation.crop_pct,
        crop_mode=evaluation.crop_mode,
        interpolation=evaluation.interpolation,
        mean=tuple(mean),
        std=tuple(std),
    )
    # Resized by its shorter edge, an image a few pixels high and very wide would not fit in memory.
    ends = [partial(_without_far_ends, most=_LARGEST_ASPECT * max(size) / min(size))]
    return transforms.Compose([prepare, *(ends if evaluation.crop_mode == "center" else []), *gray, *fit.transforms])


def _without_far_ends(image: Image.Image, most: float) -> Image.Image:
    """Return the middle of an image whose longer edge is more than `most` times the shorter one, else the image."""
    short, long = sorted(image.size)
    if long <= most * short:
        return image
    kept = int(most * short)
    start = (long - kept) // 2
    if image.width == long:
        return image.crop((start, 0, start + kept, image.height))
    return image.crop((0, start, image.width, start + kept))


def _crop(augmentation: Augmentation, size: tuple[int, int]) -> list[Prepare]:
    if augmentation.crop == "random_resized":
        return [
            RandomResizedCropAndInterpolation(
                size, scale=augmentation.scale, ratio=augmentation.ratio, interpolation=augmentation.interpolation
            )
        ]
    interpolation = "bicubic" if augmentation.interpolation == "random" else augmentation.interpolation
    return [
        transforms.Resize(size, interpolation=str_to_interp_mode(interpolation)),
        transforms.RandomCrop(size, padding=augmentation.crop_padding),
    ]


def _policy(augmentation: Augmentation, size: tuple[int, int], mean: Sequence[float]) -> list[Prepare]:
    """Return timm's automatic augmentation and color jitter, for RGB images even if the network takes gray ones."""
    try:
        _, color, _ = transforms_imagenet_train(
            size,
            auto_augment=augmentation.auto_augment,
            color_jitter=augmentation.color_jitter,  # type: ignore[arg-type]  # None leaves it out
            interpolation=augmentation.interpolation,
            mean=tuple(mean) if len(mean) == 3 else tuple(mean) * 3,
            separate=True,
        )
    # Errors of timm's parser for an unknown policy.
    except (AssertionError, NotImplementedError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"auto_augment {augmentation.auto_augment!r} is not a timm policy; "
            "write one as 'rand-m9-mstd0.5-inc1', 'augmix-m5-w4-d2', 'original' or 'v0'"
        ) from error
    for transform in color.transforms:
        _allow_no_bits(transform)
    return color.transforms


def _allow_no_bits(policy: Any) -> None:
    """Let timm's strongest posterizing keep no bits, which makes a black image. Newer Pillow versions refuse that."""
    chains = [getattr(policy, "ops", []), *getattr(policy, "policy", [])]
    for operation in (operation for chain in chains for operation in chain):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    if bits_to_keep >= 8:
        return image
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


def _erasing(augmentation: Augmentation) -> list[RandomErasing]:
    if augmentation.random_erasing == 0:
        return []
    return [
        RandomErasing(
            augmentation.random_erasing,
            mode=augmentation.random_erasing_mode,
            max_count=augmentation.random_erasing_count,
            device="cpu",
        )
    ]
