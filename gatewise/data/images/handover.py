"""Results of loading workers: batches and unreadable images (named once, counted at the end)."""

from __future__ import annotations

import logging
import warnings
from typing import NamedTuple

from torch import Tensor

from gatewise.data.images.reading import UnreadableImageError
from gatewise.data.loading import Batch
from gatewise.errors import UserError

_NAMED_AT_MOST = 20
_log = logging.getLogger("gatewise.data")


class Loaded(NamedTuple):
    """Batch from a worker, with the errors of the images that could not be read for it."""

    images: Tensor
    labels: Tensor
    unreadable: list[UnreadableImageError]


class UnreadableImagesWarning(UserWarning):
    """Some images cannot be read and are skipped; the message names them."""


class UnreadableImages:
    """Unreadable images that the loaders of one data module found, collected in the training process.

    Files are checked only when they are read. Checking all beforehand would decode ImageNet one extra time, which takes
    hours before the first step, and checking only headers misses truncated files.
    """

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}
        self._warned = False
        self._told = 0

    @property
    def names(self) -> list[str]:
        """Names of the images found so far, sorted."""
        return sorted(self._reasons)

    def unwrap(self, loaded: Loaded | UserError) -> Batch:
        """Record the errors of a batch and return its images (B, C, H, W) and labels (B,).

        Raises:
            UserError: if the worker returned one instead of a batch.
        """
        if isinstance(loaded, UserError):
            raise loaded
        for error in loaded.unreadable:
            self._reasons[error.name] = error.reason
        return loaded.images, loaded.labels

    def warn(self) -> None:
        """Name the images found so far, the first time that there are any."""
        if self._warned or not self._reasons:
            return
        self._warned = True
        named = [f"{name} ({self._reasons[name]})" for name in self.names[:_NAMED_AT_MOST]]
        more = f", and {len(self._reasons) - len(named)} more" if len(self._reasons) > len(named) else ""
        warnings.warn(
            f"skipped {self._count()} that cannot be read: {', '.join(named)}{more}",
            UnreadableImagesWarning,
            stacklevel=2,
        )

    def close(self) -> None:
        """Warn if that has not happened yet, and report the count if it has grown since."""
        self.warn()
        if len(self._reasons) > self._told:
            self._told = len(self._reasons)
            _log.warning("in total, %s skipped that cannot be read", self._count())

    def _count(self) -> str:
        return f"{len(self._reasons)} image{'' if len(self._reasons) == 1 else 's'}"
