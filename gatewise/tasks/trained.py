"""Loading a trained network from nothing but its checkpoint.

Under the key `gatewise` a checkpoint carries its recipe, the network's configuration and facts about the data: class
names and image preparation, or the tokenizer. Together with the weights, that is all that evaluation, prediction and
export need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gatewise
from gatewise.catalog.checkpoint import load_checkpoint, read_checkpoint
from gatewise.catalog.values import named, require_finite, require_kinds
from gatewise.data.module import DataModule
from gatewise.data.text.tokenizers import Tokenizer
from gatewise.errors import CheckpointError
from gatewise.methods import find_method
from gatewise.tasks._description import Description, network_state, parse_description
from gatewise.tasks.recipe import Recipe, plain
from gatewise.tasks.schema import method_arguments


@dataclass(frozen=True)
class Trained:
    """Trained network in eval mode, and facts about its data.

    Attributes:
        input_size: shape of a validation sample: (C, H, W) for images, (T,) for sequences.
        class_names: class names of a classifier; else empty.
        mean, std: normalization per channel for images in [0, 1]; else empty.
        tokenizer: tokenizer of a language model of text; else None.
    """

    model: nn.Module
    recipe: Recipe
    input_size: tuple[int, ...]
    class_names: list[str] = field(default_factory=list)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    tokenizer: Tokenizer | None = None


def describe(recipe: Recipe, model: nn.Module, data: DataModule) -> dict[str, Any]:
    """Return the description in a checkpoint, as plain data, so that it can be read without running code."""
    config: Any = model.config
    return {
        "version": gatewise.__version__,
        "model": recipe.model.name,
        "config": plain(asdict(config)),
        "recipe": recipe.to_dict(),
        **data.describe(),
    }


def build_model(recipe: Recipe) -> nn.Module:
    """Return the network of the recipe with new or loaded initial weights, and with its transforms applied."""
    model: nn.Module = gatewise.create_model(
        recipe.model.name, pretrained=recipe.model.pretrained, **recipe.model.fields
    )
    if recipe.model.checkpoint is not None:
        load_checkpoint(model, recipe.model.checkpoint, replace_head=recipe.model.replace_head)
    for method, fields in methods_of_kind(recipe, "transform"):
        model = method(model, **fields)
    return model


def methods_of_kind(recipe: Recipe, kind: str) -> list[tuple[Any, Mapping[str, Any]]]:
    """Return the builder and the keyword arguments of each of the recipe's methods of one kind."""
    found = [(find_method(part.name), part.fields) for part in recipe.methods]
    return [(method.build, method_arguments(method, fields)) for method, fields in found if method.kind == kind]


def load_trained(path: str | Path, *, allow_nonfinite: bool = False) -> Trained:
    """Load the network of a training checkpoint (`best.ckpt`, `last.ckpt`), with averaged weights if there are any.

    Files, folders and URLs that the checkpoint names are not opened.

    Args:
        path: path of the checkpoint.
        allow_nonfinite: accept weights with NaN or infinity, as a diverged run leaves them.
    Raises:
        CheckpointError: if the file cannot be read, was not written by `gatewise train`, or has a wrong field in its
            description. The message names the field.
    """
    content = read_checkpoint(path)
    about = content.get("gatewise") if isinstance(content, Mapping) else None
    if about is None:
        raise CheckpointError(
            f"{path} does not describe its network, so it was not written by `gatewise train`; "
            "create the network by name and use gatewise.load_checkpoint"
        )
    description = parse_description(about, str(path))
    state = network_state(content, str(path))
    recipe = description.recipe.without_start()
    _require_fitting(recipe, state, str(path))
    model = build_model(recipe)
    _check_outputs(model, description, str(path))
    require_kinds(state, model.state_dict(), str(path))
    if not allow_nonfinite:
        require_finite(state, str(path))
    model.load_state_dict(state)
    return Trained(
        model=model.eval(),
        recipe=description.recipe,
        input_size=description.input_size,
        class_names=description.class_names,
        mean=description.mean,
        std=description.std,
        tokenizer=description.tokenizer,
    )


def _require_fitting(recipe: Recipe, state: Mapping[str, Tensor], path: str) -> None:
    """Reject weights that do not fit the recipe's network, before memory is allocated for it."""
    try:
        with torch.device("meta"):
            wanted = build_model(recipe).state_dict()
    # Sizes in the recipe are arbitrary. Networks and methods check most of them, PyTorch the rest.
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
        raise CheckpointError(
            f"{path} is refused, because the recipe in it describes a network that cannot be built: "
            f"{' '.join(str(error).split()) or type(error).__name__}"
        ) from error
    problems = {
        "missing": [key for key in wanted if key not in state],
        "unknown": [key for key in state if key not in wanted],
        "of another shape": [key for key in wanted if key in state and state[key].shape != wanted[key].shape],
    }
    told = "; ".join(f"{title}: {named(keys)}" for title, keys in problems.items() if keys)
    if told:
        raise CheckpointError(f"{path} does not fit its own network ({told})")


def _check_outputs(model: nn.Module, description: Description, path: str) -> None:
    config: Any = model.config
    names, tokenizer = description.class_names, description.tokenizer
    if getattr(config, "num_classes", 0) and len(names) != config.num_classes:
        raise CheckpointError(
            f"{path} is refused: its gatewise.class_names has {len(names)} names, and the network {config.num_classes} "
            "classes"
        )
    if hasattr(config, "in_chans") and description.input_size[0] != config.in_chans:
        raise CheckpointError(
            f"{path} is refused: its gatewise.input_size has {description.input_size[0]} channels, and the network "
            f"{config.in_chans}"
        )
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path} is refused: its gatewise.tokenizer has {tokenizer.vocab_size} tokens, and the network "
            f"{config.vocab_size}"
        )
