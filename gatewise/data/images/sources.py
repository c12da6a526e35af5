"""Labeled images that are accessible by index, in memory or in files."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gatewise.data.images.reading import read_image


class ImageSource(ABC):
    """Sequence of images, each with an integer label.

    Attributes:
        labels: label of every image, int64.
    """

    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Return the image, in any mode.

        Raises:
            UnreadableImageError: if it cannot be decoded.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the name of the image in messages: its path, or its position in the data set."""


class ArraySource(ImageSource):
    """Gray images in memory: uint8 (N, H, W)."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.integer], title: str) -> None:
        self.images = images
        self.labels = labels.astype(np.int64)
        self._title = title

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def name(self, index: int) -> str:
        return f"{self._title} image {index}"


class FileSource(ImageSource):
    """Image files, read on access.

    The paths are stored in one block of bytes, because a list of a million strings would be copied into every worker,
    page by page, as reference counts change.
    """

    def __init__(self, paths: Sequence[str], labels: NDArray[np.int64]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self._paths = b"".join(encoded)
        self.labels = labels

    def image(self, index: int) -> Image.Image:
        return read_image(self._path(index), self.name(index))

    def name(self, index: int) -> str:
        return self._path(index).encode("utf-8", "backslashreplace").decode("utf-8")

    def _path(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._paths[start : int(self._ends[index])])


class SubsetSource(ImageSource):
    """Some images of another source, in the order of `indices`."""

    def __init__(self, source: ImageSource, indices: NDArray[np.int64]) -> None:
        self._source = source
        self._indices = indices
        self.labels = source.labels[indices]

    def image(self, index: int) -> Image.Image:
        return self._source.image(int(self._indices[index]))

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))
