"""Shards in WebDataset format: tar files in which adjacent members with one stem form a sample."""

from __future__ import annotations

import glob
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from PIL import Image

from gatewise.data.images.reading import read_image
from gatewise.data.images.remote import is_local as is_local
from gatewise.data.images.remote import remote_stream, require_fetchable
from gatewise.data.images.tar import DamagedTarError, Member, Readable, read_members
from gatewise.data.module import optional_module
from gatewise.errors import UserError
from gatewise.files import require_regular

MOST_SHARDS = 1_000_000
"""Largest number of shards that a pattern may match."""

_DEEPEST_BRACES = 20
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?", re.ASCII)
# Enough digits for any label; Python refuses to convert thousands.
_INTEGER = re.compile(rb"[+-]?\d{1,18}")
# Members that the WebDataset format reserves for metadata of the shard.
_ABOUT_THE_SHARD = re.compile(r"__[^/]*__(/|$)")

# Files of a sample by extension, with `__key__` (its stem) and `__url__` (its shard).
Sample: TypeAlias = dict[str, Any]


class SampleReader:
    """Extract image and label from a sample.

    Raises:
        UserError: when called, if one is missing or the label is not a class.
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
        digits = sample[self._label_key].strip()
        if not _INTEGER.fullmatch(digits):
            raise UserError(f"the {self._label_key} of sample {name} is not a decimal integer; set label_key")
        label = int(digits)
        if not 0 <= label < self._num_classes:
            raise UserError(f"sample {name} has label {label}, but there are {self._num_classes} classes, from 0")
        return read_image(sample[image_key], f"{name}.{image_key}"), label


class Lookahead:
    """Infinite iterator with lookahead."""

    def __init__(self, samples: Iterator[Sample]) -> None:
        self._samples = samples
        self._seen: deque[Sample] = deque()

    def peek(self, steps: int) -> Sample:
        """Return the element after `steps` others, without consuming any."""
        while len(self._seen) <= steps:
            self._seen.append(next(self._samples))
        return self._seen[steps]

    def skip(self, steps: int) -> None:
        """Skip this many elements."""
        for _ in range(steps):
            self.peek(0)
            self._seen.popleft()


def expand_shards(shards: str | Sequence[str]) -> list[str]:
    """Return all shards that the patterns match, in order: paths, and URLs with supported schemes.

    Matches of `*` are paths, whatever their names look like.

    Raises:
        UserError: if a pattern is malformed or matches nothing or too much, a local shard is missing, or one is a
            command.
    """
    found: list[str] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        for name in _expanded(pattern):
            require_fetchable(name)
            if is_local(name) and "*" in name:
                found += [path if is_local(path) else f"./{path}" for path in sorted(glob.glob(name))]
            else:
                found.append(name)
    if not found:
        raise UserError(f"no shards match {shards!r}")
    missing = [name for name in found if is_local(name) and not os.path.isfile(name)]
    if missing:
        raise UserError(f"{len(missing)} of {len(found)} shards are missing, the first: {missing[0]}")
    return found


def shard_samples(shard: str) -> Iterator[Sample]:
    """Yield the samples of one shard, undecoded.

    Raises:
        UserError: if it cannot be read to its end or is damaged. The message says how many samples came before.
    """
    return _samples(shard, contents=True)


def count_samples(shard: str) -> int:
    """Return the number of samples in a local shard, counted from its headers.

    Raises:
        UserError: if it is not a complete tar archive.
    """
    return sum(1 for _ in _samples(shard, contents=False))


def _samples(shard: str, contents: bool) -> Iterator[Sample]:
    count = 0
    try:
        with _opened(shard) as (stream, size):
            for sample in _grouped(shard, read_members(stream, size, contents=contents)):
                yield sample
                count += 1
    except DamagedTarError as error:
        after = f"after {count} sample{'' if count == 1 else 's'}"
        raise UserError(f"shard {shard} cannot be read ({error}, {after}); replace it or take it out") from error


@contextmanager
def _opened(shard: str) -> Iterator[tuple[Readable, int | None]]:
    """Open a shard and return its byte stream, and its size if it is a file."""
    if not is_local(shard):
        with remote_stream(shard) as stream:
            yield stream, None
        return
    # Absolute, because a leading tilde is part of the name here.
    path = require_regular(os.path.abspath(shard), "shard")
    try:
        file = path.open("rb")
    except OSError as error:
        raise DamagedTarError(error.strerror or str(error)) from error
    with file:
        yield file, os.fstat(file.fileno()).st_size


def _grouped(shard: str, members: Iterator[Member]) -> Iterator[Sample]:
    """Group adjacent members with one stem into samples."""
    split = optional_module("webdataset").tariterators.base_plus_ext
    sample: Sample | None = None
    for name, content in members:
        stem, extension = split(name)
        if stem is None or _ABOUT_THE_SHARD.match(name):
            continue
        if sample is None or sample["__key__"] != stem:
            if sample is not None:
                yield sample
            sample = {"__key__": stem, "__url__": shard}
        if extension.lower() in sample:
            raise DamagedTarError(f"sample {stem!r} has {extension!r} twice")
        sample[extension.lower()] = content
    if sample is not None:
        yield sample


def _expanded(pattern: str) -> list[str]:
    if _count_expanded(pattern) > MOST_SHARDS:
        raise UserError(f"shard pattern {pattern!r} stands for more than {MOST_SHARDS:,} shards")
    try:
        return list(optional_module("braceexpand").braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"shard pattern {pattern!r} has unbalanced braces") from error


def _count_expanded(pattern: str) -> int:
    """Return the number of names that the braces of a pattern expand to, without expanding them."""
    # For each open brace: its position, the number of alternatives before the last comma, and the number since.
    opened: list[list[int]] = [[0, 0, 1]]
    position = 0
    while position < len(pattern):
        character = pattern[position]
        if character == "\\":
            position += 1
        elif character == "{":
            opened.append([position + 1, 0, 1])
            if len(opened) > _DEEPEST_BRACES:
                raise UserError(f"shard pattern {pattern[:80]!r} has more than {_DEEPEST_BRACES} braces in each other")
        elif character == "," and len(opened) > 1:
            opened[-1][1] += opened[-1][2]
            opened[-1][2] = 1
        elif character == "}" and len(opened) > 1:
            start, before, last = opened.pop()
            opened[-1][2] *= _range_size(pattern[start:position]) or before + last
        position += 1
    return opened[0][2]


def _range_size(content: str) -> int | None:
    """Return how many numbers "0..99" or "0..99..5" expands to, or None if the text is not such a range."""
    found = _RANGE.fullmatch(content)
    if found is None:
        return None
    if max(map(len, found.groups(""))) > 18:
        return MOST_SHARDS + 1
    low, high, step = int(found[1]), int(found[2]), int(found[3] or 1) or 1
    return abs(high - low) // step + 1
