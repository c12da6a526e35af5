"""Digest records of the SpaRTAN reference as cases of our networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gatewise.catalog.published import translate_config
from gatewise.fidelity.case import Case, Cases
from gatewise.networks.image.spartan import Spartan, SpartanConfig, layouts


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of a whole network."""
    reference = dict(record["config"])
    if "dims" not in reference or reference.pop("num_layer", len(reference["layer_depths"])) != len(
        reference["layer_depths"]
    ):
        return None
    reference["embed_dims"] = [reference.pop("init_dim"), *reference.pop("dims")]
    renamed = {"layer_depths": "depths", "dropout": "drop_path_rate", "in_channels": "in_chans"}
    fields = translate_config(reference, SpartanConfig, renamed)
    if fields is None:
        return None
    config = SpartanConfig(**fields | {"out_indices": tuple(range(len(fields["depths"])))})
    return Case(Spartan(config), layouts(config)[0])


CASES: Cases = {"spartan": (reference_case,)}
