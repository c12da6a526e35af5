"""`gatewise measure`: a table, a file and a chart."""

from __future__ import annotations

import csv

from gatewise.cli import main

QUICK = ["--image-size", "32", "32", "--seconds", "0.1"]


def test_networks_are_measured_side_by_side(capsys, tmp_path):
    table, chart = tmp_path / "rows.csv", tmp_path / "times.png"
    names = ["mobilenetv2_035", "inception_next_atto"]
    assert main(["measure", *names, "--batch-size", "1", "2", *QUICK, "--csv", str(table), "--chart", str(chart)]) == 0
    assert "samples/s" in capsys.readouterr().out
    with open(table, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["batch_size"]) for row in rows] == [(name, size) for size in "12" for name in names]
    assert rows[0]["parameters"] == "1677128"
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_a_measurement_is_judged_against_an_earlier_one(capsys, tmp_path):
    baseline = str(tmp_path / "baseline.json")
    assert main(["measure", "mobilenetv2_035", *QUICK, "--save-baseline", baseline, "--stages"]) == 0
    assert "stages.6" in capsys.readouterr().out
    names = ["mobilenetv2_035", "inception_next_atto"]
    assert main(["measure", *names, *QUICK, "--baseline", baseline, "--threads", "1"]) == 0
    found = capsys.readouterr().out
    assert "mobilenetv2_035, eager, batch 1: " in found
    assert "inception_next_atto, eager, batch 1: not in the baseline" in found
    assert main(["measure", "mobilenetv2_035", *QUICK, "--baseline", str(tmp_path / "none.json")]) == 2
    assert "there is no baseline" in capsys.readouterr().err


def test_mistakes_are_one_line(capsys, tmp_path):
    assert main(["measure", "mobilenetv2_035", "mobilenetv2_035", *QUICK]) == 2
    assert "given twice" in capsys.readouterr().err
    assert main(["measure", "mobilenetv2_035", "--batch-size", "0", *QUICK]) == 2
    assert "batch sizes must be 1 or more" in capsys.readouterr().err
    assert main(["measure", "mobilenetv2_035", "inception_next_atto", "--checkpoint", "x.pth", *QUICK]) == 2
    assert "belongs to one network" in capsys.readouterr().err
