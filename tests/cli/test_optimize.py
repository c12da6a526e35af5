"""`gatewise optimize`: the report, and what was chosen."""

from __future__ import annotations

import json

import pytest

from gatewise.cli import main


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


def test_mistakes_are_one_line(capsys):
    assert main(["optimize", "mobilenetv2_035", "--batch-size", "0"]) == 2
    assert "--batch-size must be 1 or more" in capsys.readouterr().err
    assert main(["optimize", "mobilenetv2_035", "--precision", "int4"]) == 2
    assert "invalid choice: 'int4'" in capsys.readouterr().err
