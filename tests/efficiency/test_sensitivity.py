"""Which layers quantization hurts, and keeping those float until the loss is small."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from gatewise.efficiency.quantization.quantize import quantize
from gatewise.efficiency.quantization.sensitivity import (
    LayerSensitivity,
    SensitivityReport,
    mixed_precision,
    sensitivity,
)
from gatewise.ops.quantize import signal_to_noise

pytestmark = pytest.mark.untyped


def network():
    """Four layers, of which the second has weights that no grid of one scale per channel serves."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(1)
    )
    model.append(nn.Linear(8 * 64, 16)).append(nn.ReLU()).append(nn.Linear(16, 4))
    with torch.no_grad():
        model[2].weight[:, 0] *= 200
        # The first channel is dead, so that its large weights do nothing but make the steps large.
        model[0].weight[0] = 0
        model[0].bias[0] = -1
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def pairs(model):
    """Batches with the labels that the network itself gives."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(4)]
    with torch.no_grad():
        return [(batch, model(batch).argmax(dim=1)) for batch in images]


@pytest.fixture(scope="module")
def report(model, pairs):
    return sensitivity(model, pairs)


def test_the_layer_with_coarse_steps_is_the_worst(model, report):
    assert {layer.name for layer in report.layers} == {"0", "2", "5", "7"}
    noises = {layer.name: layer.alone_db for layer in report.layers}
    assert min(noises, key=noises.get) == "2"
    kept = {layer.name: layer.without_db for layer in report.layers}
    assert max(kept, key=kept.get) == "2"
    assert kept["2"] > report.all_db + 10


def test_losses_are_of_accuracy_where_there_are_labels(report):
    worst = next(layer for layer in report.layers if layer.name == "2")
    assert worst.alone_loss == max(layer.alone_loss for layer in report.layers)
    assert worst.damage == worst.alone_loss
    assert 0 <= report.all_loss <= 1
    damages = [layer.damage for layer in report.layers]
    assert damages == sorted(damages, reverse=True)


def test_without_labels_the_damage_is_noise_power(model, pairs):
    report = sensitivity(model, [images for images, _ in pairs])
    assert report.all_loss is None
    assert report.layers[0].name == "2"
    assert report.layers[0].damage == pytest.approx(10 ** (-report.layers[0].alone_db / 10))
    assert "lost" not in str(report)


def test_a_score_of_ones_own_is_asked_for(model, pairs):
    seen = []

    def score(run):
        seen.append(run(pairs[0][0]).shape)
        return -float(len(seen))

    report = sensitivity(model, pairs[:1], score)
    # The float network, each layer alone and left out, and all layers.
    assert len(seen) == 1 + 2 * 4 + 1
    assert report.all_loss == len(seen) - 1


def test_the_table_and_plain_data_have_every_layer(report):
    lines = str(report).splitlines()
    assert len(lines) == 1 + 4 + 1
    assert lines[0].split()[0] == "layer"
    assert lines[-1].startswith("all quantized")
    assert len(json.loads(json.dumps(report.to_dict()))["layers"]) == 4


def test_one_layer_alone_leaves_the_rest_as_it_was(model, pairs, report):
    images = torch.cat([batch for batch, _ in pairs])
    own = next(layer for layer in report.layers if layer.name == "2")
    alone = quantize(model, pairs, skip=["0", "5", "7"])
    assert alone.report.layers == ("2",)
    assert signal_to_noise(model(images).detach(), alone(images)) == pytest.approx(own.alone_db, abs=1.5)


def rows(**damages):
    layers = tuple(LayerSensitivity(name, 20.0, 20.0, loss, loss) for name, loss in damages.items())
    return SensitivityReport(layers, 10.0, sum(damages.values()))


@pytest.mark.parametrize(("budget", "skip"), [(1.0, []), (0.25, ["a"]), (0.05, ["a", "b"]), (0.0, ["a", "b", "c"])])
def test_mixed_precision_keeps_the_worst_float_until_the_rest_is_within_budget(budget, skip):
    assert mixed_precision(rows(a=0.5, b=0.2, c=0.03, d=-0.1), budget) == skip


def test_mixed_precision_refuses_a_negative_budget():
    with pytest.raises(ValueError, match="must be 0 or more"):
        mixed_precision(rows(a=0.1), -1)


@pytest.mark.parametrize(("limit", "floats"), [(1e-2, 1), (0.0, 4)])
def test_max_loss_keeps_as_few_layers_float_as_it_takes(model, pairs, limit, floats):
    images = [batch for batch, _ in pairs]
    assert signal_to_noise(model(images[0]).detach(), quantize(model, images)(images[0])) < 20
    mixed = quantize(model, images, max_loss=limit)
    assert mixed.report.loss <= limit
    assert sum(reason == "kept float on request" for reason in mixed.report.floats.values()) == floats
    if floats == 1:
        assert "2" not in mixed.report.layers


def test_max_loss_that_is_met_changes_nothing(model, pairs):
    loose = quantize(model, pairs, max_loss=1.0)
    assert loose.report.layers == ("0", "2", "5", "7")
    assert loose.report.loss is not None
