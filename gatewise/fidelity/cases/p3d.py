"""Digest records of the P3D reference as cases of our networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gatewise.catalog.published import translate_config
from gatewise.fidelity.case import Case, Cases
from gatewise.networks.video.p3d import COLORS, P3D, PORT, P3DConfig

_MODALITIES = {"RGB": COLORS, "Flow": 2}


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of the port, whose outputs are those of all stages and the logits."""
    reference = dict(record["config"])
    # The port's other shortcut, padded with zeros, cannot run on current versions of PyTorch.
    if reference.pop("shortcut_type", "B") != "B":
        return None
    if "modality" in reference:
        reference["in_chans"] = _MODALITIES[reference.pop("modality")]
    renamed = {"layers": "depths", "ST_struc": "struc", "dropout": "drop_rate"}
    fields = translate_config(reference, P3DConfig, renamed, ignored=("final_pool_kernel", "block"))
    if fields is None:
        return None
    network = P3D(P3DConfig(**fields))
    # If rounding flips a ReLU or a maximum, the gradient of a whole patch of the input changes. In float32 a few of
    # millions flip, and not the same ones in two implementations.
    if record.get("grads"):
        network.double()
    return Case(network, PORT, run=_run_stages, grads_of="logits")


def _run_stages(network: P3D, x: Tensor) -> dict[str, Tensor]:
    outputs = network.stage_outputs(x.to(network.stem.conv.weight.dtype))
    names = ["maxpool", *(f"layer{number}" for number in range(1, len(outputs)))]
    found = dict(zip(names, outputs, strict=True))
    found["layer4"] = torch.flatten(found["layer4"].transpose(1, 2), 0, 1)
    return found | {"logits": network.forward_head(outputs[-1])}


CASES: Cases = {"p3d": (reference_case,)}
