"""A Hugging Face image data set: by name from the hub, or from a local folder.

Local folders may be what `save_to_disk` writes, a folder of parquet files, or a folder that `datasets` knows as an
`imagefolder`. Columns and splits are found by their types and usual names, and can be named where that is not clear.

A table may name image files in place of holding images, and any table could name any file of this machine. Files are
opened only where `datasets` itself listed them, in an `imagefolder`, and only inside that folder or where `datasets`
keeps its downloads. Nor does the card of a local folder name tables outside it.
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
"""Files of a local folder that can name the files of the data set."""

IMAGE_FOLDER = "imagefolder"
VAL_SPLITS = ("validation", "val", "valid", "dev")


class HuggingFace(IndexedImageData):
    """Images and labels of a Hugging Face data set.

    Args:
        path: name on the hub, or a local folder or parquet file.
        config: configuration of the data set, where it has several.
        revision: branch, tag or commit on the hub; the newest if not given.
        cache_dir: where the package keeps what it has prepared.
        image_column: the column of images; found by its type if not given.
        label_column: the column of labels: classes, integers or strings; found by type and name if not given.
        train_split: name of the training split.
        val_split: name of the validation split; if not given, "validation" or the like, and if there is none a seeded
            part of the training images.
        test_split: name of the test split; if not given, "test" if it has labels, else what validates.
        val_fraction: part of the training images, even by class, that validates where no split does.
        image_size: side of the square, or (height, width), that images are brought to.
        mean: per channel, what is subtracted from pixels in 0 to 1; one number makes the images gray.
        std: per channel, what they are divided by then.
        batch_size: images per training batch and process.
        eval_batch_size: the same for validation and test; `batch_size` if not given.
        num_workers: loading processes.
        seed: of order, augmentation and split.
        class_balanced: draw every class equally often, rare ones several times, instead of every image once.
        augment: how training images vary.
        evaluation: how images are fitted to the image size when evaluated.
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
        """Fetch and prepare the data set, once per machine."""
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
        # The test splits of competitions come without labels.
        if test_name is None and "test" in splits and classes.are_known(splits["test"]):
            test_name = "test"
        return Parts(train, val, val if test_name is None else source(test_name), classes.names)

    def _splits(self) -> tuple[Mapping[str, Any], list[Path]]:
        """The splits by name, and the folders in which the image files that they name may be."""
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
        """Where the images of an `imagefolder` are: the folder itself, and where fetched or unpacked files go."""
        if any(split.info.builder_name != IMAGE_FOLDER for split in splits.values()):
            return []
        config = optional_module("datasets").config
        downloads = Path(self.cache_dir or config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_DIR)
        fetched = local if local.is_dir() else Path(optional_module("huggingface_hub.constants").HF_HUB_CACHE)
        return [fetched, downloads, Path(config.DOWNLOADED_DATASETS_PATH)]


class TableSource(ImageSource):
    """The images of a `datasets.Dataset`, decoded here rather than there, like the images of all other sources.

    Args:
        split: the table.
        image_column: its column of images.
        labels: the label of every row.
        title: name of the split in messages.
        folders: where the files may be that its rows name.
    Raises:
        UserError: if the column holds no images.
    """

    def __init__(
        self, split: Any, image_column: str, labels: NDArray[np.int64], title: str, folders: Sequence[Path] = ()
    ) -> None:
        undecoded = optional_module("datasets").Image(decode=False)
        try:
            self._table = split.select_columns([image_column]).cast_column(image_column, undecoded)
        # Whatever `datasets` and pyarrow answer to a column of another kind.
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
        """The path with all links followed, if it is in one of the folders."""
        if "\0" not in path and "://" not in path:
            real = os.path.realpath(path)
            if any(real.startswith(os.path.join(folder, "")) for folder in self._folders):
                return real
        raise UnreadableImageError(
            self.name(index),
            f"its row names the file {path!r} in place of an image; only files of an imagefolder, inside it, are "
            "opened",
        )


class Classes:
    """What the values of the label column stand for.

    Attributes:
        names: class names by label: those of the data set, or the column's different values in order.
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
        # Lists and mappings cannot be in a set.
        values = set(found) if all(isinstance(value, Hashable) for value in found) else {None}
        if not all(isinstance(value, str) for value in values) and not all(type(value) is int for value in values):
            raise UserError(f"label column {label_column!r} holds {feature}; expected classes, integers or strings")
        ordered: list[Any] = sorted(values)
        self.names = [str(value) for value in ordered]
        self._label_of = {value: label for label, value in enumerate(ordered)}

    def indices(self, split: Any, split_name: str) -> NDArray[np.int64]:
        """The label of every row.

        Raises:
            UserError: if a row has none, or one that training does not have.
        """
        values = _values(split, self._column)
        unknown = [value for value in values if not self._is_known(value)]
        if unknown:
            raise UserError(f"split {split_name!r} has label {unknown[0]!r:.80} in {self._column!r}, which is no class")
        return np.fromiter((self._label_of[value] for value in values), dtype=np.int64, count=len(values))

    def are_known(self, split: Any) -> bool:
        """Whether every row of the split has one of these classes."""
        if self._column not in split.features:
            return False
        return all(self._is_known(value) for value in _values(split, self._column))

    def _is_known(self, value: object) -> bool:
        # A float or a truth value that equals a label is none.
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
    # One of several class columns may have a usual name (CIFAR-100 has coarse_label and fine_label).
    candidates = [name for name in usual if name in classes][:1] or classes or usual[:1]
    return _only_one(candidates, features, "label_column")


def _existing(features: Mapping[str, Any], name: str, field: str) -> str:
    if name not in features:
        raise UserError(f"{field} {name!r} is no column of the data set, which has {', '.join(features)}")
    return name


def _only_one(candidates: Sequence[str], features: Mapping[str, Any], field: str) -> str:
    if len(candidates) != 1:
        found = "several: " + ", ".join(candidates) if candidates else "none"
        raise UserError(f"set {field}: among the columns {', '.join(features)} there is no clear one (found {found})")
    return candidates[0]


@contextmanager
def _loading(path: str) -> Iterator[None]:
    """For calls of `datasets` only, whose exceptions vary with what is damaged."""
    try:
        yield
    except ConnectionError as error:
        raise Failure(f"cannot reach the hub for data set {path!r}: {_first_line(error)}") from error
    except Exception as error:
        raise UserError(f"cannot load data set {path!r}: {_first_line(error)}") from error


def _require_inside(folder: Path, data_files: Mapping[Any, Sequence[str]]) -> None:
    """Raise `UserError` if a card names files outside its folder."""
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
