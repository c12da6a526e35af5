"""The identities, the accounting and the task of EvoNorm's claim; no training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatewise.claims import evonorm
from gatewise.claims.lab.checks import generator
from gatewise.claims.lab.run import Run
from gatewise.layers.evonorm import EvoNormB0, EvoNormS0


def test_the_identities_are_shown():
    found = evonorm.check_identities(Run(0, 100))
    assert len(found.measured) == 5
    assert all(one.verdict == "shown" for one in found.measured)


def test_a_layer_that_sees_the_batch_would_be_noticed():
    x = torch.randn(3, 8, 5, 5)
    assert evonorm.batch_effect(EvoNormS0(8, groups=4), x) == 0
    assert evonorm.batch_effect(nn.BatchNorm2d(8).train(), x) > 0.1
    assert evonorm.batch_effect(EvoNormB0(8).eval(), x) == 0


def test_what_is_kept_is_counted_in_maps():
    x = torch.randn(2, evonorm.CHANNELS, 8, 8)
    assert evonorm.kept_maps(lambda x: x.exp(), x) == 1
    assert evonorm.kept_maps(lambda x: (x.exp() + 1).tanh(), x) == 2
    kept = {name: evonorm.kept_maps(layer, x) for name, layer in evonorm.layers().items()}
    # Beside the map, its tables, which at 8x8 are a fortieth of it.
    assert kept["S0"] < 1.1
    assert kept["B0"] < 1.1
    assert kept["S0, library calls"] > 3
    assert kept["B0, library calls"] > 3


def test_cost_is_judged_by_what_was_measured(monkeypatch):
    times = {name: (2.0, 2.0, 2.0) if "calls" in name else (1.0, 1.0, 1.0) for name in evonorm.layers()}
    monkeypatch.setattr(evonorm, "time_by_turns", lambda calls, run, seconds: times)
    found = {one.what: one for one in evonorm.measure_cost(Run(0, 100)).measured}
    assert found["time, library calls over ours, S0"].interval.value == 2
    assert found["time, S0 over BN-ReLU"].interval.value == 1
    assert all(one.verdict in (None, "shown") for one in found.values())


@pytest.fixture(scope="module")
def batch():
    return evonorm.Strokes().batch(400, generator(0))


def test_strokes_can_be_told_by_their_shape(batch):
    pictures, ways = batch
    plain = pictures[:, 0] / pictures[:, 0].abs().amax(dim=(1, 2), keepdim=True)
    rows, columns = plain.clamp_min(0).square().sum(2).amax(1), plain.clamp_min(0).square().sum(1).amax(1)
    # A level stroke fills a row, an upright one a column.
    assert (rows > columns)[ways == 0].float().mean() > 0.95
    assert (rows < columns)[ways == 2].float().mean() > 0.95
    assert sorted(ways.unique().tolist()) == [0, 1, 2, 3]


def test_pictures_differ_in_exposure_alone_from_seed_to_seed(batch):
    deviations = batch[0].flatten(1).std(dim=1).log()
    assert deviations.std().item() == pytest.approx(evonorm.Strokes.exposure, rel=0.15)
    again = evonorm.Strokes().batch(400, generator(0))
    assert torch.equal(again[0], batch[0])


def test_networks_differ_in_their_layers_alone():
    networks = {layer: evonorm.make_network(layer) for layer in evonorm.COMPARED}
    shapes = {
        layer: [tuple(p.shape) for p in network.parameters() if p.ndim > 1] for layer, network in networks.items()
    }
    assert shapes["BN-ReLU"] == shapes["GN-ReLU"] == shapes["S0"]
    assert networks["S0"](torch.randn(2, 1, 24, 24)).shape == (2, 4)


def test_accuracies_become_differences_within_a_seed(monkeypatch):
    accuracy = {"BN-ReLU": [100.0, 80.0], "GN-ReLU": [99.0, 98.0], "S0": [100.0, 99.0]}
    queue = [accuracy[layer][size] for _ in range(5) for size in (0, 1) for layer in evonorm.COMPARED]
    monkeypatch.setattr(evonorm, "train_side_by_side", lambda *arguments, **options: {})
    monkeypatch.setattr(evonorm.Strokes, "percent_right", lambda self, model, batch: queue.pop(0))
    found = {one.what: one.interval.value for one in evonorm.compare_layers(Run(0, 100)).measured}
    assert found["S0 minus BN-ReLU with batches of 2"] == 19
    assert found["S0 minus BN-ReLU with batches of 32"] == 0
    assert found["BN-ReLU, batches of 32 minus batches of 2"] == 20
    assert found["S0 minus GN-ReLU with batches of 2"] == 1
