"""Key layouts of the published weights of ResNets with EvoNorm.

Each layout is for an `EvoNormResNetConfig`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatewise.catalog.keys import KeyLayout, Rule, as_pointwise
from gatewise.layers.evonorm import EVONORMS, NormActivation


def norm_key(config: NormActivation) -> str:
    """Return the path from the chosen layer to the module with its parameters."""
    return "" if config.layer in EVONORMS else ".norm"


def timm_preact(config: Any) -> KeyLayout:
    """Return timm's layout of the ResNets with the activation first."""
    inner = norm_key(config.norm)
    rules: list[Rule] = [
        ("^stem.conv1", "stem.0.conv"),
        ("^stem.norm1", f"stem.0.norm{inner}"),
        ("^stem.conv2", "stem.1.conv"),
        ("^stem.norm2", f"stem.1.norm{inner}"),
        ("^stem.conv3", "stem.2"),
        ("^head.fc", "head"),
        ("stages.{s}.blocks.{b}", "stages.{s}.{b}"),
        ("downsample.conv", "downsample.1"),
    ]
    if inner:
        rules += [("norm{i}", f"norm{{i}}{inner}"), ("^norm", f"norm{inner}")]
    return KeyLayout("timm", tuple(rules), tensor_to_theirs=as_pointwise(r"head\.fc\.weight"))


UNITS = ("reduce", "spatial", "expand")


def torchvision(config: Any) -> KeyLayout:
    """Return torchvision's ResNet layout, with EvoNorm in place of batch norms."""
    inner = norm_key(config.norm)
    rules: list[Rule] = []
    if config.deep_stem:
        for i in range(3):
            rules += [(f"^conv1.{3 * i}", f"stem.{i}.conv"), (f"^conv1.{3 * i + 1}", f"stem.{i}.norm{inner}")]
        rules += [("^bn1", f"stem.2.norm{inner}"), ("^conv1.6", "stem.2.conv")]
    else:
        rules += [("^conv1", "stem.0.conv"), ("^bn1", f"stem.0.norm{inner}")]
    rules += [("^layer{s+1}.{b}", "stages.{s}.{b}"), ("^fc", "head")]
    for stage, depth in enumerate(config.depths):
        for b in range(depth):
            block = f"stages.{stage}.{b}"
            for number, unit in enumerate(UNITS, start=1):
                rules.append((f"^{block}.conv{number}", f"{block}.{unit}.conv"))
                rules.append((f"^{block}.bn{number}", f"{block}.{unit}.norm{inner}"))
            start = int(config.avg_down)
            rules.append((f"^{block}.downsample.{start}", f"{block}.shortcut.1.conv"))
            rules.append((f"^{block}.downsample.{start + 1}", f"{block}.shortcut.1.norm{inner}"))
    return KeyLayout("torchvision", tuple(rules))


def tensorflow(config: Any) -> KeyLayout:
    """Return the official code's layout: variables are numbered by creation, with a block's shortcut first."""
    units = [f"stem.{i}" for i in range(3)] if config.deep_stem else ["stem.0"]
    linear = []
    for stage, depth in enumerate(config.depths):
        for b in range(depth):
            block = f"stages.{stage}.{b}"
            own = [f"{block}.shortcut.1"] if b == 0 else []
            linear += [*own, f"{block}.expand"]
            units += [*own, *(f"{block}.{unit}" for unit in UNITS)]
    rules: list[Rule] = [("^dense", "head")]
    for number, unit in enumerate(units):
        suffix = f"_{number}" if number else ""
        rules += [(f"^conv2d{suffix}", f"{unit}.conv"), (f"^evonorm{suffix}", f"{unit}.norm")]
    rules += [("kernel", "weight"), ("^head.bias", "head.bias")]
    rules += [("norm.gamma", "norm.weight"), ("norm.beta", "norm.bias"), ("norm.moving_variance", "norm.running_var")]
    # Layers that only scale and shift keep an unused variance here, as in timm.
    unread = [f"{unit}.norm" for unit in linear] if config.norm.layer.startswith("B") else []

    def to_ours(key: str, tensor: Tensor) -> Tensor:
        if key.startswith("conv2d"):
            return tensor.permute(3, 2, 0, 1)
        return tensor.flatten() if key.startswith("evonorm") else _turned(tensor)

    def to_theirs(key: str, tensor: Tensor) -> Tensor:
        if key.startswith("conv2d"):
            return tensor.permute(2, 3, 1, 0)
        return tensor[None, None, None] if key.startswith("evonorm") else _turned(tensor)

    def unpack(state: dict[str, Tensor]) -> dict[str, Tensor]:
        ones = {
            f"{path}.running_var": torch.ones_like(state[f"{path}.weight"])
            for path in unread
            if f"{path}.weight" in state
        }
        return ones | state

    def pack(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in state.items() if key.removesuffix(".running_var") not in unread}

    dropped = r"global_step|.*/(ExponentialMovingAverage|Momentum)"
    return KeyLayout("tensorflow", tuple(rules), dropped, to_ours, to_theirs, unpack, pack, separator="/")


def _turned(tensor: Tensor) -> Tensor:
    """Return the transpose of a linear layer's weight, and a bias unchanged."""
    return tensor.mT if tensor.ndim == 2 else tensor
