"""Digest records of the AdvMoE reference as cases of our networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.published import translate_config
from gatewise.catalog.registry import registered_config
from gatewise.fidelity.case import Case, Cases
from gatewise.networks.image.advmoe import (
    AdvMoEConfig,
    DenseNetMoE,
    DenseNetMoEConfig,
    ExpertConv2d,
    ResNetMoE,
    ResNetMoEConfig,
    RoutedNetwork,
    Router,
    VGGMoE,
    VGGMoEConfig,
    WideResNetMoE,
    WideResNetMoEConfig,
    dense_layouts,
    layouts,
    official_layout,
    vgg_layouts,
    wide_layouts,
)
from gatewise.ops.expert_conv import route_to_experts, to_experts, to_images


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of a ResNet, of the router only, or of one convolution with experts."""
    if "num_experts" in record["config"]:
        return router_case(record["config"])
    if "kernel_size" in record["config"]:
        return conv_case(record["config"])
    defaults = dict(DEFAULTS)
    if "conv1.weight" in record["keys"]:
        # The sources differ on the stem of thin dense networks; the weights decide.
        defaults["scale_stem"] = record["keys"]["conv1.weight"][0] != 64
    return network_case(record, ResNetMoE, ResNetMoEConfig, layouts, defaults)


def dense_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of a DenseNet."""
    # The recorded networks with experts ignore the ratio, which their layers do not have.
    ignored = ("ratio",) if str(record["config"].get("arch", record["variant"])).endswith("_moe") else ()
    return network_case(record, DenseNetMoE, DenseNetMoEConfig, dense_layouts, {"n_expert": 2, "ratio": 1.0}, ignored)


def wide_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of a WideResNet."""
    return network_case(record, WideResNetMoE, WideResNetMoEConfig, wide_layouts, DEFAULTS)


def vgg_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of a VGG."""
    return network_case(record, VGGMoE, VGGMoEConfig, vgg_layouts, DEFAULTS)


DEFAULTS: dict[str, Any] = {"n_expert": 5, "ratio": 1.0}
"""Defaults of the published constructors, except DenseNet's."""


def run_reference(network: Any, image: Tensor, scores: Tensor) -> dict[str, Tensor]:
    """Return what digests of whole networks hold: outputs for the router's own scores and for given ones."""
    return {
        "logits": network(image),
        "router_scores": network.scores(image),
        "logits_given_scores": network(image, scores),
    }


def network_case(
    record: Mapping[str, Any],
    network: Callable[[Any], RoutedNetwork],
    config: type[AdvMoEConfig],
    layout_of: Callable[[Any], list[KeyLayout]],
    defaults: Mapping[str, Any],
    ignored: tuple[str, ...] = (),
) -> Case | None:
    """Return a case for a digest of a whole network with this backbone; None if the record is of another.

    Args:
        defaults: arguments of the published constructors that the record does not state.
        ignored: arguments of theirs that change nothing.
    """
    reference = dict(record["config"])
    arch = reference.pop("arch", record["variant"])
    base = registered_config(arch)
    if not isinstance(base, config):
        return None
    fields = translate_config(reference, config, ignored=ignored)
    if fields is None:
        return None
    experts = {"n_expert": 1} if base.n_expert == 1 else {}
    chosen: Any = replace(base, **{**defaults, **fields, **experts})
    routed = "scores" in record["inputs"]
    return Case(network(chosen), layout_of(chosen)[0], run=run_reference if routed else RoutedNetwork.forward)


def router_case(reference: Mapping[str, Any]) -> Case:
    """Return a case for the router only."""
    return Case(Router(reference["num_experts"]), official_layout(()), prefix="router.")


def conv_case(reference: Mapping[str, Any]) -> Case | None:
    """Return a case for one convolution with experts."""
    fields = translate_config(reference, ExpertConv2d, {"in_channels": "in_dim", "out_channels": "dim"})
    layout = KeyLayout("official", (("^conv", "^"),))
    return Case(ExpertConv2d(**fields), layout, run=run_unsorted) if fields is not None else None


def run_unsorted(conv: nn.Module, x: Tensor, scores: Tensor) -> Tensor:
    """Run a single convolution with experts on images in any order."""
    routing = route_to_experts(scores)
    return to_images(conv(to_experts(x, routing), routing), routing)


CASES: Cases = {
    "advmoe": (
        reference_case,
        dense_case,
        wide_case,
        vgg_case,
    )
}
