"""Hugging Face image data sets, by name from the hub or from a local folder.

A local folder may be the output of `save_to_disk`, a folder of Parquet files, or an `imagefolder` of `datasets`.
Columns and splits are found by their types and usual names, and can be named explicitly where those are ambiguous.

A table may name image files instead of containing images, and could name any file on this machine. So files are opened
only if `datasets` itself listed them, in an `imagefolder`, and only inside that folder or the download folder of
`datasets`. Likewise, the card of a local folder may not name tables outside it.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gatewise.data.images.base import IndexedImageData, Parts, hold_out
from gatewise.data.images.reading import UnreadableImageError, read_image
from gatewise.data.images.sources import ImageSource
from gatewise.data.images.transforms import (
    CENTER_CROP,
    IMAGENET_MEAN,
    IMAGENET_STD,
    RANDOM_RESIZED,
    Augmentation,
    Evaluation,
)
from gatewise.data.module import expanded, optional_module, require_fraction
from gatewise.errors import Failure, UserError

LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
CARDS = ("README.md", ".huggingface.yaml")
"""Files of a local folder that can name the data files."""

IMAGE_FOLDER = "imagefolder"
VAL_SPLITS = ("validation", "val", "valid", "dev")


class HuggingFace(IndexedImageData):
    """Images and labels from a Hugging Face data set.

    Args:
        path: name on the hub, or path of a local folder or Parquet file.
        config: configuration of the data set, if it has several.
        revision: branch, tag or commit on the hub; None: the newest.
        cache_dir: folder where `datasets` caches prepared data.
        image_column: column with the images; None: found by type.
        label_column: column with the labels (classes, integers or strings); None: found by type and name.
        train_split: name of the training split.
        val_split: name of the validation split; None: "validation" or a similar name, or else a seeded part of the
            training images.
        test_split: name of the test split; None: "test" if it has labels, else the validation images.
        val_fraction: fraction of the training images of every class to validate on if there is no split for it.
        image_size: size of the network input: side of a square, or (height, width).
        mean: mean per channel, subtracted from pixels in [0, 1]; a single number makes images gray.
        std: standard deviation per channel, by which pixels are then divided.
        batch_size: number of images per training batch and process.
        eval_batch_size: batch size for validation and test; None: `batch_size`.
        num_workers: number of data-loading processes; 0 loads in the training process.
        seed: random seed of order, augmentation and split.
        class_balanced: draw every class equally often in an epoch, instead of every image once.
        augment: augmentation of training images.
        evaluation: resizing of images in validation, test and prediction.
    """

    def __init__(
        self,
        path: str,
        *,
        config: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        val_fraction: float = 0.1,
        image_size: int | tuple[int, int] = 224,
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
        self.class_balanced = class_balanced
        self.path = path
        self.config = config
        self.revision = revision
        self.cache_dir = None if cache_dir is None else str(cache_dir)
        self.image_column = image_column
        self.label_column = label_column
        self.train_split = train_split
        self.val_split = val_split
        self.test_split = test_split
        self.val_fraction = val_fraction

    def prepare_data(self) -> None:
        """Download and prepare the data set, once per machine."""
        self._splits()

    def _load(self) -> Parts:
        splits, folders = self._splits()
        train_split = _named_split(splits, self.train_split)
        image_column = _image_column(train_split.features, self.image_column)
        label_column = _label_column(train_split.features, self.label_column)
        classes = Classes(train_split, label_column)

        def source(name: str) -> ImageSource:
            split = _named_split(splits, name)
            _existing(split.features, image_column, "image_column")
            _existing(split.features, label_column, "label_column")
            return TableSource(split, image_column, classes.indices(split, name), name, folders)

        train = source(self.train_split)
        val_name = self.val_split or next((name for name in VAL_SPLITS if name in splits), None)
        if val_name is None:
            train, val = hold_out(train, self.val_fraction, self.seed)
        else:
            val = source(val_name)
        test_name = self.test_split
        # Test splits of competitions have no labels.
        if test_name is None and "test" in splits and classes.are_known(splits["test"]):
            test_name = "test"
        return Parts(train, val, val if test_name is None else source(test_name), classes.names)

    def _splits(self) -> tuple[Mapping[str, Any], list[Path]]:
        """Return the splits by name, and the folders that may contain the image files that they name."""
        datasets = optional_module("datasets")
        local = expanded(self.path)
        folders: list[Path] = []
        with _loading(self.path):
            if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
                loaded = datasets.load_from_disk(str(local))
            elif local.is_file():
                loaded = datasets.load_dataset("parquet", data_files=str(local), cache_dir=self.cache_dir)
            else:
                name = str(local) if local.is_dir() else self.path
                if any((local / card).is_file() for card in CARDS):
                    builder = datasets.load_dataset_builder(name, self.config, cache_dir=self.cache_dir)
                    _require_inside(local, builder.config.data_files or {})
                loaded = datasets.load_dataset(name, self.config, revision=self.revision, cache_dir=self.cache_dir)
                folders = self._image_folders(loaded, local)
        return (loaded if isinstance(loaded, Mapping) else {self.train_split: loaded}), folders

    def _image_folders(self, splits: Mapping[str, Any], local: Path) -> list[Path]:
        """Return the folders with images of an `imagefolder`: itself, and those of downloaded or unpacked files."""
        if any(split.info.builder_name != IMAGE_FOLDER for split in splits.values()):
            return []
        config = optional_module("datasets").config
        downloads = Path(self.cache_dir or config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_DIR)
        fetched = local if local.is_dir() else Path(optional_module("huggingface_hub.constants").HF_HUB_CACHE)
        return [fetched, downloads, Path(config.DOWNLOADED_DATASETS_PATH)]


class TableSource(ImageSource):
    """Images of a `datasets.Dataset`, decoded here rather than by `datasets`, like the images of all other sources.

    Args:
        split: table of one split.
        image_column: column with the images.
        labels: label of every row.
        title: name of the split in messages.
        folders: folders that may contain the files that rows name.
    Raises:
        UserError: if the column does not hold images.
    """

    def __init__(
        self, split: Any, image_column: str, labels: NDArray[np.int64], title: str, folders: Sequence[Path] = ()
    ) -> None:
        undecoded = optional_module("datasets").Image(decode=False)
        try:
            self._table = split.select_columns([image_column]).cast_column(image_column, undecoded)
        # Any error of `datasets` or pyarrow for a column of another kind.
        except Exception as error:
            raise UserError(
                f"image column {image_column!r} holds {_kind(split, image_column)}, not images; set image_column"
            ) from error
        self._column = image_column
        self._title = title
        self._folders = [os.path.realpath(folder) for folder in folders]
        self.labels = labels

    def image(self, index: int) -> Image.Image:
        try:
            cell = self._table[index][self._column]
        # Whatever `datasets` and pyarrow answer to a damaged table.
        except Exception as error:
            raise UnreadableImageError(self.name(index), f"its row cannot be read: {_first_line(error)}") from error
        content, path = (None, None) if cell is None else (cell.get("bytes"), cell.get("path"))
        if content is not None:
            return read_image(content, self.name(index))
        if path is None:
            raise UnreadableImageError(self.name(index), "no image in its row")
        return read_image(self._allowed(index, path), self.name(index))

    def name(self, index: int) -> str:
        return f"{self._title} image {index}"

    def _allowed(self, index: int, path: str) -> str:
        """Return the path with all links resolved, if it is in one of the folders."""
        if "\0" not in path and "://" not in path:
            real = os.path.realpath(path)
            if any(real.startswith(os.path.join(folder, "")) for folder in self._folders):
                return real
        raise UnreadableImageError(
            self.name(index),
            f"its row names the file {path!r} instead of an image; only files of an imagefolder, inside it, are opened",
        )


class Classes:
    """Mapping from values of the label column to labels.

    Attributes:
        names: class names by label: those of the data set, or the sorted distinct values of the column.
    Raises:
        UserError: if the column holds neither classes nor integers nor strings.
    """

    def __init__(self, train_split: Any, label_column: str) -> None:
        self._column = label_column
        feature = train_split.features[label_column]
        if isinstance(feature, optional_module("datasets").ClassLabel):
            if not feature.names:
                raise UserError(f"label column {label_column!r} has no class names")
            self.names = list(feature.names)
            self._label_of: dict[Any, int] = {label: label for label in range(len(self.names))}
            return
        found = _values(train_split, label_column)
        # Lists and mappings are not hashable.
        values = set(found) if all(isinstance(value, Hashable) for value in found) else {None}
        if not all(isinstance(value, str) for value in values) and not all(type(value) is int for value in values):
            raise UserError(f"label column {label_column!r} holds {feature}; expected classes, integers or strings")
        ordered: list[Any] = sorted(values)
        self.names = [str(value) for value in ordered]
        self._label_of = {value: label for label, value in enumerate(ordered)}

    def indices(self, split: Any, split_name: str) -> NDArray[np.int64]:
        """Return the label of every row.

        Raises:
            UserError: if a row has no label, or one that does not occur in training.
        """
        values = _values(split, self._column)
        unknown = [value for value in values if not self._is_known(value)]
        if unknown:
            raise UserError(
                f"split {split_name!r} has label {unknown[0]!r:.80} in {self._column!r}, which is not a class"
            )
        return np.fromiter((self._label_of[value] for value in values), dtype=np.int64, count=len(values))

    def are_known(self, split: Any) -> bool:
        """Return whether every row of the split has one of these classes."""
        if self._column not in split.features:
            return False
        return all(self._is_known(value) for value in _values(split, self._column))

    def _is_known(self, value: object) -> bool:
        # A float or bool that equals a label does not count as one.
        return type(value) in (int, str) and value in self._label_of


def _named_split(splits: Mapping[str, Any], name: str) -> Any:
    if name not in splits:
        raise UserError(f"the data set has no split {name!r}, only {', '.join(splits)}; name one of these")
    return splits[name]


def _image_column(features: Mapping[str, Any], named: str | None) -> str:
    if named is not None:
        return _existing(features, named, "image_column")
    kind = optional_module("datasets").Image
    return _only_one([name for name in features if isinstance(features[name], kind)], features, "image_column")


def _label_column(features: Mapping[str, Any], named: str | None) -> str:
    if named is not None:
        return _existing(features, named, "label_column")
    kind = optional_module("datasets").ClassLabel
    classes = [name for name in features if isinstance(features[name], kind)]
    usual = [name for name in LABEL_COLUMNS if name in features]
    # Of several class columns, one may have a usual name (CIFAR-100 has coarse_label and fine_label).
    candidates = [name for name in usual if name in classes][:1] or classes or usual[:1]
    return _only_one(candidates, features, "label_column")


def _existing(features: Mapping[str, Any], name: str, field: str) -> str:
    if name not in features:
        raise UserError(f"{field} {name!r} is not a column of the data set, which has {', '.join(features)}")
    return name


def _only_one(candidates: Sequence[str], features: Mapping[str, Any], field: str) -> str:
    if len(candidates) != 1:
        found = "several: " + ", ".join(candidates) if candidates else "none"
        raise UserError(f"set {field}: the columns {', '.join(features)} leave no clear choice (found {found})")
    return candidates[0]


@contextmanager
def _loading(path: str) -> Iterator[None]:
    """Convert exceptions of calls into `datasets`, which vary with the damage, to errors of this package."""
    try:
        yield
    except ConnectionError as error:
        raise Failure(f"cannot reach the hub for data set {path!r}: {_first_line(error)}") from error
    except Exception as error:
        raise UserError(f"cannot load data set {path!r}: {_first_line(error)}") from error


def _require_inside(folder: Path, data_files: Mapping[Any, Sequence[str]]) -> None:
    """Raise `UserError` if the card of a local folder names files outside the folder."""
    inside = os.path.join(os.path.realpath(folder), "")
    for path in (str(path) for paths in data_files.values() for path in paths):
        if "://" in path or not os.path.realpath(path).startswith(inside):
            raise UserError(f"its card names {path!r}, which is not in the folder")


def _values(split: Any, column: str) -> list[Any]:
    try:
        return list(split[column][:])
    # Whatever `datasets` and pyarrow answer to a damaged table.
    except Exception as error:
        raise UserError(f"column {column!r} cannot be read: {_first_line(error)}") from error


def _kind(split: Any, column: str) -> str:
    return " ".join(str(split.features[column]).split())


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
