"""Digest records of the Inception-v4 reference as cases of our networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from gatewise.catalog.keys import KeyLayout, Rule
from gatewise.catalog.registry import registered_config
from gatewise.fidelity.case import Case, Cases
from gatewise.networks.image.inceptionv4 import C_RULES, COMMON, layouts


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of a network or of one of its modules."""
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
    # The reference builds its classifier whenever a number of classes is given, and uses it only to classify.
    classes = config.get("num_classes") or 0
    network = Inception(replace(base, num_classes=classes, drop_rate=config.get("dropout_prob", 0.6)))
    layout = layouts(network.config)[0]
    return Case(network, layout) if config.get("classify") else Case(network, layout, run=_embedding)


def _embedding(network: Any, x: Tensor) -> Tensor:
    import torch.nn.functional as F

    features = network.forward_features(x).mean(dim=(2, 3))
    return F.normalize(network.embed_norm(network.embed(features)), dim=1)


def _module_case(config: Mapping[str, Any]) -> Case | None:
    """Return the module with this name in the reference's code, taken from a network of ours that holds it."""
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
        "InceptionC": C_RULES,
        "Mixed3a": (("^conv", "^branches.1"),),
        "Mixed5a": (("^conv", "^branches.0"),),
    }.get(config["cls"], ())
    return Case(module, KeyLayout("official", (*COMMON, *own)))


CASES: Cases = {"inceptionv4": (reference_case,)}
