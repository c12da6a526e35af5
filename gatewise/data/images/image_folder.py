"""Images in a folder with one sub-folder per class.

Two layouts are supported:

    root/train/class/...  root/val/class/...  [root/test/class/...]
    root/class/...

In the first, if `val` is missing, a seeded part of the training images is used for validation. If `test` is missing,
the validation images are also the test images, as is customary for ImageNet. In the second, validation and test are
seeded parts of all images. Class folders may contain further folders. Names that begin with a dot are ignored.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from gatewise.data.images.base import IndexedImageData, Parts, hold_out
from gatewise.data.images.sources import FileSource, ImageSource
from gatewise.data.images.transforms import (
    CENTER_CROP,
    IMAGENET_MEAN,
    IMAGENET_STD,
    RANDOM_RESIZED,
    Augmentation,
    Evaluation,
)
from gatewise.data.module import expanded, require_fraction
from gatewise.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2")
TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "valid", "validation")
TEST_FOLDERS = ("test", "testing")


class ImageFolder(IndexedImageData):
    """Images in class folders. The classes are the folder names in sorted order.

    Images that cannot be decoded are detected when they are read. Training replaces them by the next readable image,
    and evaluation leaves them out. One warning names them, and their count is reported at the end. A class without
    images is an error at once.

    Args:
        root: folder with one sub-folder per class, or with such folders in train/, val/ and test/.
        image_size: size of the network input: side of a square, or (height, width).
        val_fraction: fraction of the training images of every class to validate on if there is no folder for it.
        test_fraction: fraction of all images of every class to test on if the class folders are in `root` itself.
        mean: mean per channel, subtracted from pixels in [0, 1]; a single number makes images gray.
        std: standard deviation per channel, by which pixels are then divided.
        batch_size: number of images per training batch and process.
        eval_batch_size: batch size for validation and test; None: `batch_size`.
        num_workers: number of data-loading processes; 0 loads in the training process.
        seed: random seed of order, augmentation and splits.
        class_balanced: draw every class equally often in an epoch, instead of every image once.
        augment: augmentation of training images.
        evaluation: resizing of images in validation, test and prediction.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        image_size: int | tuple[int, int] = 224,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 4,
        seed: int = 0,
        class_balanced: bool = False,
        augment: Augmentation = RANDOM_RESIZED,
        evaluation: Evaluation = CENTER_CROP,
    ) -> None:
        super().__init__(
            image_size=image_size,
            mean=mean,
            std=std,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            augment=augment,
            evaluation=evaluation,
        )
        require_fraction("val_fraction", val_fraction)
        require_fraction("test_fraction", test_fraction)
        self.class_balanced = class_balanced
        self.root = expanded(root)
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction

    def _load(self) -> Parts:
        if not os.path.isdir(self.root):
            raise UserError(f"root {self.root} is not a folder; name one with class folders")
        train_folder, val_folder, test_folder = (
            _folder_called(self.root, names) for names in (TRAIN_FOLDERS, VAL_FOLDERS, TEST_FOLDERS)
        )
        if train_folder is None:
            if held_out := val_folder or test_folder:
                raise UserError(f"{self.root} has a folder {held_out.name!r} but no 'train'; add or rename one")
            class_names, everything = scan(self.root)
            rest, test = hold_out(everything, self.test_fraction, self.seed)
            train, val = hold_out(rest, self.val_fraction, self.seed)
            return Parts(train, val, test, class_names)

        class_names, train = scan(train_folder)
        if val_folder is None:
            train, val = hold_out(train, self.val_fraction, self.seed)
        else:
            val = scan(val_folder, class_names).source
        test = val if test_folder is None else scan(test_folder, class_names).source
        return Parts(train, val, test, class_names)


class Scanned(NamedTuple):
    """Content of a folder of class folders."""

    class_names: list[str]
    source: ImageSource


def scan(folder: Path, class_names: Sequence[str] | None = None) -> Scanned:
    """Return the images in a folder of class folders, class by class, sorted by path within each.

    Args:
        class_names: known classes by label; None: those of the folder. An unknown class in the folder is an error, a
            missing one is not (a small test folder need not have all).
    Raises:
        UserError: if there are no class folders, one has no images, or a class is not in `class_names`.
    """
    found = sorted(path.name for path in _entries(folder) if os.path.isdir(path) and not path.name.startswith("."))
    if not found:
        raise UserError(f"{folder} has no class folders; expected {folder / '<class>' / '<image>.jpg'} and so on")
    names = found if class_names is None else list(class_names)
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise UserError(f"{folder} has classes that training does not: {', '.join(unknown[:5])}; rename or remove them")

    paths: list[str] = []
    labels: list[int] = []
    empty: list[str] = []
    for name in found:
        images = _images_below(folder / name)
        if not images:
            empty.append(name)
        paths += images
        labels += [names.index(name)] * len(images)
    if not paths:
        raise UserError(f"{folder} holds no images (looked for {', '.join(EXTENSIONS)} in {len(found)} class folders)")
    if empty:
        raise UserError(
            f"class folders without images in {folder}: {', '.join(empty[:5])}{' ...' if len(empty) > 5 else ''}; "
            f"add images ({', '.join(EXTENSIONS)}) or remove the folders"
        )
    return Scanned(names, FileSource(paths, np.asarray(labels, dtype=np.int64)))


def _folder_called(root: Path, names: Sequence[str]) -> Path | None:
    """Return the folder in `root` with one of these names, ignoring case."""
    return next((path for path in _entries(root) if path.name.lower() in names and os.path.isdir(path)), None)


def _entries(folder: Path) -> list[Path]:
    """Return the entries of a folder, sorted by name."""
    try:
        return sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise _unreadable_folder(error) from error


def _unreadable_folder(error: OSError) -> UserError:
    return UserError(f"folder {error.filename} cannot be read: {error.strerror}")


def _refuse(error: OSError) -> NoReturn:
    # By default, an unreadable folder would be skipped silently.
    raise _unreadable_folder(error) from error


def _images_below(folder: Path) -> list[str]:
    """Return the sorted paths of the images in a folder and its sub-folders."""
    images = []
    for place, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images += [
            os.path.join(place, name)
            for name in files
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    return sorted(images)
