"""Key layouts: two-way maps between the key names of published checkpoints and of this library.

A rule is a pair (theirs, ours) of dotted templates. It replaces a run of whole segments anywhere in a key. `{i}` stands
for a number, `{i+1}` for that number plus one, and a leading `^` ties the rule to the start of the key:

    ("layers.{i}", "stages.{i}")
    ("stages.{i+1}.downsample", "stages.{i}.downsample")

Rules apply in order from theirs to ours, and in reverse order back, so one table serves loading and saving. A rule
about a whole (a stage, a block) therefore comes before the rules about its parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_PLACEHOLDER = re.compile(r"\{(?P<name>[a-z])(?P<offset>[+-]\d+)?\}")

Rule = tuple[str, str]


@dataclass(frozen=True)
class KeyLayout:
    """One published naming of a family's weights.

    Args:
        name: name for users ("official", "timm", "torchvision").
        rules: (theirs, ours) templates.
        dropped: regular expression for those of their keys that hold nothing we keep.
        tensor_to_ours: function of (their key, tensor) that maps tensors whose axes are stored in another order.
        tensor_to_theirs: inverse of `tensor_to_ours`.
        unpack: function of all tensors, under our names, for layouts that store several of our tensors as one.
        pack: inverse of `unpack`; without it, the layout is written as if it had no `unpack`.
        separator: separator between the segments of their keys.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    dropped: str | None = None
    tensor_to_ours: Callable[[str, Tensor], Tensor] | None = None
    tensor_to_theirs: Callable[[str, Tensor], Tensor] | None = None
    unpack: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    pack: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    separator: str = "."

    def to_ours(self, key: str) -> str:
        """Return our name for their key or module path."""
        key = key.replace(self.separator, ".")
        for theirs, ours in self.rules:
            key = _substitute(key, theirs, ours)
        return key

    def to_theirs(self, key: str) -> str:
        """Return their name for our key or module path."""
        for theirs, ours in reversed(self.rules):
            key = _substitute(key, ours, theirs)
        return key.replace(".", self.separator)

    def drops(self, key: str) -> bool:
        """Return whether their key is dropped on purpose."""
        return self.dropped is not None and re.fullmatch(self.dropped, key) is not None


def as_pointwise(keys: str) -> Callable[[str, Tensor], Tensor]:
    """Return a `tensor_to_theirs` that writes linear layers whose keys match a pattern as 1x1 convolutions.

    Reading needs no counterpart, since the shapes tell.
    """
    return lambda key, tensor: tensor[:, :, None, None] if re.fullmatch(keys, key) else tensor


@cache
def _pattern(template: str) -> tuple[re.Pattern[str], tuple[tuple[str, int], ...]]:
    offsets = []
    body = ""
    position = 0
    text = template.removeprefix("^")
    for placeholder in _PLACEHOLDER.finditer(text):
        body += re.escape(text[position : placeholder.start()]) + rf"(?P<{placeholder['name']}>\d+)"
        offsets.append((placeholder["name"], int(placeholder["offset"] or 0)))
        position = placeholder.end()
    body += re.escape(text[position:])
    start = "^" if template.startswith("^") else r"(?:(?<=\.)|^)"
    return re.compile(rf"{start}{body}(?=\.|$)"), tuple(offsets)


def _substitute(key: str, source: str, target: str) -> str:
    pattern, offsets = _pattern(source)
    match = pattern.search(key)
    if match is None:
        return key
    values = {name: int(match[name]) - offset for name, offset in offsets}
    if min(values.values(), default=0) < 0:
        return key
    written = _PLACEHOLDER.sub(lambda p: str(values[p["name"]] + int(p["offset"] or 0)), target.removeprefix("^"))
    # A template that only adds or removes a prefix leaves one side empty.
    return (key[: match.start()] + written + key[match.end() :]).strip(".").replace("..", ".")
