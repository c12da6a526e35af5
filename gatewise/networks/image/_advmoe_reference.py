"""How digests of AdvMoE's published code, and its weights, map to the networks here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout, Rule
from gatewise.catalog.reference import Case, translate_config
from gatewise.catalog.registry import registered_config
from gatewise.networks.image.advmoe_routed import AdvMoEConfig, ExpertConv2d, RoutedNetwork, Router
from gatewise.ops.expert_conv import route_to_experts, to_experts, to_images

ROUTER_RULES: tuple[Rule, ...] = (
    ("^router.conv1", "^router.stem.conv"),
    ("^router.bn1", "^router.stem.norm"),
    ("^router.layer{i+1}.{j}.conv{k+1}", "^router.stages.{i}.{j}.units.{k}.conv"),
    ("^router.layer{i+1}.{j}.bn{k+1}", "^router.stages.{i}.{j}.units.{k}.norm"),
)


def official_layout(rules: tuple[Rule, ...]) -> KeyLayout:
    """The published files. They repeat the router under every convolution with experts; it is read once."""
    return KeyLayout("official", (*ROUTER_RULES, *rules), dropped=r".+\.router\..*")


DEFAULTS: dict[str, Any] = {"n_expert": 5, "ratio": 1.0}
"""Of the published constructors, but for DenseNet's."""


def run_reference(network: Any, image: Tensor, scores: Tensor) -> dict[str, Tensor]:
    """What the digests of whole networks hold: outputs by the router's own scores and by given ones."""
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
    """A case for a digest of a whole network of one backbone; None if the record is of another.

    Args:
        defaults: what the published constructors take where the record does not say.
        ignored: their arguments that change nothing.
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
    """The router alone."""
    return Case(Router(reference["num_experts"]), official_layout(()), prefix="router.")


def conv_case(reference: Mapping[str, Any]) -> Case | None:
    """One convolution with experts."""
    fields = translate_config(reference, ExpertConv2d, {"in_channels": "in_dim", "out_channels": "dim"})
    layout = KeyLayout("official", (("^conv", "^"),))
    return Case(ExpertConv2d(**fields), layout, run=run_unsorted) if fields is not None else None


def run_unsorted(conv: nn.Module, x: Tensor, scores: Tensor) -> Tensor:
    """A convolution with experts alone, on images in any order."""
    routing = route_to_experts(scores)
    return to_images(conv(to_experts(x, routing), routing), routing)
