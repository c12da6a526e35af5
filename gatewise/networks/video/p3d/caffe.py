"""Key layouts of the published Caffe networks of P3D, in NumPy archives.

An archive holds every blob under "layer/number": `numpy.savez(FILE, **{f"{name}/{i}": blob.data for name, blobs in
net.params.items() for i, blob in enumerate(blobs)})`. A batch norm has four blobs: scale, bias, running mean and
running variance. Some branches of Caffe store the inverse standard deviation instead of the variance. Shapes do not
reveal which, so there are two layouts, and the first warns if its interpretation is unlikely.
"""

from __future__ import annotations

import re
import warnings
from functools import partial
from string import ascii_lowercase

import torch
from torch import Tensor

from gatewise.catalog.keys import KeyLayout
from gatewise.errors import CheckpointError

NORM_EPS = 1e-5
SPORTS_1M_CLASSES = 487
SPATIAL_STAGE = "res5"

_NORM_BLOBS = ("weight", "bias", "running_mean", "running_var")
_CONV_BLOBS = ("weight", "bias")
_BRANCHES = {"branch2a": "reduce", "branch2b": "middle.spatial", "branch2b_t": "middle.temporal", "branch2c": "expand"}
_FLAT_BRANCHES = {"branch2a": "reduce", "branch2b": "middle", "branch2c": "expand"}
_BLOB = re.compile(r"(?P<layer>\w+)\.(?P<number>\d)")


def caffe_layouts(depths: tuple[int, ...], num_classes: int) -> list[KeyLayout]:
    """Return the layout with variances and the one with inverse standard deviations."""
    writing = _modules(depths, "letters" if max(depths) <= 6 else "numbers")
    head = "fc_sports1m" if num_classes == SPORTS_1M_CLASSES else "fc_kinetics"
    layouts = []
    for name, inverse in (("caffe", False), ("caffe-inverse-std", True)):
        unpack = partial(_to_ours, _readings(depths), inverse)
        pack = partial(_to_theirs, {ours: theirs for theirs, ours in writing.items()}, head, inverse)
        layouts.append(KeyLayout(name, unpack=unpack, pack=pack, separator="/"))
    return layouts


def _readings(depths: tuple[int, ...]) -> dict[str, str]:
    """Map their layers to our modules, under both names that Caffe's ResNets use for blocks after the first."""
    return _modules(depths, "letters") | _modules(depths, "numbers")


def _modules(depths: tuple[int, ...], style: str) -> dict[str, str]:
    modules = {"conv1": "stem.conv", "bn_conv1": "stem.norm"}
    for stage, depth in enumerate(depths):
        branches = _FLAT_BRANCHES if f"res{stage + 2}" == SPATIAL_STAGE else _BRANCHES
        for block, name in enumerate(_block_names(depth, style if stage in (1, 2) else "letters")):
            shortcut = {"branch1": "shortcut"} if block == 0 else {}
            for branch, unit in (branches | shortcut).items():
                place = f"{stage + 2}{name}_{branch}"
                modules[f"res{place}"] = f"stages.{stage}.{block}.{unit}.conv"
                modules[f"bn{place}"] = f"stages.{stage}.{block}.{unit}.norm"
    return modules


def _block_names(depth: int, style: str) -> list[str]:
    """Return a, b, c, ... or, as in the deep stages of the larger ResNets, a, b1, b2, ..."""
    if style == "letters" and depth <= len(ascii_lowercase):
        return list(ascii_lowercase[:depth])
    return ["a", *(f"b{number}" for number in range(1, depth))]


def _to_ours(modules: dict[str, str], inverse: bool, blobs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return their blobs under our names and in our shapes. Other tensors stay unchanged."""
    found: dict[str, Tensor] = {}
    for key, blob in blobs.items():
        match = _BLOB.fullmatch(key)
        layer = match["layer"] if match else ""
        module = "head" if layer.startswith("fc_") else modules.get(layer)
        kinds = _NORM_BLOBS if layer.startswith("bn") else _CONV_BLOBS
        if match is None or module is None or int(match["number"]) >= len(kinds):
            found[key] = blob
            continue
        kind = kinds[int(match["number"])]
        found[f"{module}.{kind}"] = _blob_to_ours(layer, kind, blob, inverse)
    return found


def _blob_to_ours(layer: str, kind: str, blob: Tensor, inverse: bool) -> Tensor:
    if layer.startswith("bn"):
        values = blob.reshape(-1)
        return _variance(layer, values, inverse) if kind == "running_var" else values
    if blob.ndim != 5:
        return blob
    return blob.squeeze(2) if blob.shape[2] == 1 else blob.squeeze(4)


def _variance(layer: str, values: Tensor, inverse: bool) -> Tensor:
    if not (torch.isfinite(values) & (values > 0)).all():
        kind = "inverse deviations" if inverse else "variances"
        raise CheckpointError(
            f"the {kind} of {layer} (blob 3) must be positive and finite, not {values.min():.3g} to {values.max():.3g}"
        )
    if inverse:
        return (values.pow(-2) - NORM_EPS).clamp_min(0)
    # For pixels from 0 to 255, the first convolution's outputs have a standard deviation above 1, its inverse below.
    if layer == "bn_conv1" and values.median() < 1:
        warnings.warn(
            f"read as variances, the statistics of {layer} have a median of {values.median():.2g}, too little for "
            "pixels from 0 to 255; if the file keeps inverse deviations, load it with layout='caffe-inverse-std'",
            stacklevel=2,
        )
    return values


def _to_theirs(layers: dict[str, str], head: str, inverse: bool, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the inverse of `_to_ours`. Our keys without a blob (batch counters) are dropped."""
    blobs: dict[str, Tensor] = {}
    for key, tensor in state.items():
        module, _, kind = key.rpartition(".")
        layer = head if module == "head" else layers[module]
        kinds = _NORM_BLOBS if layer.startswith("bn") else _CONV_BLOBS
        if kind in kinds:
            blobs[f"{layer}.{kinds.index(kind)}"] = _tensor_to_theirs(layer, kind, tensor, inverse)
    return blobs


def _tensor_to_theirs(layer: str, kind: str, tensor: Tensor, inverse: bool) -> Tensor:
    if kind == "running_var" and inverse:
        return (tensor + NORM_EPS).rsqrt()
    if tensor.ndim != 4 or layer.startswith(SPATIAL_STAGE):
        return tensor
    return tensor.unsqueeze(4) if layer.endswith("_t") else tensor.unsqueeze(2)
