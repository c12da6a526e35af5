"""Any folder of class folders.

Two layouts are understood:

    root/train/class/...  root/val/class/...  [root/test/class/...]
    root/class/...

In the first, where `val` is missing a seeded part of the training images validates; where `test` is missing the
validation images test too, as is the custom with ImageNet. In the second, seeded parts validate and test.
Class folders may hold further folders. Names that begin with a dot are passed over.
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
    """Images of a folder, whose classes are the names of its folders, in the order of their characters.

    An image that cannot be decoded is found when it is read: in training the next readable one stands in for it, in
    evaluation it is left out; one warning names such images, and their count is told at the end. A class without
    images is an error at once.

    Args:
        root: the folder.
        image_size: side of the square, or (height, width), that images are brought to.
        val_fraction: part of the training images, even by class, that validates where there is no folder for it.
        test_fraction: part of all images, even by class, that tests where the class folders lie in `root` itself.
        mean: per channel, what is subtracted from pixels in 0 to 1; one number makes the images gray.
        std: per channel, what they are divided by then.
        batch_size: images per training batch and process.
        eval_batch_size: the same for validation and test; `batch_size` if not given.
        num_workers: loading processes.
        seed: of order, augmentation and splits.
        class_balanced: draw every class equally often, rare ones several times, instead of every image once.
        augment: how training images vary.
        evaluation: how images are fitted to the image size when evaluated.
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
            raise UserError(f"root {self.root} is no folder; name one that holds class folders")
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
    """What a folder of class folders holds."""

    class_names: list[str]
    source: ImageSource


def scan(folder: Path, class_names: Sequence[str] | None = None) -> Scanned:
    """The images of a folder of class folders, class after class, by path within each.

    Args:
        class_names: the classes that there are, by label; by default those of the folder. Another class is an error,
            a missing one is not (a small test folder need not have all).
    Raises:
        UserError: if there are no class folders, one of them has no images, or a class is not among `class_names`.
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
    """The folder in `root` with one of these names, in capitals or not."""
    return next((path for path in _entries(root) if path.name.lower() in names and os.path.isdir(path)), None)


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, by name."""
    try:
        return sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise _unreadable_folder(error) from error


def _unreadable_folder(error: OSError) -> UserError:
    return UserError(f"folder {error.filename} cannot be read: {error.strerror}")


def _refuse(error: OSError) -> NoReturn:
    # By default, a folder that cannot be looked into would be passed over without a word.
    raise _unreadable_folder(error) from error


def _images_below(folder: Path) -> list[str]:
    """Paths of the images in a folder and the folders below it, sorted."""
    images = []
    for place, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images += [
            os.path.join(place, name)
            for name in files
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    return sorted(images)
