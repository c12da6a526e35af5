"""Model cards: the facts needed to choose a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gatewise.catalog.papers import paper as paper_entry
from gatewise.catalog.registry import Weights, family_of
from gatewise.efficiency.cost.count import count
from gatewise.efficiency.inputs import sample_input


@dataclass(frozen=True)
class ModelCard:
    """Paper, task, size, cost and weights of a registered network. MACs are multiply-accumulates at `input_size`.

    `num_classes` is None if the network does not classify.
    """

    name: str
    paper: str
    paper_title: str
    arxiv: str | None
    task: str
    parameters: int
    macs: int
    input_size: tuple[int, ...]
    num_classes: int | None
    weights: Weights | None


def model_card(name: str) -> ModelCard:
    """Return the card of a registered network: paper, task, parameters, MACs, input, weights' license, reported score.

    The network is built without storage, so nothing is allocated.

    Raises:
        UnknownNameError: if the name is unknown. The message suggests the closest one.
    """
    family = family_of(name)
    variant = family.variants[name]
    entry = paper_entry(family.paper)
    with torch.device("meta"):
        network = family.network(variant.config).eval()
    cost = count(network, sample_input(network, variant.input_size))
    return ModelCard(
        name=name,
        paper=family.paper,
        paper_title=entry.title,
        arxiv=entry.arxiv,
        task=_task(variant.config, variant.input_size),
        parameters=cost.parameters,
        macs=cost.macs,
        input_size=variant.input_size,
        num_classes=getattr(variant.config, "num_classes", None),
        weights=variant.weights,
    )


def _task(config: Any, input_size: tuple[int, ...]) -> str:
    if hasattr(config, "vocab_size"):
        return f"language modeling, {config.vocab_size} tokens"
    what = "image" if len(input_size) == 3 else "video"
    if not config.num_classes:
        return f"{what} features"
    per_pixel = getattr(config, "per_pixel", False)
    return f"{what} {'segmentation' if per_pixel else 'classification'}, {config.num_classes} classes"
