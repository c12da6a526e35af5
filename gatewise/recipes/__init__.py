"""Recipes that come with the package: a YAML file per recipe, in a folder per paper.

The name of a recipe is its path without the suffix, such as `focalnet/finetune`. `gatewise recipes` lists them.
Importing this module imports neither torch nor Lightning.
"""

from __future__ import annotations

from pathlib import Path

from gatewise.errors import UserError, unknown_name

_FOLDER = Path(__file__).parent
_ENDINGS = (".yaml", ".yml")


def list_recipes() -> list[str]:
    """Return the names of the recipes in the package, sorted."""
    return sorted(path.relative_to(_FOLDER).with_suffix("").as_posix() for path in _FOLDER.rglob("*.yaml"))


def find_recipe(recipe: str | Path) -> Path:
    """Return the path of a recipe.

    Args:
        recipe: path of a YAML file, or name of a recipe in the package. An existing file takes precedence.
    Raises:
        UnknownNameError: if there is neither such a file nor such a name. The message suggests the closest name.
        UserError: if there is no such file, although its suffix is that of a path.
    """
    path = Path(recipe)
    # Anything that exists, even a folder or a FIFO, is left to the reader to check.
    if _exists(path):
        return path
    known = list_recipes()
    if str(recipe) in known:
        return _FOLDER / f"{recipe}.yaml"
    if path.suffix in _ENDINGS:
        raise UserError(
            f"no recipe at {str(path)!r}: expected a YAML file, or one of the names that `gatewise recipes` lists"
        )
    raise unknown_name("recipe", str(recipe), known)


def summary_of(name: str) -> str:
    """Return the first line of the comment at the head of a recipe in the package."""
    with find_recipe(name).open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()


def _exists(path: Path) -> bool:
    try:
        return path.expanduser().exists()
    # A name with byte 0, a name that is too long, a missing home.
    except (OSError, ValueError, RuntimeError):
        return True
