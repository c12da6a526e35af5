"""Key layouts of the published Inception weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from gatewise.catalog.keys import KeyLayout, Rule

if TYPE_CHECKING:
    from gatewise.networks.image.inceptionv4.network import InceptionConfig

COMMON: tuple[Rule, ...] = (("bn", "norm"), ("conv2d", "project"), ("branch{i}", "branches.{i}"))

C_RULES: tuple[Rule, ...] = (
    ("branch1_0", "branches.1.0"),
    ("branch1_1a", "branches.1.1.0"),
    ("branch1_1b", "branches.1.1.1"),
    ("branch2_0", "branches.2.0"),
    ("branch2_1", "branches.2.1"),
    ("branch2_2", "branches.2.2"),
    ("branch2_3a", "branches.2.3.0"),
    ("branch2_3b", "branches.2.3.1"),
)
"""The last modules of Inception-v4, whose branches end in forks."""

_RESNET_NAMES: dict[str, tuple[tuple[str, int], ...]] = {
    "resnet_v2": (
        ("conv2d_1a", 0),
        ("conv2d_2a", 1),
        ("conv2d_2b", 2),
        ("conv2d_3b", 4),
        ("conv2d_4a", 5),
        ("mixed_5b", 7),
        ("repeat", 8),
        ("mixed_6a", 9),
        ("repeat_1", 10),
        ("mixed_7a", 11),
        ("repeat_2", 12),
        ("block8", 13),
        ("conv2d_7b", 14),
    ),
    "resnet_v1_face": (
        ("conv2d_1a", 0),
        ("conv2d_2a", 1),
        ("conv2d_2b", 2),
        ("conv2d_3b", 4),
        ("conv2d_4a", 5),
        ("conv2d_4b", 6),
        ("repeat_1", 7),
        ("mixed_6a", 8),
        ("repeat_2", 9),
        ("mixed_7a", 10),
        ("repeat_3", 11),
        ("block8", 12),
    ),
}


def layouts(config: InceptionConfig) -> list[KeyLayout]:
    """Return the layouts of timm, Cadene's ports and facenet-pytorch. The paper's own forms have no weights."""
    if config.architecture == "v4":
        rules = _v4_rules(config)
        # timm adopted Cadene's names; Cadene's file has an extra first class, the background.
        return [KeyLayout("official", (*rules, ("^last_linear", "head")), unpack=_drop_background(config))]
    if config.architecture not in _RESNET_NAMES:
        return [KeyLayout("official")]
    resnet_rules: list[Rule] = [
        *COMMON,
        *((f"^{name}", f"stages.{index}") for name, index in _RESNET_NAMES[config.architecture]),
    ]
    if config.architecture == "resnet_v2":
        cadene = KeyLayout("cadene", (*resnet_rules, ("^last_linear", "head")), unpack=_drop_background(config))
        return [KeyLayout("official", (*resnet_rules, ("^classif", "head"))), cadene]
    resnet_rules += [("^last_linear", "embed"), ("^last_bn", "embed_norm"), ("^logits", "head")]
    # The released files always hold the classifier of their training set.
    dropped = None if config.num_classes else r"logits\..*"
    return [KeyLayout("official", tuple(resnet_rules), dropped=dropped)]


def _v4_rules(config: InceptionConfig) -> tuple[Rule, ...]:
    last = sum(config.depths) + 7
    forks = [
        (f"^features.{index}.{theirs}", f"^stages.{index}.{ours}")
        for index in range(last - config.depths[2] + 1, last + 1)
        for theirs, ours in C_RULES
    ]
    # Rules for single modules come after the general ones, so that they apply first in reverse.
    return (
        ("bn", "norm"),
        ("branch{i}", "branches.{i}"),
        ("^features.{i}", "stages.{i}"),
        ("^stages.3.conv", "^stages.3.branches.1"),
        ("^stages.5.conv", "^stages.5.branches.0"),
        *((theirs.replace("^features", "^stages"), ours) for theirs, ours in forks),
    )


def _drop_background(config: InceptionConfig) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def drop(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            key: tensor[1:] if key.startswith("head.") and len(tensor) == config.num_classes + 1 else tensor
            for key, tensor in state.items()
        }

    return drop
