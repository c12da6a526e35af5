"""Places that a checkpoint's recipe names: files, folders, URLs and hub names.

A recipe is the user's own, so the places it names are read. A checkpoint may come from anywhere, so a place in it is
used only if the user confirms it: by the `recipe.yaml` that training wrote beside it, by setting the field explicitly,
or by a general permission.
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
"""Fields of each kind of data that name places."""

_PATTERNS = ("pattern", "val_pattern", "test_pattern")
_UNUSED = "unused"


def without_places(recipe: Recipe) -> Recipe:
    """Return an image recipe with its data places removed; it still defines how images are prepared."""
    needed = () if recipe.data.name == "fashion" else ("path", "root", "train_shards", "val_shards")
    named = PLACES[recipe.data.name]
    changed: dict[str, Any] = {name: _UNUSED if name in needed else None for name in named}
    if "download" in recipe.data.fields:
        changed["download"] = False
    return replace(recipe, data=Part(recipe.data.name, {**recipe.data.fields, **changed}))


def trusted_places(path: str | Path, recipe: Recipe, given: Collection[str], trust: bool) -> Recipe:
    """Return a checkpoint's recipe with only those data places that may be used.

    For a checkpoint from elsewhere, the cache folder becomes the default one, and the tokenizer is the one in the
    checkpoint.

    Args:
        path: path of the checkpoint.
        recipe: recipe in the checkpoint.
        given: names of fields that the user has set, such as "data.root".
        trust: whether to use all places.
    Raises:
        CheckpointError: if only the checkpoint names a place. The message lists these places and the ways to proceed.
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
        # A pattern selects files inside a folder, unless it leads out of the folder.
        return value is not None and (".." in Path(value).parts or value.startswith(("/", "~")))
    return value is not None


def _is_written_beside(path: str | Path, recipe: Recipe) -> bool:
    """Return whether the recipe.yaml beside the checkpoint has the same data section."""
    beside = Path(path).expanduser().with_name("recipe.yaml")
    if not beside.is_file():
        return False
    try:
        return load_recipe(beside).to_dict()["data"] == recipe.to_dict()["data"]
    except UserError:
        # An unreadable recipe confirms nothing, and the error message says that none does.
        return False
