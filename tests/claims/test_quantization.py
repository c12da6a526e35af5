"""The identities, the dispersion of channels, and the accounting of the claim on quantization; next to no training."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from gatewise.claims import quantization
from gatewise.claims.lab.checks import generator, randomise
from gatewise.claims.lab.clothes import Clothes
from gatewise.claims.lab.comparison import Comparison
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.training import Schedule
from gatewise.claims.quantization import identities as identities
from gatewise.claims.quantization.network import SeparableNetwork, blocks_of, disparity, disperse
from gatewise.efficiency.acceleration.fold import fold
from gatewise.efficiency.quantization.quantize import quantize
from gatewise.ops.quantize import quantize as to_codes
from gatewise.ops.quantize import weight_grid

WIDTHS, STRIDES = (4, 8, 8), (1, 2)


@pytest.fixture
def network():
    return randomise(SeparableNetwork(WIDTHS, STRIDES), 0)


def images(count=4, size=12):
    return torch.randn(count, 1, size, size, generator=generator(0))


# Identities


@pytest.mark.untyped
def test_the_identities_are_shown():
    found = quantization.check_identities(Run(0, 100))
    assert [one.verdict for one in found.measured] == ["shown"] * 7 + [None]


@pytest.mark.untyped
def test_a_kernel_that_is_off_would_be_noticed(monkeypatch):
    def off(model, batches):
        exact = quantize(model, batches)
        step = exact.report.ranges[-1].scale
        monkeypatch.setattr(type(exact), "__call__", lambda self, x: self._runner(x) + 3 * step)
        return exact

    monkeypatch.setattr(identities, "quantize", off)
    simulated, arithmetic = identities.code_differences(identities.LAYERS["3x3"](), torch.randn(2, 8, 6, 6))
    assert 2 <= simulated <= 4
    assert 2 <= arithmetic <= 4


def test_a_correction_by_long_term_statistics_would_be_noticed(monkeypatch):
    monkeypatch.setattr(identities, "folded_weight", lambda weight, norm: weight)
    assert identities.correction_error(0) > 1e-2


@pytest.mark.untyped
def test_before_the_freeze_training_is_not_inference():
    assert identities.training_against_inference(frozen=True, seed=1) == 0
    assert identities.training_against_inference(frozen=False, seed=1) > 1e-2


def test_a_grid_without_zero_would_be_counted(monkeypatch):
    assert identities.zeros_missed(0, 50) == 0
    monkeypatch.setattr(identities, "dequantize", lambda codes, grid: codes * grid.scale)
    assert identities.zeros_missed(0, 50) > 25


# Unlike channels


@pytest.mark.parametrize("behind", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("training", [False, True])
def test_dispersion_changes_no_output(network, behind, training):
    network.train(training)
    x = images()
    with torch.no_grad():
        expected = network(x)
        found = disperse(network, 1000.0, generator(1), behind=behind)(x)
    # Factors are not powers of two: each product is rounded anew.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_dispersion_spreads_depthwise_kernels_and_shares_the_factors_among_the_maps(network):
    x = images()
    whole, before = [], disparity(network)
    for behind in (0.0, 1.0):
        unlike = disperse(deepcopy(network), 1e4, generator(1), behind=behind)
        assert disparity(unlike) > 20 * before
        with torch.no_grad():
            whole.append(torch.equal(unlike.stem(x), network.stem(x)))
    # With behind = 1 the map in front of a depthwise convolution stays as it was.
    assert whole == [False, True]


def test_disparity_is_that_of_folded_kernels(network):
    for block in blocks_of(network):
        nn.init.ones_(block.depthwise.conv.weight)
        nn.init.ones_(block.depthwise.norm.weight)
        block.depthwise.norm.running_var.fill_(1)
    assert disparity(network) == pytest.approx(1)
    blocks_of(network)[0].depthwise.norm.running_var[0] = 0.01
    assert disparity(network) == pytest.approx(10, rel=1e-3)


def test_one_scale_per_weight_loses_what_a_scale_per_channel_keeps(network):
    disperse(network, 1e5, generator(1))
    kernel = torch.cat([block.depthwise.conv.weight for block in blocks_of(fold(network))])
    coarse, fine = (to_codes(kernel, weight_grid(kernel, per_channel=own)) for own in (False, True))
    assert (coarse == 0).float().mean() > 0.2
    assert (fine == 0).float().mean() < 0.02


# Weights, size, speed


def test_mobilenet_has_the_weights_of_the_digest():
    found = {one.what: one for one in quantization.measure_weights(Run(0, 100)).measured}
    # Measured for the digest of the same weights, on another input of the same kind.
    assert found["8 bits, one scale per weight"].interval.value == pytest.approx(35.0, abs=0.7)
    assert found["8 bits, a scale per channel"].interval.value == pytest.approx(39.7, abs=0.7)
    assert all(one.verdict in (None, "shown") for one in found.values())


class Tiny(nn.Module):
    """In the place of MobileNetV2: (B, 3, H, W) -> (B, 5), nearly all of it weights."""

    def __init__(self):
        super().__init__()
        self.conv, self.wide, self.head = nn.Conv2d(3, 64, 3, 4), nn.Conv2d(64, 1024, 1), nn.Linear(1024, 5)

    def forward(self, x):
        return self.head(self.wide(self.conv(x).relu()).relu().mean(dim=(2, 3)))


@pytest.fixture
def tiny(monkeypatch):
    torch.manual_seed(0)
    network = Tiny().eval()
    monkeypatch.setattr(quantization, "mobilenet", lambda: network)
    quantization.integer_mobilenet.cache_clear()
    yield network
    quantization.integer_mobilenet.cache_clear()


@pytest.mark.untyped
def test_size_is_that_of_files(tiny):
    found = {one.what: one for one in quantization.measure_size(Run(0, 100)).measured}
    report = quantization.integer_mobilenet(0).report
    assert found["float32"].interval.value == report.bytes_before / 1e6
    assert found["8 bits"].interval.value == report.bytes_before / report.bytes_after
    assert found["8-bit weights alone"].interval.value == pytest.approx(4, rel=0.2)
    assert found["4-bit weights alone"].interval.value > 1.5 * found["8-bit weights alone"].interval.value
    assert found["8 bits, cosine to the float logits, worst of 4"].verdict == "shown"


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("vnni", "milliseconds", "verdict"), [(True, 5, "shown"), (True, 30, "contrary"), (False, 30, None)]
)
def test_speed_is_judged_where_instructions_are(tiny, monkeypatch, vnni, milliseconds, verdict):
    times = {"float32": (1e-2,) * 3, "8 bits": (1e-3 * milliseconds,) * 3}
    monkeypatch.setattr(quantization, "time_by_turns", lambda calls, run, seconds, max_rounds: times)
    monkeypatch.setattr(quantization, "has_vnni", lambda: vnni)
    found = quantization.measure_speed(Run(0, 100)).measured
    assert found[-1].interval.value == pytest.approx(10 / milliseconds)
    assert found[-1].verdict == verdict


# Accuracy


class FewClothes(Clothes):
    """Forty test images."""

    def __init__(self):
        super().__init__()
        self.test = (self.test[0][:40], self.test[1][:40])


@pytest.mark.untyped
def test_every_form_of_one_network_is_tested(monkeypatch):
    monkeypatch.setattr(quantization, "Clothes", FewClothes)
    monkeypatch.setattr(quantization, "SeparableNetwork", lambda: SeparableNetwork(WIDTHS, STRIDES))
    monkeypatch.setattr(quantization, "FLOAT", Schedule(steps=2, batch_size=8, lr=1e-2))
    monkeypatch.setattr(quantization, "TUNING", Schedule(steps=2, batch_size=8, lr=1e-3))
    monkeypatch.setattr(quantization, "AWARE", quantization.AWARE | {"activation_delay": 0, "freeze_after": 1})
    monkeypatch.setattr(quantization, "SEEDS", 1)
    finding = quantization.compare_forms(Run(0, 100))
    found = {one.what: one for one in finding.measured}
    assert len(found) == 14
    assert found["outputs changed by the factors: relative difference"].verdict == "shown"
    before, after = (found[what].interval.value for what in list(found)[1:3])
    assert after > 10 * before
    assert len(finding.charts[0].points["float"]) == 1


def accuracies(**changed):
    """Of every form: that of the float network, but for those that changed."""
    names = (*quantization.CALIBRATED, *quantization.AWARE_BITS, quantization.TRAINED_ON, quantization.ONE_SIDED)
    alike = (quantization.alike(name) for name in (quantization.COARSE, quantization.FOUR))
    found = {name: [85.0, 86.0] for name in (quantization.ORIGINAL, *names, *alike)}
    return Comparison(found | {getattr(quantization, name): values for name, values in changed.items()})


def test_losses_are_counted_from_the_float_network():
    compared = accuracies(COARSE=[15.0, 16.0], FOUR=[45.0, 46.0], FOUR_TRAINED=[80.0, 81.0])
    found = {one.what: one for one in quantization._losses(compared)}
    assert found[f"lost, {quantization.COARSE}"].interval.value == 70
    assert found["4-bit weights, won back by training"].interval.value == 35
    assert all(one.verdict in (None, "shown") for one in found.values())


def test_a_network_that_does_not_collapse_is_contrary_to_the_paper():
    found = {one.what: one.verdict for one in quantization._losses(accuracies(FINE=[80.0, 81.0]))}
    assert found[f"lost, {quantization.COARSE}"] == "contrary"
    assert found[f"lost, {quantization.FINE}"] == "contrary"
    assert found[f"lost, {quantization.TRAINED}"] == "shown"
