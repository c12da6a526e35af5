"""A short run of the harness, and the harness itself."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from tests.stress.mutations import damaged, misshapen

pytestmark = pytest.mark.untyped


@pytest.mark.timeout(900)
def test_no_damaged_file_does_harm():
    done = subprocess.run(
        [sys.executable, "-m", "tests.stress.fuzz", "--cases", "300"],
        capture_output=True,
        text=True,
        timeout=890,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    total = done.stdout.strip().splitlines()[-1].split()
    assert total[0] == "total"
    assert int(total[1]) >= 300


@pytest.mark.parametrize("seed", range(20))
def test_damage_depends_on_the_seed_alone_and_always_acts(seed):
    content = bytes(range(256)) * 4
    first, second = (damaged(random.Random(seed), content) for _ in range(2))
    assert first == second != content


def test_misshapen_data_leaves_the_original_alone():
    content = {"a": [1, {"b": 2}], "c": None}
    changed = [misshapen(random.Random(seed), content) for seed in range(50)]
    assert content == {"a": [1, {"b": 2}], "c": None}
    assert sum(other != content for other in changed) > 40
