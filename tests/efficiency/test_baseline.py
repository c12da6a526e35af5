"""A measurement that was kept, and what later ones are called against it."""

from __future__ import annotations

import errno
import json
import os
import random

import pytest

from gatewise.efficiency.timing.baseline import against_baseline, save_baseline
from gatewise.efficiency.timing.compare import Measured
from gatewise.errors import Failure, UserError


def row(name: str, over_reference: float, noise: float = 0.05, seed: int = 0) -> Measured:
    """A network that takes so many times as long as the reference, in rounds of this noise."""
    draw = random.Random(seed)
    rounds = tuple(over_reference * (1 + noise * draw.uniform(-1, 1)) for _ in range(20))
    return Measured(name, "eager", 1, 10, 20, 1.5, 0.1, 7.0, 2**20, over_reference=rounds)


@pytest.fixture
def path(tmp_path):
    save_baseline([row("a", 2.0), row("b", 3.0)], tmp_path / "baseline.json")
    return tmp_path / "baseline.json"


@pytest.mark.parametrize(
    ("now", "verdict"),
    [(2.0, "no difference seen"), (1.99, "no difference seen"), (1.5, "faster"), (2.5, "slower")],
)
def test_the_verdict_respects_the_noise(path, now, verdict):
    (change,) = against_baseline([row("a", now, seed=1)], path)
    assert change.verdict == verdict
    assert change.low <= change.ratio <= change.high
    assert change.ratio == pytest.approx(2.0 / now, rel=0.05)


def test_much_noise_hides_a_small_change(path):
    (change,) = against_baseline([row("a", 1.9, noise=0.9, seed=2)], path)
    assert change.verdict == "no difference seen"


def test_what_was_not_measured_then_has_no_verdict(path):
    new, old = against_baseline([row("c", 1.0), row("b", 3.0)], path)
    assert new is None
    assert old.row.model == "b"


def test_another_machine_is_no_baseline(path):
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"machine": "an abacus"}))
    with pytest.raises(UserError, match="measured on an abacus, not on this machine"):
        against_baseline([row("a", 2.0)], path)


def test_what_is_no_baseline_is_refused(tmp_path):
    file = tmp_path / "file.json"
    with pytest.raises(UserError, match="there is no baseline"):
        against_baseline([], file)
    for text in ("{", "[]", "{}"):
        file.write_text(text)
        with pytest.raises(UserError, match="is not a baseline"):
            against_baseline([], file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 5}, "must name the machine and list rows"),
        ({"machine": None}, "must name the machine and list rows"),
        ({"rows": [5]}, "row 0 of .* must be a mapping"),
        ({"rows": [{"model": "a"}]}, "row 0 of .* has no field"),
    ],
)
def test_a_damaged_baseline_is_named(path, change, message):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
        against_baseline([row("a", 2.0)], path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("over_reference", [], "holds no rounds"),
        ("over_reference", [-1.0], r"over_reference\[0\] must be in"),
        ("batch_size", "1", "batch_size must be an integer"),
    ],
)
def test_a_wrong_field_of_a_row_is_named(path, field, value, message):
    record = json.loads(path.read_text())
    record["rows"][0][field] = value
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"row 0 of .*{message}"):
        against_baseline([row("a", 2.0)], path)


def test_a_killed_write_leaves_the_baseline_that_was_there(path, monkeypatch):
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("gatewise.files.writing.os.fsync", full)
    with pytest.raises(Failure, match="cannot write .*baseline.json: No space left"):
        save_baseline([row("a", 5.0)], path)
    assert path.read_bytes() == before
