"""Key layout of published RMT weights and the two gated forms, and the forms' mixer options."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gatewise.catalog.keys import KeyLayout, Rule

if TYPE_CHECKING:
    from gatewise.networks.image.gated_swinrmt.network import GatedSwinRMTConfig

_WINDOWS: dict[str, Any] = {"window": 7, "shift": True, "decomposed": (True, True, True, True)}
_SOFTMAX: dict[str, Any] = {
    "activation": "softmax",
    "decay": "additive",
    "slopes": "none",
    "value_gate": False,
    "out_norm": False,
}

FORMS: dict[str, dict[str, Any]] = {
    "swat": {
        "activation": "sigmoid",
        "decay": "multiplicative",
        "slopes": "balanced",
        "value_gate": True,
        "out_norm": True,
        "out_gate": "none",
        **_WINDOWS,
    },
    "retention": {**_SOFTMAX, "out_gate": "elementwise", **_WINDOWS},
    "rmt": {
        **_SOFTMAX,
        "out_gate": "none",
        "window": None,
        "shift": False,
        "decomposed": (True, True, True, False),
    },
}
"""Options of the mixer in each form."""

_RULES: tuple[Rule, ...] = (
    *(rule for n in range(4) for rule in ((f"^patch_embed.proj.{3 * n}", f"^stem.{n}.conv"),)),
    *(rule for n in range(4) for rule in ((f"^patch_embed.proj.{3 * n + 1}", f"^stem.{n}.norm"),)),
    ("^layers.{i}.downsample", "^stages.{i+1}.downsample"),
    ("downsample.reduction", "downsample.conv"),
    ("^layers.{i}.blocks", "^stages.{i}.blocks"),
    ("pos", "position"),
    ("retention_layer_norm", "norm1"),
    ("final_layer_norm", "norm2"),
    ("retention", "mixer"),
    ("lepe.conv", "local"),
    ("v_gate_proj", "value_gate"),
    ("g_proj", "out_gate"),
    ("out_proj", "project_out"),
    ("ffn", "mlp"),
    ("dwconv", "depthwise"),
    ("gamma_1", "scale1"),
    ("gamma_2", "scale2"),
    ("^proj", "^project.linear"),
    ("^norm", "^project.norm"),
)


def layouts(config: GatedSwinRMTConfig) -> list[KeyLayout]:
    """Return RMT's layout; the gated forms add a few keys. Angles and decays are computed here, not loaded."""
    return [KeyLayout("official", _RULES, r"layers\.\d+\.Relpos\.(angle|decay)", unpack=_join_qkv, pack=_split_qkv)]


def _join_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join queries, keys and values, which are one linear layer here."""
    joined = dict(tensors)
    for key in tensors:
        if match := re.fullmatch(r"(.*\.mixer)\.q_proj\.(weight|bias)", key):
            parts = [f"{match[1]}.{letter}_proj.{match[2]}" for letter in "qkv"]
            if all(part in tensors for part in parts):
                joined[f"{match[1]}.qkv.{match[2]}"] = torch.cat([joined.pop(part) for part in parts])
    return joined


def _split_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    split = dict(tensors)
    for key in tensors:
        if ".mixer.qkv." in key:
            parts = split.pop(key).chunk(3)
            split |= {key.replace(".qkv.", f".{letter}_proj."): part for letter, part in zip("qkv", parts, strict=True)}
    return split
