"""Digest records of networks made of blocks over patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.published import translate_config
from gatewise.fidelity.case import Case
from gatewise.networks.image.skeletons.patches import PatchNetwork

_RENAMED = {"in_channels": "in_chans", "d_model": "embed_dim", "d_ffn": "hidden_dim", "num_layers": "depth"} | {
    "dropout": "drop_rate"
}
"""Hyper-parameters by their names in the published code of these networks, with our names."""


def patch_case(
    record: Mapping[str, Any],
    network: Callable[[Any], PatchNetwork],
    config: Callable[..., Any],
    layout: KeyLayout,
    renamed: Mapping[str, str],
) -> Case | None:
    """Return a case for a digest of a whole network, or None if the record is about something else."""
    fields = translate_config(record["config"], config, _RENAMED | dict(renamed))
    return None if fields is None else Case(network(config(**fields)), layout)
