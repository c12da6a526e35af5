"""Reading recipes from files or memory, with every field checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gatewise.errors import UserError
from gatewise.files import parse_yaml, read_text
from gatewise.recipes import find_recipe
from gatewise.tasks.recipe import Recipe, deep_set
from gatewise.tasks.schema import resolve


def load_recipe(
    recipe: str | Path, overrides: Mapping[str, Any] | None = None, arguments: Sequence[str] = ()
) -> Recipe:
    """Read a recipe file and check every field, without building or starting anything.

    Args:
        recipe: path of a YAML file, or name of a recipe in the package, such as "focalnet/finetune".
        overrides: values by dotted name, such as {"optim.lr": 1e-3}, which override the file.
        arguments: command-line words, such as ["--optim.lr", "1e-3"], which override both.
    Raises:
        UserError: if a field is unknown, missing or of the wrong type. The message names the field and the rule.
    """
    path = find_recipe(recipe)
    content = _read(path)
    content.setdefault("output", f"runs/{path.stem}")
    for name, value in (overrides or {}).items():
        deep_set(content, name, value)
    return parse_recipe(content, arguments)


def parse_recipe(content: Mapping[str, Any], arguments: Sequence[str] = ()) -> Recipe:
    """Check a recipe that is already in memory, as `load_recipe` does for a file."""
    return resolve(content, arguments)


def _read(path: Path) -> dict[str, Any]:
    content = parse_yaml(read_text(path, "recipe"), f"recipe {str(path)!r}")
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold sections such as model: and data:, not {type(content).__name__}")
    return content
