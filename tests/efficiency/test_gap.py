"""The latency identity holds by arithmetic, and an efficiency that cannot be is flagged."""

from __future__ import annotations

from math import log

import pytest
import torch
from torch import nn

from gatewise.efficiency.bounds.device import Device
from gatewise.efficiency.bounds.gap import efficiency_gap

DEVICE = Device("a CPU", {"float32": 1e9}, 1e9, noise=0.1)


def networks() -> dict[str, nn.Module]:
    return {"narrow": nn.Linear(10, 10), "wide": nn.Linear(10, 100, bias=False)}


def gap(latencies, example=None, **changed):
    given = {"models": networks(), "accuracies": {"narrow": 70.0, "wide": 75.0}, "device": DEVICE} | changed
    return efficiency_gap(example=torch.randn(5, 10) if example is None else example, latencies=latencies, **given)


def test_latency_is_arithmetic_over_peak_and_efficiency():
    found = gap({"narrow": 1e-6, "wide": 4e-6})
    narrow, wide = found.points
    # Adding the bias is one operation per output element.
    assert (narrow.ops, wide.ops) == (2 * 100 + 10, 2 * 1000)
    assert (narrow.ideal_s, wide.ideal_s) == (210e-9, 2e-6)
    assert (narrow.efficiency, wide.efficiency) == (pytest.approx(0.21), pytest.approx(0.5))
    for point in found.points:
        assert point.latency_s == pytest.approx(point.ops / (point.peak * point.efficiency), rel=1e-12)
        assert log(point.latency_s) - log(point.ideal_s) == pytest.approx(log(point.gap), rel=1e-9)
    assert found.flagged == ()
    assert "0.500" in found.table()


def test_an_efficiency_above_one_by_more_than_noise_is_flagged_and_shown(tmp_path):
    found = gap({"narrow": 210e-9 / 1.05, "wide": 2e-6 / 1.5})
    assert [point.name for point in found.flagged] == ["wide"]
    assert "1.500 !" in found.table()
    assert "so the peak or the count is wrong: wide" in found.table()
    found.plot(tmp_path / "gap.svg")
    drawn = (tmp_path / "gap.svg").read_text(encoding="utf-8")
    assert "#c92a2a" in drawn
    assert "#1971c2" in drawn


def test_networks_are_measured_where_no_latency_is_given():
    models = {name: nn.Sequential(network, nn.Dropout(0.5)) for name, network in networks().items()}
    found = gap(None, {"narrow": torch.randn(5, 10), "wide": torch.randn(2, 10)}, models=models, budget_s=0.01)
    assert all(0 < point.latency_s < 1 for point in found.points)
    assert all(network.training for network in models.values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"models": {}}, "nothing to compare"),
        ({"accuracies": {"narrow": 1.0}}, "accuracies must be given for narrow, wide, not for narrow"),
        ({"latencies": {"narrow": 1.0, "wide": 0.0}}, "must be positive and finite, and that of wide is 0"),
        ({"models": {"narrow": nn.Linear(10, 10), "wide": nn.ReLU()}}, "wide has no operations that count"),
        ({"device": Device("x", {"int8": 1.0}, 1.0)}, "the peak of x for float32 is not known"),
    ],
)
def test_mistakes_are_named(changed, message):
    latencies = changed.pop("latencies", {"narrow": 1.0, "wide": 1.0})
    with pytest.raises(ValueError, match=message):
        gap(latencies, **changed)


def test_one_peak_is_for_one_dtype():
    models = {"narrow": nn.Linear(10, 10), "wide": nn.Linear(10, 10).bfloat16()}
    example = {"narrow": torch.randn(5, 10), "wide": torch.randn(5, 10).bfloat16()}
    with pytest.raises(ValueError, match="the networks run in bfloat16, float32"):
        gap({"narrow": 1.0, "wide": 1.0}, example, models=models)
