"""What a worker hands over: a batch, and the images that it could not read (named once, counted at the end)."""

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
    """A batch on its way from a worker, with the errors of the images that could not be read for it."""

    images: Tensor
    labels: Tensor
    unreadable: list[UnreadableImageError]


class UnreadableImagesWarning(UserWarning):
    """Some images cannot be read and are skipped; the message names them."""


class UnreadableImages:
    """What the loaders of one data module came across, kept in the process that trains.

    Whether a file decodes is found out when it is read. Looking at every file beforehand would decode ImageNet once
    more than training does, hours before the first step, and looking at headers alone misses truncated files.
    """

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}
        self._warned = False
        self._told = 0

    @property
    def names(self) -> list[str]:
        """The images found so far, sorted."""
        return sorted(self._reasons)

    def unwrap(self, loaded: Loaded | UserError) -> Batch:
        """The batch, images (B, C, H, W) and labels (B,), its errors taken note of.

        Raises:
            UserError: if the worker handed over one instead of a batch.
        """
        if isinstance(loaded, UserError):
            raise loaded
        for error in loaded.unreadable:
            self._reasons[error.name] = error.reason
        return loaded.images, loaded.labels

    def warn(self) -> None:
        """Name what was found so far, the first time that there is something."""
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
        """Warn if that has not happened, and tell the count if it has grown since it was told."""
        self.warn()
        if len(self._reasons) > self._told:
            self._told = len(self._reasons)
            _log.warning("in total, %s skipped that cannot be read", self._count())

    def _count(self) -> str:
        return f"{len(self._reasons)} image{'' if len(self._reasons) == 1 else 's'}"
