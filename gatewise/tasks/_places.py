"""Places that a checkpoint's recipe names: files, folders, URLs and names on the hub.

A recipe is the user's, and what it names is read. A checkpoint may come from anywhere, so that a place in it is used
only if the user's own words say the same: the `recipe.yaml` that training wrote beside it, a field that is set
explicitly, or a general permission.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from gatewise.errors import CheckpointError, UserError
from gatewise.tasks.reading import load_recipe
from gatewise.tasks.recipe import Part, Recipe

PLACES: dict[str, tuple[str, ...]] = {
    "digits": (),
    "fashion": ("root",),
    "hf": ("path", "cache_dir"),
    "image_folder": ("root",),
    "mqar": (),
    "text": ("root", "pattern", "val_pattern", "test_pattern", "tokenizer", "cache_dir"),
    "webdataset": ("train_shards", "val_shards", "test_shards"),
}
"""Fields of each kind of data whose values lead somewhere."""

_PATTERNS = ("pattern", "val_pattern", "test_pattern")
_UNUSED = "unused"


def without_places(recipe: Recipe) -> Recipe:
    """Return a recipe of images with data that lead nowhere; it still tells how images are prepared."""
    needed = () if recipe.data.name == "fashion" else ("path", "root", "train_shards", "val_shards")
    named = PLACES[recipe.data.name]
    changed: dict[str, Any] = {name: _UNUSED if name in needed else None for name in named}
    if "download" in recipe.data.fields:
        changed["download"] = False
    return replace(recipe, data=Part(recipe.data.name, {**recipe.data.fields, **changed}))


def trusted_places(path: str | Path, recipe: Recipe, given: Collection[str], trust: bool) -> Recipe:
    """Return a checkpoint's recipe with those places of its data that may be used.

    The cache folder of a checkpoint from elsewhere becomes the default one, and its tokenizer is the one that the
    checkpoint carries.

    Args:
        path: the checkpoint.
        recipe: what it says.
        given: names of fields that the user has set, such as "data.root".
        trust: whether to use all places.
    Raises:
        CheckpointError: lists the places that nobody but the checkpoint names, and says how to go on.
    """
    if _is_written_beside(path, recipe):
        return recipe
    own: dict[str, Any] = {"cache_dir": None, "tokenizer": "bytes", "end_of_text": None}
    known = recipe.data.fields
    fields = {name: own.get(name, value) if name in known else value for name, value in known.items()}
    foreign = {
        f"data.{name}": fields[name]
        for name in PLACES[recipe.data.name]
        if name not in own and f"data.{name}" not in given and _leads_somewhere(name, fields.get(name))
    }
    if foreign and not trust:
        listed = ", ".join(f"{name}={value!r}"[:200] for name, value in foreign.items())
        raise CheckpointError(
            f"{path} names places that no recipe.yaml beside it confirms: {listed}; set your own "
            f"(--set {next(iter(foreign))}=...), or add --trust-paths (in Python trust_paths=True) to use these"
        )
    return replace(recipe, data=Part(recipe.data.name, fields))


def _leads_somewhere(name: str, value: Any) -> bool:
    if name in _PATTERNS:
        # A pattern chooses among the files of a folder, unless it leaves it.
        return value is not None and (".." in Path(value).parts or value.startswith(("/", "~")))
    return value is not None


def _is_written_beside(path: str | Path, recipe: Recipe) -> bool:
    """Whether the folder's recipe has the same data section."""
    beside = Path(path).expanduser().with_name("recipe.yaml")
    if not beside.is_file():
        return False
    try:
        return load_recipe(beside).to_dict()["data"] == recipe.to_dict()["data"]
    except UserError:
        # A recipe that cannot be read confirms nothing; the message says that none does.
        return False
