"""Digest records of the HorNet reference as cases of our networks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.published import translate_config
from gatewise.catalog.registry import registered_config
from gatewise.fidelity.case import Case, Cases, Tap, unchanged
from gatewise.layers.gnconv import GlobalLocalFilter, GnConv, GnConvNormAct, Grid
from gatewise.networks.image.hornet import GNCONV_RULES, OFFICIAL, HorNet, HorNetBlock, HorNetConfig


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of the network, a backbone, a block, a gnConv, its filter or its unit."""
    config = record["config"]
    if "dim" in config and "gnconv" in config:
        return _block_case(config)
    if "dim" in config or "in_channels" in config:
        return part_case(record)
    fields = network_fields(config, HorNetConfig)
    if fields is None:
        return None
    is_dense = "detection" in record["source"] or "segmentation" in record["source"]
    if is_dense:
        fields |= {"num_classes": 0, "pyramid_norm": True}
    network = HorNet(replace(registered_config(record["variant"]) or HorNetConfig(), **fields))
    run = HorNet.forward_pyramid if is_dense else HorNet.forward
    return Case(network, OFFICIAL, run=run, tap=partial(tap, network.config.depths))


def _block_case(config: Mapping[str, Any]) -> Case | None:
    rest = {key: value for key, value in config.items() if key not in ("dim", "gnconv")}
    one_stage = {"base_dim": config["dim"], "depths": [1], "gnconv": [config["gnconv"]]}
    fields = network_fields({**rest, **one_stage}, HorNetConfig)
    if fields is None:
        return None
    return Case(HorNetBlock(HorNetConfig(out_indices=(0,), **fields), stage=0), OFFICIAL, "stages.0.0.")


_PART = KeyLayout("official part", (*GNCONV_RULES, ("^bn", "norm")))
"""Layout of a standalone gnConv, with or without norm."""

_FILTERS = {"global_local": True, "GlobalLocalFilter": True, "gngf": True, "gnconv": False, "7x7": False, None: False}
"""The reference's spatial operators, and whether each is the global-local filter."""

_NORMS: dict[str | None, Callable[[int], nn.Module] | None] = {None: None, "BN": nn.BatchNorm2d}

_ACTS: dict[str | None, Callable[[], nn.Module] | None] = {None: None, "ReLU": nn.ReLU}

_RENAMED = {"layer_scale_init_value": "layer_scale_init", "drop_path": "drop_path_rate"}

_WITHOUT_EFFECT = ("block", "pretrained", "use_checkpoint", "init_cfg")

_UNIT_RENAMED = {
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "dim_ratio": "width_ratio",
    "proj_out": "project_out",
}


def network_fields(reference: Mapping[str, Any], target: Callable[..., Any]) -> dict[str, Any] | None:
    """Convert the reference network's hyper-parameters to fields of `target`; None if they describe something else.

    Args:
        target: our configuration class.
    """
    plain = {key: value for key, value in reference.items() if key not in ("base_dim", "gnconv")}
    fields = translate_config(plain, target, _RENAMED, _WITHOUT_EFFECT)
    stages = [_gnconv_fields(stage) for stage in reference.get("gnconv", ())]
    if fields is None or None in stages:
        return None
    if "base_dim" in reference:
        count = len(reference["depths"]) if "depths" in reference else 4
        fields["embed_dims"] = tuple(reference["base_dim"] * 2**i for i in range(count))
    if stages:
        fields |= _by_stage([stage for stage in stages if stage is not None])
    if "layer_scale_init" in fields and (fields["layer_scale_init"] or 0) <= 0:
        fields["layer_scale_init"] = None
    return fields


def _by_stage(stages: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    names = {"order": "orders", "scale": "gate_scale", "grid": "grids"}
    return {ours: tuple(stage[name] for stage in stages) for name, ours in names.items()}


def part_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of a gnConv, of its filter, or of the unit that necks and heads use."""
    reference = record["config"]
    if "in_channels" in reference:
        return _unit_case(record)
    if "complex_weight" in record["keys"]:
        return Case(GlobalLocalFilter(reference["dim"], _grid(reference)), _PART, "dwconv.")
    fields = _gnconv_fields({key: value for key, value in reference.items() if key != "dim"})
    return Case(GnConv(reference["dim"], **fields), _PART) if fields is not None else None


def _gnconv_fields(reference: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return order, scale and grid of the reference's gnConv; None for options that it does not have."""
    spatial = reference.get("filter")
    if spatial not in _FILTERS or not set(reference) <= {"order", "s", "h", "w", "filter"}:
        return None
    grid = _grid(reference) if _FILTERS[spatial] else None
    return {"order": reference.get("order", 5), "scale": reference.get("s", 1.0), "grid": grid}


def _unit_case(record: Mapping[str, Any]) -> Case | None:
    reference = record["config"]
    own = ("type", "h", "w", "norm_cfg", "act_cfg")
    fields = translate_config({k: v for k, v in reference.items() if k not in own}, GnConvNormAct, _UNIT_RENAMED)
    kind, norm, act = reference.get("type"), _name(reference.get("norm_cfg")), _name(reference.get("act_cfg"))
    if fields is None or kind not in _FILTERS or norm not in _NORMS or act not in _ACTS:
        return None
    # Its keys tell what the record does not say about the last projection.
    fields.setdefault("project_out", "proj_out.weight" in record["keys"])
    grid = _grid(reference, (32, 17)) if _FILTERS[kind] else None
    return Case(GnConvNormAct(**fields, grid=grid, norm=_NORMS[norm], act=_ACTS[act]), _PART)


def _grid(reference: Mapping[str, Any], default: Grid = (14, 8)) -> Grid:
    return reference.get("h", default[0]), reference.get("w", default[1])


def _name(config: Any) -> str | None:
    """Return the name of a part that is configured by its name, or by a mapping with its name as `type`."""
    return config["type"] if isinstance(config, Mapping) else config


def tap(depths: Sequence[int], path: str) -> Tap:
    """Return our module for a path of theirs. Their stage is a called module; ours corresponds to its last block."""
    ours = OFFICIAL.to_ours(path)
    if stage := re.fullmatch(r"stages\.(\d+)", ours):
        ours += f".blocks.{depths[int(stage[1])] - 1}"
    return ours, unchanged


CASES: Cases = {"hornet": (reference_case,)}
