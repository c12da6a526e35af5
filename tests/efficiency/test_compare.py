"""Networks side by side: rows, file and chart."""

from __future__ import annotations

import csv
from importlib import import_module

import pytest
import torch

from gatewise.efficiency.acceleration.plan import Plan
from gatewise.efficiency.timing.compare import Measured, compare, draw, write_csv


@pytest.fixture
def networks(tiny):
    return {"tiny": (tiny, (3, 16, 16)), "larger": (tiny, (3, 32, 32))}


def test_each_network_gives_a_row_per_batch_size(networks):
    rows = compare(networks, [1, 2], budget_s=0.05)
    assert [(row.model, row.batch_size) for row in rows] == [("tiny", 1), ("larger", 1), ("tiny", 2), ("larger", 2)]
    assert {row.form for row in rows} == {"eager"}
    # Per image, whatever the batch; convolutions cost four times as much at twice the side.
    assert rows[0].macs == rows[2].macs
    assert rows[1].macs - 40 == 4 * (rows[0].macs - 40)
    assert all(row.samples_per_s == pytest.approx(1e3 * row.batch_size / row.median_ms) for row in rows)


def test_the_optimized_form_gets_a_row_of_its_own(networks, monkeypatch):
    faster = Plan("faster", lambda context: lambda x: networks["tiny"][0](x))
    # The package's `optimize` is the function; the module of that name is found by import.
    module = import_module("gatewise.efficiency.acceleration.optimize")
    monkeypatch.setattr(module, "default_plans", lambda precision, example: [faster])
    rows = compare({"tiny": networks["tiny"]}, optimized=True, budget_s=0.05, optimize_budget_s=1.0)
    assert rows[0].form == "eager"
    assert len(rows) == 2
    assert rows[1].form in ("faster", "original")


def test_rows_are_written_and_drawn(tmp_path):
    rows = [
        Measured("a", form, size, 10, 20, 1.5, 0.1, 7.0, 2**20) for size in (1, 4) for form in ("eager", "compiled")
    ]
    write_csv(rows, tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 4
    assert (read[3]["form"], read[3]["batch_size"], read[3]["peak_memory_bytes"]) == ("compiled", "4", "1048576")
    draw(rows, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": [0]}, "batch sizes must be 1 or more, not"),
        ({"threads": [0]}, "numbers of threads must be 1 or more, not"),
        ({"threads": []}, "numbers of threads must be 1 or more, not"),
        ({"dtypes": ["int8"]}, "dtypes must be of float32, bf16, not int8"),
        ({"dtypes": []}, "not none"),
    ],
)
def test_what_cannot_be_measured_is_refused(networks, options, message):
    with pytest.raises(ValueError, match=message):
        compare(networks, **options)


def test_threads_and_dtypes_are_swept(networks):
    before = torch.get_num_threads()
    rows = compare({"tiny": networks["tiny"]}, [1, 2], threads=[1, 2], dtypes=["float32", "bf16"], budget_s=0.02)
    expected = [(size, number, dtype) for size in (1, 2) for number in (1, 2) for dtype in ("float32", "bf16")]
    assert [(row.batch_size, row.threads, row.dtype) for row in rows] == expected
    assert all(row.low_ms <= row.median_ms <= row.high_ms for row in rows)
    assert torch.get_num_threads() == before
    assert networks["tiny"][0].conv.weight.dtype == torch.float32


def test_energy_is_per_sample_where_there_is_a_counter(networks, monkeypatch):
    module = import_module("gatewise.efficiency.timing.compare")
    joules = iter(range(10_000))
    monkeypatch.setattr(module, "energy_counter", lambda device: lambda: next(joules))
    monkeypatch.setattr(module, "joules_per_call", lambda call, example, counter: 8.0)
    (row,) = compare({"tiny": networks["tiny"]}, [4], budget_s=0.02)
    assert row.energy_j == 2.0


def test_networks_are_left_without_gradients(networks):
    compare({"tiny": networks["tiny"]}, budget_s=0.01)
    assert all(parameter.grad is None for parameter in networks["tiny"][0].parameters())
    assert torch.is_grad_enabled()
