"""What a kind of file offers to the harness."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from gatewise.errors import Failure, UserError


@dataclass(frozen=True)
class Case:
    """A damaged file and how it is read.

    Attributes:
        what: which file, and how it was damaged.
        read: reads it; returns "same" or "changed", or raises.
    """

    what: str
    read: Callable[[], str]


class Kind(ABC):
    """A kind of file.

    Attributes:
        name: the name on the command line.
        weight: share of the cases.
        refusals: exceptions by which a damaged file may be refused.
    """

    name: ClassVar[str]
    weight: ClassVar[float] = 1.0
    refusals: ClassVar[tuple[type[BaseException], ...]] = (UserError, Failure)

    def __init__(self, corpus: Path) -> None:
        self.corpus = corpus / type(self).__name__

    @classmethod
    @abstractmethod
    def prepare(cls, folder: Path) -> None:
        """Write good files into an empty folder."""

    @abstractmethod
    def case(self, rng: random.Random, folder: Path) -> Case:
        """Write a damaged file into an empty folder."""


TINY_MODEL = {
    "name": "focalnet_tiny_srf",
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1],
    "focal_levels": [1, 1],
    "focal_windows": [3, 3],
}


def tiny_model(**fields: Any) -> Any:
    """Return a small classifier of 3-channel images in eval mode, the same each time."""
    import torch

    import gatewise

    chosen = {"num_classes": 5, **TINY_MODEL, **fields}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return gatewise.create_model(chosen.pop("name"), **chosen).eval()
