"""The limits of a processor: measured, kept, and made by hand."""

from __future__ import annotations

import json
import warnings
from importlib import import_module

import pytest
import torch

from gatewise.efficiency.bounds.device import Device, device

# Whether the machine is quiet while tests run is not what they are about.
pytestmark = pytest.mark.filterwarnings("ignore:the machine was busy")


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Measuring that takes a moment, and a cache of its own."""
    module = import_module("gatewise.efficiency.bounds.device")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in {"SECONDS": 0.02, "FEWEST": 3, "SMALLEST_COPY": 2**22, "LARGEST_COPY": 2**22}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "LARGEST", {"cpu": 256, "cuda": 1024})
    return tmp_path


def test_a_processor_is_measured_in_each_kind_of_numbers_that_it_has(quick):
    found = device(threads=1)
    assert {"float32", "bfloat16"} <= set(found.peaks)
    assert all(1e7 < peak < 1e16 for peak in found.peaks.values())
    assert 1e7 < found.bandwidth < 1e14
    assert 1e7 < found.in_place_bandwidth < 1e14
    assert found.noise >= 0
    assert found.threads == 1
    assert found.torch_version == torch.__version__
    assert found.ridge("float32") == found.peaks["float32"] / found.bandwidth
    assert found.name in str(found)


def test_measuring_leaves_the_number_of_threads_alone(quick):
    before = torch.get_num_threads()
    assert device(threads=before + 1).threads == before + 1
    assert torch.get_num_threads() == before


def test_limits_are_kept_by_hardware_threads_and_version_until_asked_for_anew(quick):
    first = device(threads=1)
    assert device(threads=1) == first
    assert device("cpu", threads=2) != first
    files = sorted((quick / "gatewise" / "devices").iterdir())
    assert len(files) == 2
    assert all(torch.__version__.partition("+")[0] in file.name and "threads" in file.name for file in files)
    # Another value in the cache shows which calls read it.
    kept = json.loads(files[0].read_text(encoding="utf-8")) | {"bandwidth": 1.0}
    files[0].write_text(json.dumps(kept), encoding="utf-8")
    assert device(threads=1).bandwidth == 1.0
    assert device(threads=1, refresh=True).bandwidth > 1.0
    assert device(threads=1).bandwidth > 1.0


def test_a_broken_cache_is_measured_over_with_a_warning(quick):
    device(threads=1)
    (file,) = (quick / "gatewise" / "devices").iterdir()
    for text in ("{", "[]", '{"name": "x"}'):
        file.write_text(text, encoding="utf-8")
        with pytest.warns(UserWarning, match="does not hold the limits of a device"):
            assert device(threads=1).bandwidth > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        device(threads=1)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nowhere", "there is no device 'nowhere'"),
        ("meta", "limits are measured on cpu and cuda devices, not on meta"),
        (f"cuda:{torch.cuda.device_count()}", "is not there: PyTorch finds"),
    ],
)
def test_a_device_that_is_not_there_is_an_error(quick, where, message):
    with pytest.raises(ValueError, match=message):
        device(where)


@pytest.mark.filterwarnings("default:the machine was busy")
def test_a_busy_machine_is_told_of(quick, monkeypatch):
    monkeypatch.setattr(import_module("gatewise.efficiency.bounds.device"), "NOISY", -1.0)
    with pytest.warns(UserWarning, match=r"the machine was busy: repeats were apart by \d+%"):
        device(threads=1)


def test_threads_are_positive(quick):
    with pytest.raises(ValueError, match="threads must be 1 or more, not 0"):
        device(threads=0)


def test_devices_are_made_by_hand():
    found = Device("H200 SXM", {"bf16": 989.5e12, torch.float32: 67e12}, 4800e9)
    assert found.ridge("bfloat16") == found.ridge(torch.bfloat16) == 989.5e12 / 4800e9
    with pytest.raises(ValueError, match="peak of H200 SXM for int8 is not known, only for bfloat16, float32"):
        found.peak("int8")


@pytest.mark.parametrize(
    ("peaks", "bandwidth", "message"),
    [
        ({}, 1.0, "needs a peak"),
        ({"float32": 0.0}, 1.0, "the float32 of the device 'x' must be positive and finite, not 0"),
        ({"float32": 1.0}, -1.0, "the bandwidth of the device 'x' must be positive and finite, not -1"),
        ({"float31": 1.0}, 1.0, "dtype must be one of"),
    ],
)
def test_impossible_devices_are_refused(peaks, bandwidth, message):
    with pytest.raises(ValueError, match=message):
        Device("x", peaks, bandwidth)


def test_a_cache_with_nonsense_in_a_field_is_measured_over(quick):
    first = device(threads=1)
    (file,) = (quick / "gatewise" / "devices").iterdir()
    kept = json.loads(file.read_text(encoding="utf-8"))
    for change in ({"peaks": []}, {"peaks": {"float32": "fast"}}, {"bandwidth": None}, {"more": 1}, {"threads": 1.5}):
        file.write_text(json.dumps(kept | change), encoding="utf-8")
        with pytest.warns(UserWarning, match="does not hold the limits of a device"):
            assert device(threads=1).name == first.name


def test_without_a_home_nothing_is_kept(quick, monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(import_module("gatewise.efficiency.bounds.device").Path, "home", nowhere)
    assert device(threads=1).bandwidth > 0


def test_a_cache_that_cannot_be_written_is_told_of(quick):
    (quick / "gatewise").write_text("a file, not a folder", encoding="utf-8")
    with pytest.warns(UserWarning, match="the limits of the device cannot be kept"):
        assert device(threads=1).bandwidth > 0
