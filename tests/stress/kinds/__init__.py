"""The kinds of files that are damaged, in the order of the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.stress.kinds.base import Kind
from tests.stress.kinds.data import Images, Shards, TokenCaches
from tests.stress.kinds.malicious import Malicious
from tests.stress.kinds.shipping import Functions, Plans, QuantizedFiles
from tests.stress.kinds.texts import Digests, Recipes
from tests.stress.kinds.weights import CheckpointBytes, StateDicts, TrainedCheckpoints

KINDS: tuple[type[Kind], ...] = (
    CheckpointBytes,
    StateDicts,
    TrainedCheckpoints,
    Recipes,
    Images,
    Digests,
    QuantizedFiles,
    Plans,
    Shards,
    TokenCaches,
    Functions,
    Malicious,
)


def prepare(corpus: Path, names: Sequence[str]) -> None:
    """Write the good files of these kinds, a folder each."""
    for kind in KINDS:
        folder = corpus / kind.__name__
        folder.mkdir(parents=True)
        if kind.name in names:
            kind.prepare(folder)
