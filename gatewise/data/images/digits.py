"""scikit-learn's handwritten digits: 1,797 gray images of 8x8 pixels, for runs of seconds.

They are a subset of "Optical Recognition of Handwritten Digits" (Alpaydin, Kaynak, 1998, UCI machine learning
repository) and come with scikit-learn.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from torchvision import transforms

from gatewise.data.images.base import IndexedImageData, Parts, hold_out
from gatewise.data.images.reading import to_rgb
from gatewise.data.images.sources import ArraySource
from gatewise.data.images.transforms import WHOLE_IMAGE, Augmentation, Evaluation
from gatewise.data.module import require_fraction

# Mean and standard deviation of all pixels, scaled from [0, 16] to [0, 1].
MEAN, STD = 0.3053, 0.3760
# No flips, which would change the digits.
AUGMENT = Augmentation(crop="pad", crop_padding=2, hflip=0.0)


class Digits(IndexedImageData):
    """The digits as 32x32 images.

    The 8x8 originals are enlarged four times (bicubic) rather than padded. Padded to 32x32, a digit would fill only a
    sixteenth of the input, four cells of a stem with stride 4.

    Args:
        channels: number of input channels: 1, or 3 to repeat the gray channel for networks with an RGB stem.
        val_fraction: fraction of the training images of every class to validate on, drawn by `seed`.
        test_fraction: fraction of all images of every class to test on, drawn by `seed`.
        batch_size: number of images per training batch and process.
        eval_batch_size: batch size for validation and test; None: `batch_size`.
        num_workers: number of data-loading processes; 0 loads in the training process.
        seed: random seed of order, augmentation and splits.
        augment: augmentation of training images.
        evaluation: resizing of other images to 32x32.
    """

    def __init__(
        self,
        *,
        channels: Literal[1, 3] = 3,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        augment: Augmentation = AUGMENT,
        evaluation: Evaluation = WHOLE_IMAGE,
    ) -> None:
        super().__init__(
            image_size=32,
            mean=(MEAN,) * channels,
            std=(STD,) * channels,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            augment=augment,
            evaluation=evaluation,
            prepare=transforms.Compose(
                [to_rgb, transforms.Resize((32, 32), interpolation=transforms.InterpolationMode.BICUBIC)]
            ),
        )
        require_fraction("val_fraction", val_fraction)
        require_fraction("test_fraction", test_fraction)
        self.class_names = [str(digit) for digit in range(10)]
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction

    def _load(self) -> Parts:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
        everything = ArraySource(images, bunch.target, "digit")
        rest, test = hold_out(everything, self.test_fraction, self.seed)
        train, val = hold_out(rest, self.val_fraction, self.seed)
        return Parts(train, val, test, self.class_names)
