"""Fashion-MNIST: 28x28 gray images of ten kinds of clothes.

A subset comes with the package: 10,000 training and 2,000 test images, drawn evenly by class with a fixed seed
(`tools/make_fashion_subset.py`). The full 60,000 and 10,000 images are used if Debian's package
`dataset-fashion-mnist` or a folder that the user names has them, or are downloaded on request.

Data: Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms",
2017, arXiv:1708.07747. MIT license, in `assets/fashion_mnist_LICENSE.txt`.
"""

from __future__ import annotations

import gzip
import lzma
import os
import zlib
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torchvision import transforms

from gatewise.data.images.base import IndexedImageData, Parts, hold_out
from gatewise.data.images.reading import to_rgb
from gatewise.data.images.sources import ArraySource
from gatewise.data.images.transforms import WHOLE_IMAGE, Augmentation, Evaluation
from gatewise.data.module import expanded, require_fraction
from gatewise.errors import Failure, UserError

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SUBSET_FILE = "fashion_mnist_subset.npz.xz"
# Mean and standard deviation of all pixels of the 60,000 training images, scaled to [0, 1].
MEAN, STD = 0.2860, 0.3530
AUGMENT = Augmentation(crop="pad")

_SIDE = 28
_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", 60_000),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", 10_000),
}


class Labeled(NamedTuple):
    """Images uint8 (N, 28, 28) and labels uint8 (N,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]


class Fashion(IndexedImageData):
    """Fashion-MNIST as 32x32 images: the 28x28 originals with two black pixels on every side.

    The clothes are light on a black background, so images with a light background must be inverted first.

    Args:
        source: images to use. "subset" comes with the package, "full" is the originals, and "auto" is the originals if
            they are found (in `root` or Debian's folder), else the subset. Name one to compare results between
            machines.
        root: folder with the original files, plain or gzipped, and target of `download`.
        download: download the originals into `root` if they are missing.
        channels: number of input channels: 1, or 3 to repeat the gray channel for networks with an RGB stem.
        val_fraction: fraction of the training images of every class to validate on, drawn by `seed`.
        batch_size: number of images per training batch and process.
        eval_batch_size: batch size for validation and test; None: `batch_size`.
        num_workers: number of data-loading processes; 0 loads in the training process.
        seed: random seed of order, augmentation and split.
        augment: augmentation of training images.
        evaluation: resizing of other images to 32x32.
    """

    def __init__(
        self,
        *,
        source: Literal["auto", "subset", "full"] = "auto",
        root: str | Path | None = None,
        download: bool = False,
        channels: Literal[1, 3] = 3,
        val_fraction: float = 0.1,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 2,
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
            # Any image is first converted to the gray 28x28 of the originals, then padded like them.
            prepare=transforms.Compose(
                [to_rgb, transforms.Grayscale(3), transforms.Resize((_SIDE, _SIDE)), transforms.Pad(2)]
            ),
        )
        require_fraction("val_fraction", val_fraction)
        if source == "subset" and (root is not None or download):
            raise UserError("source 'subset' comes with the package: leave out root and download, or choose 'full'")
        if download and root is None:
            raise UserError("download needs root, the folder to download Fashion-MNIST into")
        self.class_names = list(CLASS_NAMES)
        self.source = source
        self.root = None if root is None else expanded(root)
        self.download = download
        self.val_fraction = val_fraction

    def prepare_data(self) -> None:
        """Download the originals if that was requested and they are missing."""
        if self.download and self.root is not None and find_originals(self.root) is None:
            _download(self.root)

    def _load(self) -> Parts:
        train, test = self._labeled()
        kept, held_out = hold_out(ArraySource(*train, "training"), self.val_fraction, self.seed)
        return Parts(kept, held_out, ArraySource(*test, "test"), list(CLASS_NAMES))

    def _labeled(self) -> tuple[Labeled, Labeled]:
        if self.source == "subset":
            return load_subset()
        folder = find_originals(self.root or DEBIAN_FOLDER)
        if folder is not None:
            return load_originals(folder, "train"), load_originals(folder, "test")
        if self.root is None and self.source == "auto":
            return load_subset()
        raise UserError(
            f"{self.root or DEBIAN_FOLDER} does not hold Fashion-MNIST (expected {_FILES['train'][0]}[.gz] and three "
            "more files); name the folder that does as root, or set download to true, or source to 'subset'"
        )


def load_subset() -> tuple[Labeled, Labeled]:
    """Return the training and test part of the subset in the package."""
    packed = files("gatewise.data").joinpath("assets", SUBSET_FILE).read_bytes()
    with np.load(BytesIO(lzma.decompress(packed)), allow_pickle=False) as arrays:
        return (
            Labeled(arrays["train_images"], arrays["train_labels"]),
            Labeled(arrays["test_images"], arrays["test_labels"]),
        )


def find_originals(root: Path) -> Path | None:
    """Return the folder with all four files: `root`, or torchvision's folder below it; None if neither has them."""
    for folder in (root, root / "FashionMNIST" / "raw"):
        if all(_find(folder, name) for images, labels, _ in _FILES.values() for name in (images, labels)):
            return folder
    return None


def load_originals(folder: Path, part: Literal["train", "test"]) -> Labeled:
    """Load one part of the original files.

    Raises:
        UserError: if a file is missing, damaged, or not of the expected shape.
    """
    images_name, labels_name, count = _FILES[part]
    images = _read_idx(folder, images_name, (count, _SIDE, _SIDE))
    labels = _read_idx(folder, labels_name, (count,))
    if labels.max() >= len(CLASS_NAMES):
        raise UserError(
            f"{_find(folder, labels_name)} is damaged: it has label {labels.max()}, and there are {len(CLASS_NAMES)} "
            "classes, from 0; replace it"
        )
    return Labeled(images, labels)


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if os.path.isfile(path)), None)


def _read_idx(folder: Path, name: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Read an IDX file: two zero bytes, 8 for uint8, number of axes, their lengths (32-bit big endian), data."""
    path = _find(folder, name)
    if path is None:
        raise UserError(f"{folder} has neither {name} nor {name}.gz")
    header = bytes([0, 0, 8, len(shape)]) + b"".join(length.to_bytes(4, "big") for length in shape)
    size = len(header) + int(np.prod(shape))
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            # One byte more than expected reveals a file that is too long, without unpacking all of it.
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); replace it") from error
    if not content.startswith(header) or len(content) != size:
        raise UserError(f"{path} is not Fashion-MNIST's {name} of shape {shape}; replace it")
    return np.frombuffer(content, dtype=np.uint8, offset=len(header)).reshape(shape)


def _download(root: Path) -> None:
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(root), download=True)
    # An unwritable folder, a broken connection, a truncated file: torchvision passes on whatever Python's modules
    # raise.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise Failure(f"cannot download Fashion-MNIST into {root}: {reason}") from error
