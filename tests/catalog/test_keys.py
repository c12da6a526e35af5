"""Key layouts read and write the same names."""

from __future__ import annotations

import pytest
import torch

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.registry import families


def test_placeholders_offsets_and_anchors():
    layout = KeyLayout("x", (("layers.{i}", "stages.{i}"), ("stages.{i+1}.down", "stages.{i}.down"), ("^norm", "last")))
    assert layout.to_ours("layers.3.down.weight") == "stages.2.down.weight"
    assert layout.to_ours("layers.3.norm.weight") == "stages.3.norm.weight"
    assert layout.to_ours("norm.weight") == "last.weight"
    assert layout.to_theirs("stages.2.down.weight") == "layers.3.down.weight"


def test_rules_match_whole_segments_only():
    layout = KeyLayout("x", (("mlp.fc", "mlp.first"),))
    assert layout.to_ours("mlp.fc1.weight") == "mlp.fc1.weight"
    assert layout.to_ours("mlp.fc.weight") == "mlp.first.weight"


def test_an_offset_below_zero_does_not_match():
    layout = KeyLayout("x", (("stages.{i+1}", "stages.{i}"),))
    assert layout.to_ours("stages.0.weight") == "stages.0.weight"


@pytest.mark.parametrize("family", families(), ids=lambda family: family.network.__name__)
def test_every_layout_that_can_be_written_is_undone_by_reading(family):
    for variant in family.variants.values():
        with torch.device("meta"):
            keys = list(family.network(variant.config).state_dict())
        for layout in family.layouts(variant.config):
            if layout.tensor_to_ours is not None and layout.tensor_to_theirs is None:
                continue
            theirs = [layout.to_theirs(key) for key in keys]
            assert len(set(theirs)) == len(keys)
            assert [layout.to_ours(key) for key in theirs] == keys
