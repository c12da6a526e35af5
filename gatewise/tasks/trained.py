"""A trained network from its checkpoint alone.

Under the key `gatewise` a checkpoint carries its recipe, the network's configuration and what the data told: the names
of the classes and how images were prepared, or the tokenizer. That is all that evaluating, predicting and exporting
need besides the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import gatewise
from gatewise.catalog.checkpoint import load_checkpoint, read_checkpoint
from gatewise.data._module import DataModule
from gatewise.data.tokenizers import Tokenizer, restore_tokenizer
from gatewise.errors import CheckpointError
from gatewise.methods import find_method
from gatewise.tasks.recipe import Recipe, parse_recipe, plain
from gatewise.tasks.schema import method_arguments


@dataclass(frozen=True)
class Trained:
    """A network as training left it, in eval mode, and what its data told.

    Attributes:
        input_size: shape of a sample that it was validated with: (C, H, W) of images, (T,) of sequences.
        class_names: what a classifier tells apart; else empty.
        mean, std: per channel, for images from 0 to 1; else empty.
        tokenizer: of text; else None.
    """

    model: nn.Module
    recipe: Recipe
    input_size: tuple[int, ...]
    class_names: list[str] = field(default_factory=list)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    tokenizer: Tokenizer | None = None


def describe(recipe: Recipe, model: nn.Module, data: DataModule) -> dict[str, Any]:
    """What a checkpoint says about itself; plain data, so that it can be read without running code."""
    config: Any = model.config
    return {
        "version": gatewise.__version__,
        "model": recipe.model.name,
        "config": plain(asdict(config)),
        "recipe": recipe.to_dict(),
        **data.describe(),
    }


def _network_state(content: Mapping[str, Any]) -> dict[str, Tensor]:
    state = content.get("state_dict_ema", content["state_dict"])
    return {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}


def build_model(recipe: Recipe) -> nn.Module:
    """The recipe's network, with fresh weights or those that it starts from, and its transforms applied."""
    model: nn.Module = gatewise.create_model(
        recipe.model.name, pretrained=recipe.model.pretrained, **recipe.model.fields
    )
    if recipe.model.checkpoint is not None:
        load_checkpoint(model, recipe.model.checkpoint, replace_head=recipe.model.replace_head)
    for method, fields in methods_of_kind(recipe, "transform"):
        model = method(model, **fields)
    return model


def methods_of_kind(recipe: Recipe, kind: str) -> list[tuple[Any, Mapping[str, Any]]]:
    """What builds each of the recipe's methods of one kind, and its keyword arguments."""
    found = [(find_method(part.name), part.fields) for part in recipe.methods]
    return [(method.build, method_arguments(method, fields)) for method, fields in found if method.kind == kind]


def load_trained(path: str | Path) -> Trained:
    """The network of a training checkpoint (`best.ckpt`, `last.ckpt`); averaged weights where there are some.

    Raises:
        CheckpointError: if the file cannot be read, or was not written by `gatewise train`.
    """
    content = read_checkpoint(path)
    about = content.get("gatewise") if isinstance(content, Mapping) else None
    if about is None:
        raise CheckpointError(
            f"{path} does not say which network it is of: it was not written by `gatewise train`; "
            "create the network by name and use gatewise.load_checkpoint"
        )
    recipe = parse_recipe(about["recipe"])
    model = build_model(recipe.without_start())
    try:
        model.load_state_dict(_network_state(content))
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit its own network: {' '.join(str(error).split())}") from error
    return Trained(
        model=model.eval(),
        recipe=recipe,
        input_size=tuple(about["input_size"]),
        class_names=about.get("class_names", []),
        mean=tuple(about.get("mean", ())),
        std=tuple(about.get("std", ())),
        tokenizer=restore_tokenizer(about["tokenizer"]) if "tokenizer" in about else None,
    )
