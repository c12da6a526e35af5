"""Published names of the Inception networks' weights, and how to run the reference's digests on our modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gatewise.catalog.keys import KeyLayout, Rule
from gatewise.catalog.reference import Case
from gatewise.catalog.registry import registered_config

if TYPE_CHECKING:
    from gatewise.networks.image.inceptionv4 import Builder, InceptionConfig

_COMMON: tuple[Rule, ...] = (("bn", "norm"), ("conv2d", "project"), ("branch{i}", "branches.{i}"))

_C_RULES: tuple[Rule, ...] = (
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
    """The layouts of timm and of Cadene's ports, and of facenet-pytorch; the paper's own forms have no weights."""
    if config.architecture == "v4":
        rules = _v4_rules(config)
        # timm took Cadene's names over; his file has one class more, the background in front.
        return [KeyLayout("official", (*rules, ("^last_linear", "head")), unpack=_drop_background(config))]
    if config.architecture not in _RESNET_NAMES:
        return [KeyLayout("official")]
    resnet_rules: list[Rule] = [
        *_COMMON,
        *((f"^{name}", f"stages.{index}") for name, index in _RESNET_NAMES[config.architecture]),
    ]
    if config.architecture == "resnet_v2":
        cadene = KeyLayout("cadene", (*resnet_rules, ("^last_linear", "head")), unpack=_drop_background(config))
        return [KeyLayout("official", (*resnet_rules, ("^classif", "head"))), cadene]
    resnet_rules += [("^last_linear", "embed"), ("^last_bn", "embed_norm"), ("^logits", "head")]
    # The released files hold the classifier of their training set, whatever they are used for.
    dropped = None if config.num_classes else r"logits\..*"
    return [KeyLayout("official", tuple(resnet_rules), dropped=dropped)]


def _v4_rules(config: InceptionConfig) -> tuple[Rule, ...]:
    last = sum(config.depths) + 7
    forks = [
        (f"^features.{index}.{theirs}", f"^stages.{index}.{ours}")
        for index in range(last - config.depths[2] + 1, last + 1)
        for theirs, ours in _C_RULES
    ]
    # Rules about single modules stand behind those about all, so that they act first on the way back.
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


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """A case for a digest of a network or of one of its modules."""
    from gatewise.networks.image.inceptionv4 import Inception

    config = record["config"]
    if "cls" in config:
        return _module_case(config)
    if "facenet" in record["source"]:
        return _face_case(config)
    if "factory" not in config:
        return None
    base: Any = registered_config(config["factory"])
    if base is None or set(config) - {"factory", "num_classes", "in_chans", "drop_rate"}:
        return None
    fields = {name: value for name, value in config.items() if name != "factory"}
    network = Inception(replace(base, **fields))
    return Case(network, layouts(network.config)[0])


def _face_case(config: Mapping[str, Any]) -> Case | None:
    from gatewise.networks.image.inceptionv4 import Inception

    if set(config) - {"classify", "num_classes", "dropout_prob", "pretrained", "device"}:
        return None
    base: Any = registered_config("inception_resnet_v1_face")
    # The reference has its classifier whenever it is told a number of classes, and uses it only to classify.
    classes = config.get("num_classes") or 0
    network = Inception(replace(base, num_classes=classes, drop_rate=config.get("dropout_prob", 0.6)))
    layout = layouts(network.config)[0]
    return Case(network, layout) if config.get("classify") else Case(network, layout, run=_embedding)


def _embedding(network: Any, x: Tensor) -> Tensor:
    import torch.nn.functional as F

    features = network.forward_features(x).mean(dim=(2, 3))
    return F.normalize(network.embed_norm(network.embed(features)), dim=1)


def _module_case(config: Mapping[str, Any]) -> Case | None:
    """The module of this name in the reference's code, out of a network of ours that holds it."""
    from gatewise.networks.image.inceptionv4 import ARCHITECTURES, Builder, InceptionConfig

    places: dict[str, tuple[str, int, int]] = {
        "Mixed3a": ("v4", 3, 0),
        "Mixed4a": ("v4", 4, 0),
        "Mixed5a": ("v4", 5, 0),
        "InceptionA": ("v4", 6, 0),
        "ReductionA": ("v4", 7, 0),
        "InceptionB": ("v4", 8, 0),
        "ReductionB": ("v4", 9, 0),
        "InceptionC": ("v4", 10, 0),
        "Mixed_5b": ("resnet_v2", 7, 0),
        "Block35": ("resnet_v2", 8, 1),
        "Mixed_6a": ("resnet_v2", 9, 0),
        "Block17": ("resnet_v2", 10, 1),
        "Mixed_7a": ("resnet_v2", 11, 0),
        "Block8": ("resnet_v2", 12, 1),
    }
    found = places.get(config["cls"])
    if found is None or set(config) - {"cls", "scale", "no_relu"}:
        return None
    architecture, index, is_residual = found
    build: Builder = Builder(InceptionConfig())
    ARCHITECTURES[architecture](build, InceptionConfig(architecture=architecture, depths=(1, 1, 1)))  # type: ignore[arg-type]
    module: Any = build.modules[index]
    if is_residual:
        module = module[0]
        module.branch_scale = config.get("scale", 1.0)
        module.act = not config.get("no_relu", False)
    own: tuple[Rule, ...] = {
        "InceptionC": _C_RULES,
        "Mixed3a": (("^conv", "^branches.1"),),
        "Mixed5a": (("^conv", "^branches.0"),),
    }.get(config["cls"], ())
    return Case(module, KeyLayout("official", (*_COMMON, *own)))
