"""Opening the network and data that a user names by checkpoint, recipe or network name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gatewise.catalog.registry import IMAGENET_MEAN, IMAGENET_STD, family_of
from gatewise.data import data_class
from gatewise.data.images.base import ImageData
from gatewise.data.images.transforms import ImageTransform
from gatewise.data.module import DataModule
from gatewise.data.text.text import Text
from gatewise.errors import CheckpointError, UserError
from gatewise.recipes import list_recipes
from gatewise.tasks._places import trusted_places, without_places
from gatewise.tasks.reading import load_recipe, parse_recipe
from gatewise.tasks.recipe import Recipe, deep_set
from gatewise.tasks.schema import default_task
from gatewise.tasks.trained import Trained, build_model, load_trained
from gatewise.tasks.training import build_data, with_data


def open_source(
    source: str | None = None,
    *,
    checkpoint: str | Path | None = None,
    weights: str | None = None,
    pretrained: bool = False,
    assignments: Sequence[str] = (),
    trust_paths: bool = False,
) -> tuple[nn.Module, DataModule]:
    """Return a network with weights, and a data module that has not read anything yet.

    Args:
        source: registered name, or name or path of a recipe.
        checkpoint: checkpoint that `gatewise train` wrote, instead of a source.
        weights: weights to load into a source.
        pretrained: load the published weights of a registered name.
        assignments: recipe fields to override, such as "data.root=/data/flowers".
        trust_paths: use the files, folders, URLs and hub names in a checkpoint's data section even if no
            `recipe.yaml` beside it confirms them.
    Raises:
        UserError: if not exactly one of `source` and `checkpoint` is given, or there are no weights.
        CheckpointError: if a checkpoint names places that are not trusted. The message lists them.
    """
    if (source is None) == (checkpoint is None):
        raise UserError("name either a MODEL or RECIPE.yaml, or --checkpoint F")
    fields = dict(parse_assignment(text) for text in assignments)
    if checkpoint is not None:
        if weights is not None or pretrained:
            raise UserError("--checkpoint brings its own weights; leave out --weights and --pretrained")
        return _of_checkpoint(checkpoint, fields, trust_paths)
    assert source is not None
    if Path(source).suffix in (".yaml", ".yml") or source in list_recipes():
        return _of_recipe(source, weights, fields)
    return _of_model(source, weights, pretrained, fields)


def image_preparation(trained: Trained) -> ImageTransform:
    """Return the validation transform of a trained classifier, without opening any file.

    Raises:
        CheckpointError: if the checkpoint's recipe prepares images in an unknown way.
    """
    try:
        data = build_data(without_places(trained.recipe))
    except UserError as error:
        raise CheckpointError(f"the data section of the checkpoint's recipe is refused: {error}") from error
    assert isinstance(data, ImageData)
    return data.transform_for_eval()


def _of_checkpoint(path: str | Path, fields: Mapping[str, str], trust_paths: bool) -> tuple[nn.Module, DataModule]:
    trained = load_trained(path)
    same_data = fields.get("data.name", trained.recipe.data.name) == trained.recipe.data.name
    recipe = trusted_places(path, trained.recipe, fields, trust_paths) if same_data else trained.recipe
    content = recipe.to_dict()
    if not same_data:
        shape = _sample_fields(trained.input_size)
        preparation = {**shape, "mean": list(trained.mean), "std": list(trained.std)}
        content["data"] = _prepared_data(fields["data.name"], preparation)
        content["task"] = {"name": default_task(fields["data.name"])}
    data = build_data(_replaced(content, fields))
    if isinstance(data, Text) and trained.tokenizer is not None:
        data.tokenizer = trained.tokenizer
    return trained.model, data


def _of_recipe(path: str, weights: str | None, fields: Mapping[str, str]) -> tuple[nn.Module, DataModule]:
    recipe = load_recipe(path, {**fields, **({} if weights is None else {"model.checkpoint": weights})})
    if recipe.model.checkpoint is None and not recipe.model.pretrained:
        raise UserError(f"{path} names no weights to evaluate: add --weights F, or evaluate the --checkpoint of a run")
    data = build_data(recipe)
    data.prepare_data()
    data.setup("test")
    return build_model(with_data(recipe, data)), data


def _of_model(
    name: str, weights: str | None, pretrained: bool, fields: Mapping[str, str]
) -> tuple[nn.Module, DataModule]:
    variant = family_of(name).variants[name]
    if pretrained == (weights is not None):
        raise UserError(f"say which weights of {name} to evaluate: either --weights F or --pretrained")
    if "data.name" not in fields:
        raise UserError("say what to evaluate on, such as --set data.name=image_folder data.root=FOLDER")
    published = variant.weights
    preparation = {
        **_sample_fields(variant.input_size),
        "mean": list(published.mean if published else IMAGENET_MEAN),
        "std": list(published.std if published else IMAGENET_STD),
    }
    if published is not None:
        preparation["evaluation"] = {"crop_pct": published.crop_pct, "interpolation": published.interpolation}
    network = {"name": name, "pretrained": pretrained, "checkpoint": weights}
    recipe = _replaced({"model": network, "data": _prepared_data(fields["data.name"], preparation)}, fields)
    return build_model(recipe), build_data(recipe)


def _sample_fields(input_size: tuple[int, ...]) -> dict[str, Any]:
    """Return the fields of a data section that produce samples of this shape."""
    return {"image_size": list(input_size[1:])} if len(input_size) == 3 else {"context": input_size[0]}


def _prepared_data(name: str, preparation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data section for `name`, with the preparation fields that its data module accepts."""
    taken = inspect.signature(data_class(name)).parameters
    return {"name": name, **{key: value for key, value in preparation.items() if key in taken}}


def _replaced(content: dict[str, Any], fields: Mapping[str, str]) -> Recipe:
    for name, value in fields.items():
        deep_set(content, name, value)
    return parse_recipe(content)


def parse_assignment(text: str) -> tuple[str, str]:
    """Split a command-line assignment such as "data.root=/data/flowers" into field and value.

    Raises:
        UserError: if the text is not of that form.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set takes FIELD=VALUE, such as data.root=/data/flowers, not {text!r}")
    return name, value
