"""Energy counters: read where they may be, across their overflow, and absent where they are not."""

from __future__ import annotations

import pytest
import torch

from gatewise.efficiency.timing.energy import energy_counter, joules_per_call

CPU = torch.device("cpu")


@pytest.fixture
def powercap(tmp_path):
    for name, energy in (("intel-rapl:0", 5_000_000), ("intel-rapl:1", 9_000_000), ("intel-rapl:0:0", 77)):
        zone = tmp_path / name
        zone.mkdir()
        (zone / "energy_uj").write_text(f"{energy}\n")
        (zone / "max_energy_range_uj").write_text("10000000\n")
    return tmp_path


def test_packages_are_summed_and_their_parts_left_out(powercap):
    counter = energy_counter(CPU, powercap)
    assert counter() == 0
    (powercap / "intel-rapl:0" / "energy_uj").write_text("6500000")
    (powercap / "intel-rapl:0:0" / "energy_uj").write_text("9999999")
    assert counter() == pytest.approx(1.5)


def test_a_counter_that_starts_anew_goes_on(powercap):
    counter = energy_counter(CPU, powercap)
    (powercap / "intel-rapl:1" / "energy_uj").write_text("2000000")
    assert counter() == pytest.approx(3.0)
    (powercap / "intel-rapl:1" / "energy_uj").write_text("4000000")
    assert counter() == pytest.approx(5.0)


def test_without_counters_there_is_no_figure(tmp_path):
    assert energy_counter(CPU, tmp_path) is None


def test_a_counter_that_may_not_be_read_is_none(powercap, monkeypatch):
    from pathlib import Path

    def refuse(self, **kwargs):
        raise PermissionError(self)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert energy_counter(CPU, powercap) is None


def test_joules_are_per_call():
    joules = [0.0]

    def candidate(x):
        joules[0] += 0.25

    assert joules_per_call(candidate, torch.zeros(1), lambda: joules[0], seconds=0.01) == pytest.approx(0.25)
