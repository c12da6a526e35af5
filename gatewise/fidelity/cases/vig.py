"""Digest records of the ViG reference as cases of our networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from gatewise.catalog.published import translate_config
from gatewise.catalog.registry import registered_config
from gatewise.fidelity.case import Case, Cases, Tap, unchanged
from gatewise.networks.image.vig import Vig, VigConfig, VigH, VigHConfig
from gatewise.networks.image.vig.hierarchical import layouts as hierarchical_layouts
from gatewise.networks.image.vig.plain import layouts

_RENAMED = {
    "img_size": "image_size",
    "channels": "in_chans",
    "if_abs_pos_embed": "use_pos_embed",
    "use_out_act": "out_act",
    "use_act_in_conv": "conv_act",
    "use_bias_in_dwconv": "conv_bias",
    "use_act_in_patch": "stem_act",
    "init_values": "layer_scale_init",
}

_FIXED = {
    "if_cls_token": False,
    "use_middle_cls_token": False,
    "classification_mode": "avgpool",
    "hidden_act": "swish",
    "use_out_gate": False,
    "use_swiglu": True,
    "rope_mode": "none",
}
"""Options that have these values in all published networks; with other values a record is of another network."""

_WITHOUT_EFFECT = ("attn_model", "stride", "patch_embed_version", *_FIXED)

STEMS = {"v1": False, "v2": True}


def plain_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of a plain network."""
    reference = dict(record["config"])
    if not agrees(reference, _FIXED) or reference.get("stride", 16) != reference.get("patch_size", 16):
        return None
    fields = translate_config(reference, VigConfig, _RENAMED, _WITHOUT_EFFECT)
    if fields is None:
        return None
    if "patch_embed_version" in reference:
        fields["overlapping_stem"] = STEMS[reference["patch_embed_version"]]
    config = replace(registered_config(record["variant"]) or VigConfig(), **fields)
    return Case(Vig(config), layouts(config)[0], tap=_tap(config))


def agrees(reference: Mapping[str, Any], fixed: Mapping[str, Any]) -> bool:
    """Return whether a configuration has these values for all of these names that it has."""
    return all(reference.get(name, value) == value for name, value in fixed.items())


def _tap(config: VigConfig) -> Callable[[str], Tap]:
    """Return a function from their paths to our taps. Tokens are a sequence there and a map here."""
    layout = layouts(config)[0]

    def path(theirs: str) -> Tap:
        if theirs == "patch_embed":
            return "stem", lambda x: x.flatten(2).transpose(1, 2)
        if theirs.startswith("head"):
            return theirs, unchanged
        return layout.to_ours(theirs), lambda x: x.flatten(1, 2)

    return path


_PYRAMID_RENAMED = {
    "dims": "embed_dims",
    "use_out_act": "out_act",
    "use_act_in_conv": "conv_act",
    "use_bias_in_dwconv": "conv_bias",
    "init_values": "layer_scale_init",
}

_PYRAMID_FIXED = {
    "hidden_act": "swish",
    "rope_mode": "none",
    "gmlp": True,
    "downsample_version": "v3",
    "patchembed_version": "v2",
    "use_out_gate": False,
}
"""Options that have these values in all published networks; with other values a record is of another network."""

# Only the axes in memory depend on the norm.
_PYRAMID_WITHOUT_EFFECT = ("norm_layer", "attn_model", "img_size", "use_checkpoint", *_PYRAMID_FIXED)


def hierarchical_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of a hierarchical classifier, or of a backbone that returns its stages' maps."""
    reference = dict(record["config"])
    if not agrees(reference, _PYRAMID_FIXED) or reference.get("norm_layer", "ln2d") not in ("ln", "ln2d"):
        return None
    if isinstance(dim := reference.get("dims"), int):
        reference["dims"] = [dim * 2**stage for stage in range(len(reference.get("depths", (0,) * 4)))]
    fields = translate_config(reference, VigHConfig, _PYRAMID_RENAMED, _PYRAMID_WITHOUT_EFFECT)
    if fields is None or "depths" not in fields:
        return None
    base = registered_config(record["variant"]) or VigHConfig()
    if not any(key.startswith("outnorm") for key in record["keys"]):
        config = replace(base, **fields)
        return Case(VigH(config), hierarchical_layouts(config)[0], tap=_pyramid_tap)
    config = replace(base, **{**fields, "pyramid_norm": True, "num_classes": 0})
    return Case(VigH(config), hierarchical_layouts(config)[0], run=VigH.forward_pyramid, tap=_pyramid_tap)


def _pyramid_tap(theirs: str) -> Tap:
    """Return our tap for a path of theirs. Within blocks, channels are last here and second there."""
    ours = hierarchical_layouts(VigHConfig())[0].to_ours(theirs)
    return ours, (lambda x: x.permute(0, 3, 1, 2)) if ".blocks." in ours else unchanged


CASES: Cases = {
    "vig": (
        plain_case,
        hierarchical_case,
    ),
}
