"""The description in a training checkpoint, checked field by field because anyone may have written it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gatewise.catalog.values import require_strided
from gatewise.data import data_class
from gatewise.data.images.base import ImageData
from gatewise.data.text.tokenizers import Tokenizer, restore_tokenizer
from gatewise.errors import CheckpointError, UserError
from gatewise.tasks.reading import parse_recipe
from gatewise.tasks.recipe import Recipe

_LARGEST_SIDE = 2**24
"""Largest number of pixels or tokens along one axis of a sample."""


@dataclass(frozen=True)
class Description:
    """Checked fields of a description; see `gatewise.tasks.trained.Trained`."""

    recipe: Recipe
    input_size: tuple[int, ...]
    class_names: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tokenizer: Tokenizer | None


def parse_description(about: Any, path: str) -> Description:
    """Return the checked description of a training checkpoint.

    Args:
        about: value under the checkpoint's key `gatewise`.
        path: file name for error messages.
    Raises:
        CheckpointError: if a field is missing or wrong. The message names it, what was expected and what was given.
    """
    fields = _Fields(path, about)
    try:
        recipe = parse_recipe(fields.plain_mapping("recipe"))
    except UserError as error:
        raise CheckpointError(f"{path} is refused, because of the recipe in it: {error}") from error
    images = issubclass(data_class(recipe.data.name), ImageData)
    size = fields.sizes("input_size", 3 if images else 1)
    tokenizer = None
    if "tokenizer" in fields:
        tokenizer = fields.tokenizer()
    elif recipe.data.name == "text":
        raise fields.wrong("tokenizer", "a description of the tokenizer", None)
    return Description(
        recipe=recipe,
        input_size=size,
        class_names=fields.texts("class_names") if images else [],
        mean=fields.numbers("mean", size[0]) if images else (),
        std=fields.numbers("std", size[0], above=0.0) if images else (),
        tokenizer=tokenizer,
    )


def network_state(content: Mapping[str, Any], path: str) -> dict[str, Tensor]:
    """Return the network's weights in a training checkpoint, the averaged ones if there are any.

    Raises:
        CheckpointError: if they are missing or not tensors by name.
    """
    name = "state_dict_ema" if "state_dict_ema" in content else "state_dict"
    state = content.get(name)
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(f"{path} is refused: {name} must be tensors by name, not {_shown(state)}")
    found = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    require_strided(found, path)
    return found


class _Fields:
    """Fields of a mapping, each read with its required type."""

    def __init__(self, path: str, content: Any) -> None:
        self._path = path
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{path} is refused: its gatewise must be fields by name, not {_shown(content)}")
        self._content = content

    def __contains__(self, name: str) -> bool:
        return name in self._content

    def wrong(self, name: str, expected: str, came: Any) -> CheckpointError:
        """Return the error for a wrong field."""
        return CheckpointError(f"{self._path} is refused: its gatewise.{name} must be {expected}, not {_shown(came)}")

    def plain_mapping(self, name: str) -> Mapping[str, Any]:
        """Return a field that must be nested sections of numbers, strings and lists."""
        value = self._content.get(name)
        if not isinstance(value, Mapping):
            raise self.wrong(name, "sections by name", value)
        self._require_plain(name, value)
        return value

    def _require_plain(self, name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                if not isinstance(key, str):
                    raise self.wrong(name, "fields whose names are texts", key)
                self._require_plain(f"{name}.{key}", inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                self._require_plain(name, inner)
        elif value is not None and not isinstance(value, str | int | float | bool):
            raise self.wrong(name, "a number, a text, a list or a section", value)

    def sizes(self, name: str, count: int) -> tuple[int, ...]:
        """Return a field that must be `count` positive integers."""
        value = self._content.get(name)
        if (
            not isinstance(value, list | tuple)
            or len(value) != count
            or not all(type(size) is int and 1 <= size <= _LARGEST_SIDE for size in value)
        ):
            raise self.wrong(name, f"{count} positive integer{'s' * (count > 1)}", value)
        return tuple(value)

    def numbers(self, name: str, count: int, above: float = -math.inf) -> tuple[float, ...]:
        """Return a field that must be `count` finite numbers above a bound."""
        value = self._content.get(name)
        if (
            not isinstance(value, list | tuple)
            or len(value) != count
            or not all(type(number) in (int, float) and math.isfinite(number) and number > above for number in value)
        ):
            rule = "" if above == -math.inf else f" above {above:g}"
            raise self.wrong(name, f"{count} finite number{'s' * (count > 1)}{rule}, one per channel", value)
        return tuple(map(float, value))

    def texts(self, name: str) -> list[str]:
        """Return a field that must be a list of strings."""
        value = self._content.get(name)
        if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
            raise self.wrong(name, "a list of texts", value)
        return list(value)

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that the description contains."""
        value = self._content.get("tokenizer")
        if not isinstance(value, Mapping) or value.get("kind") not in ("bytes", "huggingface"):
            raise self.wrong("tokenizer", "a description of kind 'bytes' or 'huggingface'", value)
        if value["kind"] == "huggingface":
            for name in ("content", "end_of_text"):
                if not isinstance(value.get(name), str):
                    raise self.wrong(f"tokenizer.{name}", "a text", value.get(name))
        try:
            return restore_tokenizer(value)
        except UserError as error:
            raise CheckpointError(f"{self._path} is refused, because of the tokenizer in it: {error}") from error


def _shown(value: Any) -> str:
    """Return a value as short text for a message, without formatting large values in full."""
    if isinstance(value, Tensor):
        return "a tensor"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple) and not all(isinstance(part, str | int | float | None) for part in value[:8]):
        return f"a {type(value).__name__}"
    text = repr(list(value[:8]) if isinstance(value, list | tuple) else value[:80] if isinstance(value, str) else value)
    return " ".join(text.split())[:100]
