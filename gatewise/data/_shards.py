"""Shards of the WebDataset format: tar files whose neighbouring members with one stem are a sample."""

from __future__ import annotations

import glob
import tarfile
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from gatewise.data._module import optional_module
from gatewise.data.images import read_image
from gatewise.errors import UserError

# The files of a sample by extension, with `__key__` (its stem) and `__url__` (its shard).
Sample: TypeAlias = dict[str, Any]


class SampleReader:
    """Finds image and label in a sample.

    Raises:
        UserError: when called, if one is missing or the label is no class.
        UnreadableImageError: when called, if the image cannot be decoded.
    """

    def __init__(self, image_keys: Sequence[str], label_key: str, num_classes: int) -> None:
        self._image_keys = tuple(image_keys)
        self._label_key = label_key
        self._num_classes = num_classes

    def __call__(self, sample: Sample) -> tuple[Image.Image, int]:
        name = f"{sample['__url__']}:{sample['__key__']}"
        has = ", ".join(key for key in sample if not key.startswith("__"))
        image_key = next((key for key in self._image_keys if key in sample), None)
        if image_key is None:
            raise UserError(f"sample {name} has none of {', '.join(self._image_keys)}, only {has}; set image_keys")
        if self._label_key not in sample:
            raise UserError(f"sample {name} has no {self._label_key}, only {has}; set label_key")
        try:
            label = int(sample[self._label_key])
        except ValueError as error:
            raise UserError(f"the {self._label_key} of sample {name} is no integer in digits; set label_key") from error
        if not 0 <= label < self._num_classes:
            raise UserError(f"sample {name} has label {label}, but there are {self._num_classes} classes, from 0")
        return read_image(sample[image_key], f"{name}.{image_key}"), label


class Lookahead:
    """An iterator without end that can be looked into."""

    def __init__(self, samples: Iterator[Sample]) -> None:
        self._samples = samples
        self._seen: deque[Sample] = deque()

    def peek(self, steps: int) -> Sample:
        """What comes after `steps` others."""
        while len(self._seen) <= steps:
            self._seen.append(next(self._samples))
        return self._seen[steps]

    def skip(self, steps: int) -> None:
        """Go past so many."""
        for _ in range(steps):
            self.peek(0)
            self._seen.popleft()


def expand_shards(shards: str | Sequence[str]) -> list[str]:
    """Every shard that the patterns stand for, in order.

    Raises:
        UserError: if a pattern is malformed or stands for nothing, a local shard is missing, or one is a command.
    """
    braceexpand = optional_module("braceexpand")
    found: list[str] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        try:
            names = list(braceexpand.braceexpand(pattern))
        except ValueError as error:
            raise UserError(f"shard pattern {pattern!r} has unbalanced braces") from error
        for name in names:
            _require_known_scheme(name)
            found += sorted(glob.glob(name)) if is_local(name) and "*" in name else [name]
    if not found:
        raise UserError(f"no shards match {shards!r}")
    missing = [name for name in found if is_local(name) and not Path(name).is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {len(found)} shards are missing, the first: {missing[0]}")
    return found


def shard_samples(shard: str) -> Iterator[Sample]:
    """The samples of one shard, undecoded.

    Raises:
        UserError: if it cannot be read to its end.
    """
    try:
        yield from optional_module("webdataset").tarfile_samples(iter([{"url": shard}]))
    except (OSError, ValueError, EOFError, tarfile.TarError, zlib.error) as error:
        raise _unreadable(shard, error) from error


def count_samples(shard: str) -> int:
    """How many samples a local shard holds, from its headers.

    Raises:
        UserError: if it is no tar file.
    """
    split = optional_module("webdataset").tariterators.base_plus_ext
    samples, previous = 0, None
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                stem, _ = split(member.name)
                if member.isreg() and stem is not None and not member.name.startswith("__"):
                    samples += stem != previous
                    previous = stem
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise _unreadable(shard, error) from error
    return samples


def is_local(shard: str) -> bool:
    """Whether a shard is a path, not a URL."""
    return ":" not in shard.split("/", 1)[0]


def _unreadable(shard: str, error: Exception) -> UserError:
    # tarfile lists on further lines what each kind of compression says.
    reason = str(error.args[0]).splitlines()[0].rstrip(":") if error.args else type(error).__name__
    return UserError(f"shard {shard} cannot be read ({reason}); replace it or take it out")


def _require_known_scheme(shard: str) -> None:
    if is_local(shard):
        return
    scheme = shard.split(":", 1)[0]
    if scheme == "pipe":
        raise UserError(f"shard {shard!r} is a shell command, and those are not run; name a path or a URL")
    known = sorted(set(optional_module("webdataset").gopen_schemes) - {"__default__", "pipe"})
    if scheme not in known:
        raise UserError(f"shard {shard!r} has an unknown scheme; expected a path, or one of {', '.join(known)}")
