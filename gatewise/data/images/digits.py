"""scikit-learn's handwritten digits: 1,797 gray images of 8x8, for runs of seconds.

They are a part of "Optical Recognition of Handwritten Digits" (Alpaydin, Kaynak, 1998, UCI machine learning
repository), and come with scikit-learn.
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

# Of all pixels, which are 0 to 16, as fractions of 16.
MEAN, STD = 0.3053, 0.3760
# Without flips, which no digit survives.
AUGMENT = Augmentation(crop="pad", crop_padding=2, hflip=0.0)


class Digits(IndexedImageData):
    """The digits as 32x32 images.

    The 8x8 originals are enlarged four times (bicubic) rather than padded: inside a frame of 32x32 a digit would fill
    a sixteenth of what the network looks at, four cells of a stem with stride 4.

    Args:
        channels: 3 repeats the gray channel, so that any network with its usual stem fits; or 1.
        val_fraction: part of the training images, even by class and drawn by `seed`, that validates.
        test_fraction: part of all images, drawn likewise, that tests.
        batch_size: images per training batch and process.
        eval_batch_size: the same for validation and test; `batch_size` if not given.
        num_workers: loading processes.
        seed: of order, augmentation and splits.
        augment: how training images vary.
        evaluation: how any other picture is fitted to 32x32.
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
