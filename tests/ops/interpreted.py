"""Triton kernels under its interpreter, in a process of their own: it is asked for before triton is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

Errors = dict[str, dict[str, float]]
"""Case -> what was compared -> relative error."""


def error(found: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """Root mean square of the difference over that of `expected`, whose square is taken as `least` at least."""
    difference = (found.detach().cpu().double() - expected.detach()).square().mean()
    value = (difference / expected.detach().square().mean().clamp_min(least)).sqrt().item()
    return value if value == value else float("inf")


def errors_of_interpreted(module: str, *arguments: str) -> Errors:
    """What the test module prints when it is run as a program under the interpreter."""
    pytest.importorskip("triton")
    return report_of(module, *arguments, TRITON_INTERPRET="1")


def report_of(module: str, *arguments: str, **environment: str) -> Any:
    """What the test module prints last when it is run as a program, read as JSON."""
    program = [sys.executable, "-m", module, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    root = Path(__file__).parents[2]
    done = subprocess.run(program, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def print_errors(run: Callable[[Any], dict[str, float]], cases: Mapping[str, Any]) -> None:
    """The program's part: run all cases and print their errors.

    Freshly allocated memory holds NaN: a kernel that forgets to write, or reads what it should not, is noticed.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    print(json.dumps({name: run(case) for name, case in cases.items()}))
