"""`gatewise optimize`: the report, and what was chosen."""

from __future__ import annotations

import json

import pytest
import torch

from gatewise.cli import main
from gatewise.efficiency import load_optimized


@pytest.mark.untyped
def test_the_report_is_printed_and_written(capsys, tmp_path):
    report = tmp_path / "report.json"
    arguments = ["mobilenetv2_035", "--image-size", "32", "32", "--budget", "0.01", "--json", str(report)]
    assert main(["optimize", *arguments]) == 0
    text = capsys.readouterr().out
    assert "original" in text
    assert "chosen: " in text
    written = json.loads(report.read_text(encoding="utf-8"))
    assert written["input_shape"] == [1, 3, 32, 32]
    assert [plan["status"] for plan in written["plans"]].count("chosen") == 1


@pytest.mark.untyped
def test_the_chosen_plan_is_saved(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    plan = tmp_path / "plan.zip"
    arguments = ["--image-size", "32", "32", "--budget", "0.01", "--threads", "1", "--save", str(plan)]
    assert main(["optimize", "mobilenetv2_035", *arguments]) == 0
    assert f"saved: {plan}" in capsys.readouterr().out
    assert load_optimized(plan)(torch.zeros(2, 3, 32, 32)).shape == (2, 1000)


def test_mistakes_are_one_line(capsys):
    assert main(["optimize", "mobilenetv2_035", "--batch-size", "0"]) == 2
    assert "--batch-size must be 1 or more" in capsys.readouterr().err
    assert main(["optimize", "mobilenetv2_035", "--precision", "int4"]) == 2
    assert "invalid choice: 'int4'" in capsys.readouterr().err
    assert main(["optimize", "mobilenetv2_035", "--threads", "0"]) == 2
    assert "--threads must be 1 or more" in capsys.readouterr().err
