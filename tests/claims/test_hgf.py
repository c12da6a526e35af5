"""The single map, the accounting and the networks of HGF's claim; no training."""

from __future__ import annotations

from gatewise.claims import hgf
from gatewise.claims.lab.run import Run
from gatewise.layers.ternary import HybridGatedLinear, TernaryLinear


def test_one_map_is_as_it_should_be():
    found = hgf.check_layer(Run(0, 100))
    assert all(one.verdict == "shown" for one in found.measured)


def test_memory_is_that_of_packed_blocks():
    ternary, parameters, extra = hgf.account_memory(Run(0, 100)).measured
    assert ternary.verdict == "shown"
    # Rank 8 on 64x64 adds a quarter of the parameters of a square map, less on the wider maps.
    assert 10 < parameters.interval.value < 30
    assert extra.interval.value > 100


def test_the_kinds_are_what_they_are_called():
    full, ternary, corrected = (hgf.make_network(kind) for kind in ("full precision", "ternary", "HGF"))
    assert not any(isinstance(module, TernaryLinear) for module in full.modules())
    assert {type(block.mlp.up_proj) for block in ternary.blocks} == {TernaryLinear}
    assert {type(block.mlp.up_proj) for block in corrected.blocks} == {HybridGatedLinear}
