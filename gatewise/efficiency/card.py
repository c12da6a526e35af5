"""A network's card: what one wants to know before choosing it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gatewise.catalog.papers import paper as paper_entry
from gatewise.catalog.registry import Weights, family_of
from gatewise.efficiency.count import count


@dataclass(frozen=True)
class ModelCard:
    """Paper, task, size, cost and weights of a registered network. MACs are multiply-accumulates at `input_size`."""

    name: str
    paper: str
    paper_title: str
    arxiv: str | None
    task: str
    parameters: int
    macs: int
    input_size: tuple[int, int, int]
    num_classes: int
    weights: Weights | None


def model_card(name: str) -> ModelCard:
    """The card of a registered network: paper, task, parameters, MACs, input, licence of the weights, reported score.

    Nothing is allocated: the network is built without storage.

    Raises:
        UnknownNameError: if there is no such name; suggests the closest.
    """
    family = family_of(name)
    variant = family.variants[name]
    entry = paper_entry(family.paper)
    with torch.device("meta"):
        network = family.network(variant.config).eval()
        cost = count(network, torch.empty(1, *variant.input_size))
    classes = variant.config.num_classes
    return ModelCard(
        name=name,
        paper=family.paper,
        paper_title=entry.title,
        arxiv=entry.arxiv,
        task=f"image classification, {classes} classes" if classes else "image features",
        parameters=cost.parameters,
        macs=cost.macs,
        input_size=variant.input_size,
        num_classes=classes,
        weights=variant.weights,
    )
