"""Digest records of the UniRepLKNet reference as cases of our networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from gatewise.catalog.published import translate_config
from gatewise.catalog.registry import registered_config
from gatewise.fidelity.case import Case, Cases
from gatewise.layers.dilated_reparam import DilatedReparam
from gatewise.networks.image.unireplknet import BRANCHES, OFFICIAL, UniRepLKNet, UniRepLKNetBlock, UniRepLKNetConfig

_RENAMED = {
    "dims": "embed_dims",
    "channels": "dim",
    "ffn_factor": "mlp_ratio",
    "drop_path": "drop_path_rate",
    "layer_scale_init_value": "layer_scale_init",
}

_WITHOUT_EFFECT = (
    "with_cp",
    "init_cfg",
    "attempt_use_lk_impl",
    "use_sync_bn",
    "custom_set",
    "disable_iGEMM",
)


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of the network in either form, a block, or only the re-parameterized convolution."""
    reference = {key: value for key, value in record["config"].items() if key not in _WITHOUT_EFFECT}
    if (reference.get("layer_scale_init_value") or 0) <= 0 and "layer_scale_init_value" in reference:
        reference["layer_scale_init_value"] = None
    if "channels" in reference:
        fields = translate_config(reference, DilatedReparam, _RENAMED)
        return _part(DilatedReparam, {"table": BRANCHES} | fields, "dwconv.") if fields is not None else None
    if "dim" in reference:
        fields = translate_config(reference, UniRepLKNetBlock, _RENAMED)
        return _part(UniRepLKNetBlock, fields, "") if fields is not None else None
    return _network_case(record, reference)


def _part(module: type[nn.Module], fields: dict[str, Any], place: str) -> Case:
    return Case(module(**fields), OFFICIAL, f"stages.0.0.{place}")


def _network_case(record: Mapping[str, Any], reference: dict[str, Any]) -> Case | None:
    dense = "num_classes" in reference and reference["num_classes"] is None
    if dense:
        reference |= {"num_classes": 0, "pyramid_norm": True}
    if reference.get("kernel_sizes") is not None:
        reference["kernel_sizes"] = tuple(map(tuple, reference["kernel_sizes"]))
    fields = translate_config(reference, UniRepLKNetConfig, _RENAMED)
    if fields is None:
        return None
    base = registered_config(record["variant"]) or UniRepLKNetConfig()
    network = UniRepLKNet(replace(base, **fields))
    return Case(network, OFFICIAL, run=UniRepLKNet.forward_pyramid) if dense else Case(network, OFFICIAL)


CASES: Cases = {"unireplknet": (reference_case,)}
