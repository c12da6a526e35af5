"""Names of published HorNet weights, and the published constructors' arguments in our terms."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from gatewise.catalog.keys import KeyLayout, Rule
from gatewise.catalog.reference import Case, Path, translate_config, unchanged
from gatewise.layers.gnconv import GlobalLocalFilter, GnConv, GnConvNormAct, Grid

_GNCONV_RULES: tuple[Rule, ...] = (
    ("proj_in", "project_in"),
    ("proj_out", "project_out"),
    ("pws.{m}", "widen.{m}"),
    ("dwconv", "spatial"),
    ("spatial.dw", "spatial.local"),
    ("spatial.complex_weight", "spatial.spectrum"),
)

OFFICIAL = KeyLayout(
    "official",
    (
        ("^downsample_layers.0", "stem"),
        ("^stem.0", "stem.conv"),
        ("^stem.1", "stem.norm"),
        ("^downsample_layers.{i}", "stages.{i}.downsample"),
        ("downsample.0", "downsample.norm"),
        ("downsample.1", "downsample.conv"),
        ("^norm{i}", "level_norms.{i}"),
        ("^stages.{i}.{j}", "stages.{i}.blocks.{j}"),
        ("blocks.{j}.gamma{k}", "blocks.{j}.scale{k}"),
        ("blocks.{j}.pwconv{k}", "blocks.{j}.mlp.fc{k}"),
        *_GNCONV_RULES,
    ),
)
"""Classification and dense prediction alike."""

_PART = KeyLayout("official part", (*_GNCONV_RULES, ("^bn", "norm")))
"""A gnConv by itself, with or without norm."""

_FILTERS = {"global_local": True, "GlobalLocalFilter": True, "gngf": True, "gnconv": False, "7x7": False, None: False}
"""The reference's spatial operators: whether it is the global-local filter."""

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
    """The reference network's hyper-parameters as fields of our configuration; None if they are of something else.

    Args:
        target: our configuration.
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
    """A case for a digest of a gnConv, of its filter, or of the unit that necks and heads use."""
    reference = record["config"]
    if "in_channels" in reference:
        return _unit_case(record)
    if "complex_weight" in record["keys"]:
        return Case(GlobalLocalFilter(reference["dim"], _grid(reference)), _PART, "dwconv.")
    fields = _gnconv_fields({key: value for key, value in reference.items() if key != "dim"})
    return Case(GnConv(reference["dim"], **fields), _PART) if fields is not None else None


def _gnconv_fields(reference: Mapping[str, Any]) -> dict[str, Any] | None:
    """Order, scale and grid of the reference's gnConv; None for options that it does not have."""
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
    # What the record does not say of the last projection, its keys do.
    fields.setdefault("project_out", "proj_out.weight" in record["keys"])
    grid = _grid(reference, (32, 17)) if _FILTERS[kind] else None
    return Case(GnConvNormAct(**fields, grid=grid, norm=_NORMS[norm], act=_ACTS[act]), _PART)


def _grid(reference: Mapping[str, Any], default: Grid = (14, 8)) -> Grid:
    return reference.get("h", default[0]), reference.get("w", default[1])


def _name(config: Any) -> str | None:
    """Of a part that is configured by its name, or by a mapping with its name as `type`."""
    return config["type"] if isinstance(config, Mapping) else config


def tap(depths: Sequence[int], path: str) -> Path:
    """Our module for a path of theirs. A stage of theirs is a module that is called; of ours, its last block is."""
    ours = OFFICIAL.to_ours(path)
    if stage := re.fullmatch(r"stages\.(\d+)", ours):
        ours += f".blocks.{depths[int(stage[1])] - 1}"
    return ours, unchanged
