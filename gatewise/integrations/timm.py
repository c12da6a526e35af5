"""timm: register every image network of this library as `gatewise_<name>` in timm's registry.

import timm
import gatewise.integrations.timm

model = timm.create_model("gatewise_focalnet_tiny_srf", num_classes=10, drop_path_rate=0.1)
levels = timm.create_model("gatewise_mobilenetv2_100", features_only=True, out_indices=(1, 2, 3))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from timm.models import FeatureInfo, register_model
from timm.models._pretrained import PretrainedCfg
from timm.models._registry import generate_default_cfgs
from torch import Tensor, nn

from gatewise.catalog.checkpoint import load_checkpoint
from gatewise.catalog.factory import create_model
from gatewise.catalog.registry import Variant, families
from gatewise.networks.image._base import ImageNetwork

PREFIX = "gatewise_"

_variants: dict[str, Variant] = {
    name: variant
    for family in families()
    if issubclass(family.network, ImageNetwork)
    for name, variant in family.variants.items()
}


def _pretrained_cfg(variant: Variant) -> dict[str, Any]:
    cfg: dict[str, Any] = {"input_size": variant.input_size, "num_classes": variant.config.num_classes}
    weights = variant.weights
    if weights is None:
        return cfg
    # A source that is neither a URL nor a hub id is a file to be downloaded manually.
    place = "url" if weights.source.startswith("http") else "hf_hub_id" if "/" in weights.source else "file"
    return cfg | {
        place: weights.source,
        "license": weights.license,
        "crop_pct": weights.crop_pct,
        "interpolation": weights.interpolation,
        "mean": weights.mean,
        "std": weights.std,
        "num_classes": weights.num_classes or variant.config.num_classes,
    }


# timm's decorator looks up this name in the module of the function that it registers.
default_cfgs = generate_default_cfgs({PREFIX + name: _pretrained_cfg(v) for name, v in _variants.items()})


class PyramidFeatures(nn.Module):
    """A network in timm's `features_only` form: images in, a list of maps out, `feature_info` in timm's terms."""

    def __init__(self, network: ImageNetwork, out_indices: Sequence[int] | None) -> None:
        super().__init__()
        self.network = network
        levels = network.feature_info
        chosen = tuple(out_indices) if out_indices is not None else tuple(range(len(levels)))
        if not all(-len(levels) <= index < len(levels) for index in chosen):
            raise ValueError(f"out_indices must be levels 0..{len(levels) - 1}, not {chosen}")
        self.out_indices = tuple(index % len(levels) for index in chosen)
        info = [
            {"num_chs": level.channels, "reduction": level.stride, "module": f"level.{i}"}
            for i, level in enumerate(levels)
        ]
        self.feature_info = FeatureInfo(info, self.out_indices)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        levels = self.network.forward_pyramid(x)
        return [levels[index] for index in self.out_indices]


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def create(
        pretrained: bool = False,
        pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        **fields: Any,
    ) -> nn.Module:
        if cache_dir is not None:
            raise ValueError("cache_dir is not supported here: set TORCH_HOME and HF_HOME")
        overlay = _as_dict(pretrained_cfg) | dict(pretrained_cfg_overlay or {})
        file = overlay.get("file")
        network: Any = create_model(name, pretrained=pretrained and file is None, **fields)
        if pretrained and file is not None:
            load_checkpoint(network, file)
        cfg = default_cfgs[PREFIX + name].default.to_dict() | {"architecture": PREFIX + name} | overlay
        # timm's data and hub functions read either name.
        network.pretrained_cfg = network.default_cfg = cfg
        return PyramidFeatures(network, out_indices) if features_only else network

    create.__name__ = create.__qualname__ = PREFIX + name
    create.__doc__ = f"`{name}` of gatewise; keyword arguments are fields of its configuration."
    return create


def _as_dict(cfg: str | dict[str, Any] | PretrainedCfg | None) -> dict[str, Any]:
    if isinstance(cfg, str):
        raise ValueError(f"there is one set of weights per name, no tag {cfg!r}; pass a dict with 'file' for others")
    if isinstance(cfg, PretrainedCfg):
        return cfg.to_dict()
    return dict(cfg or {})


for _name in _variants:
    globals()[PREFIX + _name] = register_model(_entrypoint(_name))
